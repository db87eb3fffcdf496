"""Write the generated tables of README.md: `python tools/tables.py`; with --check, fail if they are out of date."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from dynavae.catalogue import task_table
from dynavae.models import MODELS
from dynavae.testing import dependency_table, small

ROOT = Path(__file__).parent.parent


def dependencies() -> str:
    """Who reads whom, for every registered model."""
    head = ("prior of z_t", "likelihood of x_t", "posterior of z_t", "posterior of w")
    lines = ["| model | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, cls in MODELS.items():
        row = dependency_table(small(cls))
        cells = [_math(c) for c in (row.prior, row.likelihood, row.posterior, row.static)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _math(reads: str | None) -> str:
    return "$" + reads.replace("<=", r"\le ") + "$" if reads else "–"


def results() -> str:
    """benchmarks/results/zoo.json, and the demo's score if it has been recorded."""
    path = ROOT / "benchmarks" / "results" / "zoo.json"
    if not path.is_file():
        return "(run `make bench`)"
    lines = [
        "| model | −ELBO | IWAE-100 | FIVO-64 | parameters | epochs | s / epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in json.loads(path.read_text()):
        note = " (density)" if r["density"] == "density" else ""
        fivo = f"{r['fivo_64']:.2f}" if r["fivo_64"] is not None else "–"
        lines.append(
            f"| {r['model']}{note} | {r['neg_elbo']:.2f} | {r['iwae_100']:.2f} | {fivo} | {r['parameters']:,} "
            f"| {r['epochs']} | {r['seconds_per_epoch']:.1f} |"
        )
    return "\n".join(lines)


def music() -> str:
    """benchmarks/results/music.json, test split: floors first, then presets; the mean over seeds."""
    path = ROOT / "benchmarks" / "results" / "music.json"
    if not path.is_file():
        return "(run `python benchmarks/music.py`)"
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for r in json.loads(path.read_text()):
        if r["split"] == "test":
            groups.setdefault((r["data"], r["model"], r["preset"] or "–"), []).append(r)
    lines = [
        "| data | model | preset | −ELBO | IWAE (K) | FIVO (K) | parameters | min | seeds |",
        "|---" * 9 + "|",
    ]
    for (data, model, preset), rows in groups.items():
        cells = [_mean(rows, bound) for bound in ("elbo", "iwae", "fivo")]
        if rows[0]["baseline"]:
            cells[0] = f"{_mean(rows, 'exact')} (exact)"
        minutes = sum({r["seed"]: r["seconds"] for r in rows}.values()) / len({r["seed"] for r in rows}) / 60
        lines.append(
            f"| {data} | {model} | {preset} | {' | '.join(cells)} | {rows[0]['parameters']:,} | {minutes:.0f} "
            f"| {len({r['seed'] for r in rows})} |"
        )
    return "\n".join(lines)


def _mean(rows: list[dict], bound: str) -> str:
    """The mean over seeds of one bound, at the largest K there is."""
    found = [r for r in rows if r["bound"] == bound]
    if not found:
        return "–"
    k = max(r["particles"] for r in found)
    values = [r["nats_per_frame"] for r in found if r["particles"] == k]
    return f"{sum(values) / len(values):.2f}" + (f" ({k})" if k > 1 else "")


def imputation() -> str:
    """benchmarks/results/imputation.json: errors on what was hidden."""
    return _errors(
        "imputation.json", linear="linear interpolation", gru="GRU forecast", bigru="GRU in both directions"
    )


def forecast() -> str:
    """benchmarks/results/forecast.json: errors on what came after."""
    return _errors("forecast.json", linear="straight line", yesterday="the day before", gru="GRU")


def _errors(file: str, **named: str) -> str:
    """MAE and CRPS of each method, the mean over seeds, the least in bold."""
    records = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
    measured: dict[tuple[str, str, str], list[float]] = {}
    for r in records:
        for measure in ("mae", "crps"):
            measured.setdefault((r["data"], r["model"], measure), []).append(r[measure])
    found = {key: sum(values) / len(values) for key, values in measured.items()}
    columns = [(d, m) for d in ("pm25", "physionet") for m in ("mae", "crps")]
    names = dict(mean="mean", last="last value") | named
    lines = [
        "| | PM2.5: MAE | CRPS | PhysioNet: MAE | CRPS |",
        "|---" * (len(columns) + 1) + "|",
    ]
    best = {
        (d, m): min(value for (data, _, measure), value in found.items() if (data, measure) == (d, m))
        for d, m in columns
    }
    for model in (m for m in [*names, *MODELS] if ("pm25", m, "mae") in found):
        cells = []
        for data, measure in columns:
            value = found[data, model, measure]
            text = f"{value:.1f}" if data == "pm25" else f"{value:.3f}"
            cells.append(f"**{text}**" if value == best[data, measure] else text)
        lines.append(f"| {names.get(model, model)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(text: str) -> str:
    """The README with its tables filled in."""
    for name, table in (
        ("task table", task_table()),
        ("dependency table", dependencies()),
        ("results table", results()),
        ("music table", music()),
        ("imputation table", imputation()),
        ("forecast table", forecast()),
    ):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        text, n = re.subn(pattern, lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.S)
        if n != 1:
            raise ValueError(f"README.md should have one place for the {name}; found {n}.")
    return text


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    new = written(text)
    if "--check" in sys.argv:
        if new != text:
            print("README.md has tables that are out of date: run python tools/tables.py")
        return int(new != text)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
