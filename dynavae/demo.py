"""`make demo`: an SRNN on Bach chorales, from nothing to a report, with the commands a user would type."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from dynavae import cli

PRESET = Path(__file__).parent / "presets" / "srnn-jsb.yaml"


def main(out: str = "runs/demo") -> int:
    """Fit, evaluate on the test split, generate, forecast, impute, report. Returns the exit status."""
    started = time.time()
    for command in (
        ["fit", "--config", str(PRESET), "--out", out],
        ["evaluate", out, "--bounds", "[elbo, iwae-100, fivo-64]"],
        ["generate", out],
        ["forecast", out, "--horizon", "16"],
        ["impute", out, "--hide", "0.2"],
        ["report", out],
    ):
        print(f"\n$ dynavae {shlex.join(command)}", flush=True)
        status = cli.main(command)
        if status:
            return status
    print(
        f"\nDone in {time.time() - started:.0f} s. Look at {out}/report.html; the score is in {out}/score.json."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
