"""`dynavae report | list`: a page about runs, and what there is to choose from."""

from __future__ import annotations

import json

from dynavae import catalogue, presets
from dynavae.commands.checks import check_numbers
from dynavae.nn.heads import EMISSIONS
from dynavae.runs import Run, table


def report(
    run: str | list[str],
    out: str | None = None,
    split: str = "test",
    sequences: int = 2,
    horizon: int = 16,
    samples: int = 20,
    seed: int = 0,
) -> str:
    """Write report.html of a run: setting, scores, curves, latents, reconstructions, samples, forecasts.

    With several runs, write comparison.html instead: scores in one table, differing settings, curves overlaid, and
    forecasts and imputations of the same sequences side by side.

    Args:
        run: run directory, made by dynavae fit --out; or several, to compare them.
        out: file to write; default: report.html in the run, or comparison.html here.
        split: which part of the data is shown; of data without a test part, what they have in its place.
        sequences: how many of its sequences.
        horizon: frames of the forecasts.
        samples: futures drawn for each.
        seed: of the noise.
    """
    from dynavae.report import write_comparison, write_report
    from dynavae.report.gather import gather

    check_numbers(sequences=sequences, horizon=horizon, samples=samples, seed=seed)
    runs = [run] if isinstance(run, str) else run
    options = {"split": split, "sequences": sequences, "horizon": horizon, "samples": samples, "seed": seed}
    if len(runs) > 1:
        path = write_comparison(out or "comparison.html", runs, **options)  # type: ignore[arg-type]
    else:
        opened = Run.open(runs[0])
        path = write_report(out or opened.directory / "report.html", **gather(opened, **options))  # type: ignore[arg-type]
    return f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)"


def list_all(what: str = "models", as_json: bool = False) -> str:
    """The registry: models with the model × task table, presets, data sets, emissions."""
    if what == "models":
        records = catalogue.records()
        if as_json:
            return json.dumps(records, indent=2, default=str)
        rows = [{"model": r["name"], "what": r["summary"]} for r in records if not r["variant"]]
        return table(rows) + "\n\n" + catalogue.task_table()
    if what == "presets":
        rows = presets.records()
    elif what == "data":
        rows = [{"data": n, "what": d} for n, d in _data_names().items()]
    elif what == "emissions":
        rows = [
            {"emission": n, "what": (c.__doc__ or "").strip().splitlines()[0]} for n, c in EMISSIONS.items()
        ]
    else:
        raise ValueError(f"list models, presets, data or emissions; got {what!r}.")
    return json.dumps(rows, indent=2) if as_json else table(rows)


def _data_names() -> dict[str, str]:
    return {
        "jsb": "Bach chorales, quarter notes (in the package)",
        "nottingham": "folk tunes with chords (file under DYNAVAE_DATA)",
        "muse": "orchestral and piano classics (file under DYNAVAE_DATA; no test split)",
        "piano": "classical piano (file under DYNAVAE_DATA; no test split)",
        "jsb16": "Bach chorales, sixteenth notes (file under DYNAVAE_DATA)",
        "pm25": "PM2.5 of 36 stations in Beijing, hourly, with gaps (files under DYNAVAE_DATA)",
        "physionet": "48 hours of intensive care, 35 variables, 80 % missing (file under DYNAVAE_DATA)",
        "PATH.csv": "your own table (or .tsv, .parquet): id, time and value columns, see dynavae.data.load_table",
        "FOLDER": "your own tables or .mid files, one sequence each; or folders train, valid, test",
        "PATH.npz": "your own arrays: train, valid, test (B, T, x), or x with lengths; NaN is missing",
    }
