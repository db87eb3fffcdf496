"""`python -m dynavae`: the command line, where the script `dynavae` is not on the path."""

import sys

from dynavae.cli import main

if __name__ == "__main__":
    sys.exit(main())
