"""The comparison of runs: one whole page, which sets apart what does not compare."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Page

from dynavae import cli
from dynavae.report import contrast, overlays, side_by_side, write_comparison
from dynavae.report.compare import Compared
from dynavae.runs import Run

SMALL = [
    "--epochs",
    "2",
    "--batch_size",
    "8",
    "--progress",
    "false",
    "--tensorboard",
    "false",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs on the same data, scored by bounds of which they share one, and a third on other data."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 14, 2)).cumsum(1)
    x[:, 5:7, 0] = np.nan
    for name, data in (("own", x), ("other", 2 * x[:, :12])):
        np.savez(folder / f"{name}.npz", train=data[:10], valid=data[10:12], test=data[12:])
    small = ["--model.z_dim", "2"]
    wanted = {
        "vae": ("VAE", "own", [*small, "--model.layers", "[4]", "--lr", "0.01"], "[elbo, iwae-5]"),
        "vrnn": ("VRNN", "own", [*small, "--model.h_dim", "4"], "[elbo, iwae-7]"),
        "elsewhere": ("VAE", "other", [*small, "--model.layers", "[4]"], "[elbo]"),
    }
    for name, (model, data, options, bounds) in wanted.items():
        out = str(folder / name)
        given = [
            "fit",
            "--model",
            model,
            *options,
            "--data",
            str(folder / f"{data}.npz"),
            "--out",
            out,
            *SMALL,
        ]
        assert cli.main(given) == 0
        assert cli.main(["evaluate", out, "--bounds", bounds]) == 0
    return [str(folder / name) for name in wanted]


@pytest.fixture(scope="module")
def page(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "new" / "compare.html"
    return Page(write_comparison(path, runs, horizon=4, samples=6))


def test_the_page_is_whole_and_self_contained(page: Page) -> None:
    on_data = [f"{what}-{n}" for n in (1, 2) for what in ("forecasts", "imputations", "samples")]
    assert page.sections == ["scores", "settings", "training", "kl", *on_data]
    assert "3 runs on own and other" in page.said("title")
    for address in ("http:", "https:", "url(//", "<script", "<link", "<iframe"):
        assert address not in page.source
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(page.all("div", role="img"))


def test_numbers_of_one_question_share_a_column(runs: list[str], page: Page) -> None:
    table = page.source.split('id="scores"')[1].split("</table>")[0]
    heads = re.findall(r'<th scope="col">(.*?)</th>', table)
    assert heads == [
        "",
        *(f"test · {b}" for b in ("ELBO, K = 1", "IWAE, K = 5", "IWAE, K = 7", "ELBO, K = 1")),
    ]
    verdicts = table.split("may be compared</th>")[1].split("</tr>")[0]
    assert re.findall(r"<td>(.*?)</td>", verdicts) == ["2 of 3 runs", *["<mark>no: one run only</mark>"] * 3]
    for run in runs:
        for score in json.loads(Path(f"{run}/scores.json").read_text()):
            assert f"{score['nats_per_frame']:.4f}".replace("-", "−") in table
            assert f"by sequence {score['nats_per_frame_by_sequence']:.4f}".replace("-", "−") in table
    hashes = table.split("data, SHA-256</th>")[1].split("</tr>")[0]
    assert [("≠" in cell) for cell in re.findall(r"<td>(.*?)</td>", hashes)] == [False, False, False, True]
    particles = table.split("particles K</th>")[1].split("</tr>")[0]
    assert [("≠" in cell) for cell in re.findall(r"<td>(.*?)</td>", particles)] == [False, True, True, False]


def test_only_what_differs_is_listed(page: Page) -> None:
    section = page.source.split('id="settings"')[1].split("</section>")[0]
    listed, only_some = section.split("<details>")
    named = re.findall(r'<th scope="row"><code>(.*?)</code>', listed)
    assert [name for name in named if name != "seconds of training"] == [  # which may be equal
        *("model", "parameters", "data", "data_sha256", "data, train", "data, valid", "data, test"),
        *("model.h_dim", "lr"),
    ]
    assert "<code>model.layers</code>" in only_some
    assert re.search(r"(\d+) further settings agree", listed)[1] > "1"  # type: ignore[index]


def test_bounds_on_different_data_are_drawn_apart(page: Page) -> None:
    titles = re.findall(r"<h3>(.*?)</h3>", page.source.split('id="training"')[1].split("</section>")[0])
    bounds = [title for title in titles if title.startswith("nats per frame · valid")]
    assert len(bounds) == 2
    assert bounds[0].split(", ")[-1] == bounds[1].split(", ")[-1] == "density"
    assert "KL, nats per frame · valid" in titles


def test_the_same_sequences_and_gaps_are_given_to_all(runs: list[str], page: Page) -> None:
    shown = page.source.split('id="imputations-1"')[1].split("</section>")[0]
    assert shown.count("<figure") == 2
    assert "7% of the values are hidden or missing" in shown
    alone = page.source.split('id="forecasts-2"')[1].split("</section>")[0]
    assert "Only: elsewhere. No other run has these data." in alone


def test_the_page_is_a_function_of_the_runs(runs: list[str], page: Page, tmp_path: Path) -> None:
    again = write_comparison(tmp_path / "a.html", [Run.open(run) for run in runs], horizon=4, samples=6)
    assert again.read_text(encoding="utf-8") == page.source


def test_names(runs: list[str], tmp_path: Path) -> None:
    page = Page(write_comparison(tmp_path / "a.html", runs[:2], names=["<one>", "two"], horizon=4, samples=2))
    assert "<one> (VAE), two (VRNN)" in " ".join(page.said("p").split())
    twin = tmp_path / "b" / "vae"
    shutil.copytree(runs[0], twin)
    page = Page(write_comparison(tmp_path / "b.html", [runs[0], twin], horizon=4, samples=2))
    assert "b/vae (VAE)" in page.said("p")
    assert "What differs; " in page.said("p")


def test_a_run_without_scores_is_said(runs: list[str], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(runs[0], bare)
    for name in ("score.json", "scores.json"):
        (bare / name).unlink()
    page = Page(write_comparison(tmp_path / "a.html", [runs[0], bare], horizon=4, samples=2))
    assert "Not scored yet: bare (dynavae evaluate RUN)" in page.said("p")


def test_the_command(runs: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--horizon", "4", "--samples", "2", "--sequences", "1"]
    assert cli.main(["report", *runs[:2], *options]) == 0
    assert "written to comparison.html" in capsys.readouterr().out
    assert cli.main(["report", *runs[:2], "--out", "sub/c.html", *options]) == 0
    assert (tmp_path / "sub" / "c.html").is_file()
    assert cli.main(["report", runs[0], "--out", "one.html", *options]) == 0
    assert (
        "Reconstruction" in (tmp_path / "one.html").read_text()
        or "reconstruction" in Path("one.html").read_text()
    )
    assert cli.main(["report", runs[0], "nowhere"]) == 1
    assert "nowhere is not a run: it has no run.json" in capsys.readouterr().err


def test_bad_runs_get_a_sentence(runs: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    with pytest.raises(
        ValueError, match=r"a comparison takes 2 to 12 runs; got 1. One run: dynavae report RUN"
    ):
        write_comparison(path, runs[:1])
    with pytest.raises(TypeError, match=r"runs should be a list of run directories; got 'a' alone"):
        write_comparison(path, "a")
    with pytest.raises(ValueError, match=r"vae is given twice; a comparison takes different runs"):
        write_comparison(path, [runs[0], f"{runs[0]}/"])
    with pytest.raises(ValueError, match=r"nowhere is not a run: it has no run\.json"):
        write_comparison(path, [runs[0], "nowhere"])
    with pytest.raises(ValueError, match="names should be 2 different names, one for each run; got 'a', 'a'"):
        write_comparison(path, runs[:2], names=["a", "a"])
    begun = tmp_path / "begun"
    shutil.copytree(runs[0], begun)
    shutil.rmtree(begun / "best")
    with pytest.raises(
        ValueError, match=r"has no best/: its training has not finished an epoch. Continue it with"
    ):
        write_comparison(path, [runs[1], begun])
    assert not path.exists()


# --- on runs made by hand ------------------------------------------------------------------------------------


def compared(index: int, **changes: Any) -> Compared:
    rng = np.random.default_rng(index)
    roll = (np.random.default_rng(9).random((30, 88)) < 0.05).astype(float)
    gap = np.ones(roll.shape, dtype=bool)
    gap[10:15] = False
    run = Compared(
        index=index,
        name=f"run{index}",
        settings={
            "model": "VAE",
            "data": {"name": "jsb", "sha256": "ab" * 32},
            "options": {},
            "training": {},
        },
        scores=[],
        history=[],
        notes=[],
        measure="mass",
        kl=None,
        data="jsb",
        kind="binary",
        meta={"frame_seconds": 0.5, "lowest_midi": 21},
        same=("jsb",),
        forecasts=[
            {
                "name": f"song {i}",
                "context": roll[:20],
                "truth": roll[20:],
                "samples": rng.random((5, 10, 88)),
            }
            for i in range(2)
        ],
        imputations=[{"name": "song", "data": roll, "observed": gap, "mean": rng.random(roll.shape)}],
        samples=[(rng.random((30, 88)) < 0.05).astype(float) for _ in range(2)],
    )
    return replace(run, **changes)


def test_piano_rolls_stand_one_above_the_other_with_sound_for_the_first() -> None:
    runs = [compared(0), compared(1), compared(2)]
    forecasts, imputations, samples = side_by_side.sections(runs)
    assert forecasts.body.count("<figure") == samples.body.count("<figure") == 2
    assert forecasts.body.count("<audio") == 4  # the truth, and a sample of each
    assert samples.body.count("<audio") == 3
    for run in runs:
        assert f"{run.name}: share of 5 samples" in forecasts.body
    truth, filled = runs[0].imputations[0]["data"], runs[1].imputations[0]["mean"]
    error = np.sqrt(np.mean((truth - filled)[10:15] ** 2))
    assert f"run1 {error:.4g}" in imputations.body


def test_other_kinds_are_pictures() -> None:
    for kind in ("power", "categorical"):
        runs = [compared(i, kind=kind, meta={}) for i in range(2)]
        for section in side_by_side.sections(runs):
            assert "run1" in section.body
            assert "data:image/png" in section.body


def test_scores_under_different_scaling_are_apart() -> None:
    score = {
        "bound": "elbo",
        "particles": 1,
        "nats_per_frame": 1.0,
        "data_sha256": "ab" * 32,
        "split": "test",
    }
    same = [compared(i, scores=[{**score, "scaling": ""}]) for i in range(2)]
    assert [len(answers) for answers in contrast.questions(same).values()] == [2]
    other = [same[0], compared(1, scores=[{**score, "scaling": "scaling 12345678"}])]
    assert [len(answers) for answers in contrast.questions(other).values()] == [1, 1]
    assert contrast.score_section(other).body.count("no: one run only") == 2


def test_twelve_runs_look_different() -> None:
    looks = {(look.colour, look.shape) for look in map(overlays.mark, range(overlays.MOST_RUNS))}
    assert len(looks) == 12
