"""Tables that the pages include: derived from the models and from `benchmarks/results`, never typed by hand."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BASELINES = {
    "mean": "mean of the training part",
    "last": "last value seen",
    "linear": "straight lines",
    "yesterday": "the same hour of the day before",
    "gru": "GRU forecast",
    "bigru": "GRU in both directions",
}
DATA = {"pm25": "PM2.5, 36 stations", "physionet": "PhysioNet 2012, 35 variables"}


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def facts(records: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    """What the figures of a table have in common, and in what they differ, in one paragraph."""
    parts = []
    for key in keys:
        values = list(
            dict.fromkeys(
                str(r[key])[:12] if key == "data_sha256" else str(r[key]) for r in records if key in r
            )
        )
        if key == "command":
            values = [f"`{value}`" for value in values]  # with its hyphens as they are
        if values:
            parts.append(f"{key.replace('_', ' ')}: {' / '.join(values)}")
    return "*" + "; ".join(parts) + ".*\n"


def over_seeds(values: Sequence[float], form: str) -> str:
    """The mean, and half of what lies between the least and the largest."""
    spread = (max(values) - min(values)) / 2
    return format(mean(values), form) + (f" ± {format(spread, form)}" if len(values) > 1 else "")


def zoo() -> str:
    """The likelihood of every model on the packaged chorales."""
    records = json.loads((RESULTS / "zoo.json").read_text(encoding="utf-8"))
    rows = [
        [
            r["model"] + (" (density)" if r["density"] == "density" else ""),
            *(f"{r[key]:.2f}" if r[key] is not None else "–" for key in ("neg_elbo", "iwae_100", "fivo_64")),
            f"{r['parameters']:,}",
            str(r["epochs"]),
        ]
        for r in records
    ]
    heads = ("model", "−ELBO", "IWAE-100", "FIVO-64", "parameters", "epochs")
    said = facts(
        records,
        ("data", "split", "data_sha256", "frames", "average", "first_frame", "kl", "seed", "hardware"),
    )
    return markdown(heads, rows) + "\n" + said


def imputation() -> str:
    """The error of filled gaps on real data."""
    return _errors("imputation.json", ("hidden", "hidden_share", "hidden_values"))


def forecast() -> str:
    """The error of forecasts of real data."""
    return _errors("forecast.json", ("context", "horizon", "sequences", "values"))


def _errors(file: str, said: tuple[str, ...]) -> str:
    """MAE and CRPS of each method, for each data set."""
    records = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    out = []
    for data in dict.fromkeys(r["data"] for r in records):
        own = [r for r in records if r["data"] == data]
        of_model = {r["model"]: [s for s in own if s["model"] == r["model"]] for r in own}
        rows = [
            [
                BASELINES.get(model, model) if runs[0]["baseline"] else f"**{model}**",
                over_seeds([r["mae"] for r in runs], ".3f"),
                over_seeds([r["crps"] for r in runs], ".3f"),
                f"{mean([r['coverage_90'] for r in runs]):.0%}" if "coverage_90" in runs[0] else "–",
                f"{mean([r['training_seconds'] for r in runs]):.0f}"
                if "training_seconds" in runs[0]
                else "–",
                str(len(runs)),
            ]
            for model, runs in sorted(of_model.items(), key=lambda item: mean([r["mae"] for r in item[1]]))
        ]
        units = ", ".join(dict.fromkeys(r["units"] for r in own))
        heads = (
            f"{DATA.get(data, data)}",
            f"MAE, {units}",
            "CRPS",
            "in the 90 % band",
            "seconds of training",
            "seeds",
        )
        keys = ("split", *said, "data_sha256", "seed", "hardware")
        out.append(markdown(heads, rows) + "\n" + facts([r for r in own if not r["baseline"]] or own, keys))
    return "\n".join(out)


def speed() -> str:
    """Times of the engine against the plain loop, for each device and number of threads."""
    records = json.loads((RESULTS / "engine_speed.json").read_text(encoding="utf-8"))
    heads = (
        "task",
        "model",
        "batch × steps",
        "engine, ms",
        "plain loop, ms",
        "ratio",
        "products alone, ms",
        "peak, MB",
    )
    out = []
    for device, threads in sorted({(r.get("device", "cpu"), r["threads"]) for r in records}, reverse=True):
        own = [r for r in records if (r.get("device", "cpu"), r["threads"]) == (device, threads)]
        own = [r for r in own if r["task"] in ("train", "infer")]
        digits = ".0f" if device == "cpu" else ".3g"
        models = list(dict.fromkeys(r["model"] for r in own))
        own.sort(key=lambda r: (models.index(r["model"]), r["steps"], r["batch"]))
        rows = [
            [
                r["task"],
                r["model"],
                f"{r['batch']} × {r['steps']}",
                *(f"{r[key]:{digits}}" for key in ("fast_ms", "loop_ms")),
                f"**{r['ratio']:.2f}**",
                f"{r['gemm_ms']:{digits}}",
                f"{r['peak_mb']:.0f} (loop {r['loop_peak_mb']:.0f})" if "peak_mb" in r else "–",
            ]
            for r in own
        ]
        means = []
        for task in ("train", "infer"):
            ratios = [r["ratio"] for r in own if r["task"] == task]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            means.append(f"{task} {mean:.2f} (least {min(ratios):.2f})")
        on = f"{threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else "On a GPU"
        said = f"{on}; geometric means of the ratios: {', '.join(means)}."
        out.append(
            f"{said}\n\n"
            + markdown(heads, rows)
            + "\n"
            + facts(own, ("allocator", "hardware", "versions", "command"))
        )
    return "\n".join(out)


def launches() -> str:
    """Operations that Python starts in a training step."""
    records = json.loads((RESULTS / "launches.json").read_text(encoding="utf-8"))
    keys = ("loop", "engine", "recorded")
    rows = [[r["model"], *(f"{r[key]:,}" for key in keys)] for r in records]
    heads = ("model", "plain loop", "engine", "engine, the loop over time in a CUDA graph")
    return markdown(heads, rows) + "\n" + facts(records, ("batch", "steps", "versions"))


def growth() -> str:
    """How a training step grows with each size."""
    records = json.loads((RESULTS / "engine_speed.json").read_text(encoding="utf-8"))
    own = [r for r in records if r["task"] == "growth" and r["threads"] == max(r["threads"] for r in records)]
    rows = []
    for name in dict.fromkeys(r["grows"] for r in own):
        cells = [
            f"{r[name]}: {r['fast_ms']:.0f} ms" + (f", {r['peak_mb']:.0f} MB" if "peak_mb" in r else "")
            for r in own
            if r["grows"] == name
        ]
        rows.append([name, ", ".join(cells)])
    return markdown(("grows", "training step of a VRNN, from batch 32, 100 steps, 1 particle, h 128"), rows)


def video() -> str:
    """Wrong pixels of missing frames of simulated videos, for each data set, over seeds."""
    records = json.loads((RESULTS / "kvae.json").read_text(encoding="utf-8"))
    out = []
    for data in dict.fromkeys(r["data"] for r in records):
        own = [r for r in records if r["data"] == data]
        gaps = list(dict.fromkeys(r["gap"] for r in own))
        rows = []
        for model in dict.fromkeys(r["model"] for r in own):
            of = [r for r in own if r["model"] == model]
            seeds = {r["seed"]: r for r in of if r["seed"] is not None}
            scores = [("neg_elbo", ".2f"), ("r2_position", ".3f")]
            rows.append(
                [
                    f"**{model}**" if seeds else model,
                    *(over_seeds([r["wrong_pixels"] for r in of if r["gap"] == gap], ".2%") for gap in gaps),
                    *(
                        over_seeds([r[key] for r in seeds.values()], form)
                        if seeds and of[0][key] is not None
                        else "–"
                        for key, form in scores
                    ),
                    f"{of[0]['parameters']:,}" if seeds else "–",
                    str(of[0]["epochs"]) if seeds else "–",
                    ", ".join(map(str, seeds)) if seeds else "–",
                ]
            )
        heads = (data, *gaps, "−ELBO", "R² of the position", "parameters", "epochs", "seeds")
        keys = ("split", "data_sha256", "videos", "bound", "paths", "hardware")
        out.append(markdown(heads, rows) + "\n" + facts([r for r in own if r["neg_elbo"] is not None], keys))
    return "\n".join(out)


def video_search() -> str:
    """The settings tried for each model of videos, on the validation split, the chosen one in bold."""
    records = json.loads((RESULTS / "kvae_search.json").read_text(encoding="utf-8"))
    rows = []
    for data, model in dict.fromkeys((r["data"], r["model"]) for r in records):
        own = [r for r in records if (r["data"], r["model"]) == (data, model)]
        best = min(own, key=lambda r: r["wrong_pixels"])
        for r in own:
            setting = ", ".join(f"{k} {v}" for k, v in r["setting"].items() if k != "score_hidden")
            cells = [setting, f"{r['wrong_pixels']:.2%}", f"{r['neg_elbo']:.2f}"]
            rows.append([data, model, *(f"**{cell}**" if r is best else cell for cell in cells)])
    heads = ("data", "model", "setting", "wrong pixels, random 50 %", "−ELBO")
    keys = ("split", "data_sha256", "videos", "epochs", "seed", "paths")
    return markdown(heads, rows) + "\n" + facts(records, keys)


def exact_speed() -> str:
    """Milliseconds of exact inference here and in other libraries, the least in bold; peak memory beside it."""
    records = json.loads((RESULTS / "exact_speed.json").read_text(encoding="utf-8"))
    rivals = list(dict.fromkeys(r["rival"] for r in records))
    rows = []
    keys = ("task", "batch", "steps", "dim", "missing")
    for case in dict.fromkeys(tuple(r[key] for key in keys) for r in records):
        own = {r["rival"]: r for r in records if tuple(r[key] for key in keys) == case}
        best = min(r["ms"] for r in own.values())
        cells = []
        for rival in rivals:
            text = f"{own[rival]['ms']:,.1f}" if rival in own else "–"
            memory = own[rival]["memory_mib"] if rival in own else None
            text = f"**{text}**" if rival in own and own[rival]["ms"] == best else text
            cells.append(text if memory is None else f"{text} ({memory:.0f})")
        task, *size, missing = case
        gaps = f", {missing:.0%} missing" if missing else ""
        rows.append([task, ", ".join(map(str, size)) + gaps, *cells])
    heads = ("task", "B, T, z_dim", *(f"{rival}, ms (MiB)" for rival in rivals))
    return markdown(heads, rows) + "\n" + facts(records, ("hardware", "versions", "command"))


def hmm_speed() -> str:
    """Milliseconds of hidden Markov models here and in hmmlearn, the least in bold."""
    records = json.loads((RESULTS / "hmm_speed.json").read_text(encoding="utf-8"))
    rivals, keys = list(dict.fromkeys(r["rival"] for r in records)), ("task", "batch", "steps", "states")
    rows = []
    for case in dict.fromkeys(tuple(r[key] for key in keys) for r in records):
        own = {r["rival"]: r["ms"] for r in records if tuple(r[key] for key in keys) == case}
        best = min(own.values())
        cells = [f"{own[rival]:.2f}" if rival in own else "–" for rival in rivals]
        bold = [
            f"**{cell}**" if own.get(name) == best else cell for name, cell in zip(rivals, cells, strict=True)
        ]
        rows.append([case[0], ", ".join(map(str, case[1:])), *bold])
    heads = ("task", "B, T, states", *(f"{rival}, ms" for rival in rivals))
    return markdown(heads, rows) + "\n" + facts(records, ("hardware", "versions", "command"))


def build(app: Any) -> None:
    """Write `docs/_generated`, which git ignores."""
    sys.path.insert(0, str(ROOT / "tools"))
    import tables

    from dynavae.catalogue import task_table

    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    for name, text in {
        "tasks": task_table(),
        "dependencies": tables.dependencies(),
        "zoo": zoo(),
        "imputation": imputation(),
        "forecast": forecast(),
        "music": tables.music(),
        "speed": speed(),
        "launches": launches(),
        "exact_speed": exact_speed(),
        "hmm_speed": hmm_speed(),
        "growth": growth(),
        "video": video(),
        "video_search": video_search(),
    }.items():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", build)
    return {"parallel_read_safe": True}
