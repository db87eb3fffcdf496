"""Numbers that a command is given, checked before anything is read or trained."""

from __future__ import annotations

import re

LEAST: dict[str, tuple[int, str]] = {
    "batch": (1, "sequences to draw"),
    "length": (1, "frames of each sequence"),
    "horizon": (1, "frames to forecast"),
    "context": (1, "frames to read first; leave it out to read all but the last horizon"),
    "samples": (1, "futures or completions drawn for each sequence"),
    "sequences": (1, "sequences to show"),
    "batch_size": (1, "sequences at a time"),
    "threads": (1, "threads of torch; leave it out for torch's own choice"),
    "seed": (0, "a whole number that says which random numbers are drawn"),
    "split_seed": (0, "a whole number that says how the data are split"),
}
"""The smallest value of a number, and what the number is."""

MOST = 2**63 - 1
"""The largest seed that torch and numpy both take, and more than enough of anything else."""


def check_numbers(**given: int | None) -> None:
    """Refuse numbers that mean nothing; None is a number that was left out.

    Raises:
        ValueError: a number below the least that makes sense, or above what a machine holds.

    Example:
        >>> check_numbers(samples=1, context=None)
        >>> check_numbers(samples=0)
        Traceback (most recent call last):
        ...
        ValueError: samples should be 1 or more (futures or completions drawn for each sequence); got 0.
    """
    for name, value in given.items():
        least, what = LEAST[name]
        if value is not None and value < least:
            raise ValueError(f"{name} should be {least} or more ({what}); got {value}.")
        if value is not None and value > MOST:
            raise ValueError(f"{name} should be below 2**63 ({what}); got {value}.")


def parse_bound(text: str) -> tuple[str, int]:
    """The bound and its particles, of a text such as elbo or iwae-100.

    Raises:
        ValueError: something else than a name, or a name, a hyphen and a number above 0.

    Example:
        >>> parse_bound("iwae-100"), parse_bound("elbo")
        (('iwae', 100), ('elbo', 1))
    """
    found = re.fullmatch(r"([a-z]+)(?:-([0-9]*[1-9][0-9]*))?", text)
    if found is None:
        raise ValueError(
            f"a bound looks like elbo, iwae-100 or fivo-64, with 1 particle or more; got {text!r}."
        )
    return found[1], int(found[2] or 1)
