"""What `dynavae fit | evaluate | generate | forecast | impute | report | list` do, as plain functions.

Each works on a run directory (see `runs.py`), writes files into it, and returns what it prints as a table.
"""

from dynavae.commands.prediction import forecast, generate, impute
from dynavae.commands.reporting import list_all, report
from dynavae.commands.scoring import evaluate
from dynavae.commands.training import fit

__all__ = ["evaluate", "fit", "forecast", "generate", "impute", "list_all", "report"]
