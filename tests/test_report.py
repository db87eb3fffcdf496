"""The report of a run: the page is whole, says what it should, and holds everything it shows."""

from __future__ import annotations

import base64
import io
import re
import wave
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from dynavae import music
from dynavae.report import figures, html, theme, write_report
from dynavae.report.canvas import choose_dims

VOID = {"meta", "br", "img", "link", "input", "hr"}
RNG = np.random.default_rng(0)


class Page(HTMLParser):
    """A parsed page; parsing fails where the tags do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str, **attrs: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attrs.items())]

    def said(self, tag: str) -> str:
        return " ".join(self.text.get(tag, []))

    @property
    def sections(self) -> list[str | None]:
        return [attrs["id"] for attrs in self.all("section")]

    def data(self, kind: str) -> list[bytes]:
        urls = re.findall(rf"data:{kind};base64,([^\"]*)", self.source)
        return [base64.b64decode(url, validate=True) for url in urls]


def real_run() -> dict[str, Any]:
    x = np.cumsum(RNG.normal(size=(2, 50, 10)), axis=1)
    observed = np.ones((50, 10), dtype=bool)
    observed[10:20, :5] = False
    mean = x + 0.1
    return {
        "kind": "real",
        "reconstructions": [{"name": "walk", "data": x[0], "observed": observed, "mean": mean[0]}],
        "samples": list(x),
        "forecasts": [
            {
                "name": "walk",
                "context": x[0, :30],
                "truth": x[0, 30:],
                "samples": x[0, 30:] + RNG.normal(size=(40, 20, 10)),
            }
        ],
        "imputations": [
            {
                "name": "walk",
                "data": x[0],
                "observed": observed,
                "mean": mean[0],
                "lower": mean[0] - 1,
                "upper": mean[0] + 1,
            }
        ],
        "meta": {"frame_seconds": 0.1},
    }


def music_run(frames: int = 24, seconds: float = 0.25) -> dict[str, Any]:
    x = (RNG.random((3, frames, 88)) < 0.05).astype(np.uint8)
    x[:, -1, 40] = 1
    half = frames // 2
    return {
        "kind": "binary",
        "reconstructions": [{"name": "song", "data": x[0], "mean": 0.8 * x[0] + 0.1}],
        "samples": list(x[1:]),
        "forecasts": [
            {"name": "song", "context": x[0, :half], "truth": x[0, half:], "samples": x[:, half:]},
            {"name": "no truth", "context": x[0, :half], "samples": x[:, half:]},
        ],
        "imputations": [
            {"name": "song", "data": x[0], "observed": np.arange(frames) < half, "mean": 0.8 * x[0]}
        ],
        "meta": {"lowest_midi": 21, "frame_seconds": seconds},
    }


def power_run() -> dict[str, Any]:
    x = RNG.exponential(size=(3, 40, 17))
    missing = x[0].copy()
    missing[5:9] = np.nan
    return {
        "kind": "power",
        "reconstructions": [{"name": "speech", "data": missing, "mean": x[0]}],
        "samples": [x[1]],
        "forecasts": [{"name": "speech", "context": x[0, :20], "truth": x[0, 20:], "samples": x[:, 20:]}],
        "imputations": [{"name": "speech", "data": missing, "mean": x[0]}],
        "meta": {"frame_seconds": 0.016, "sample_rate": 16000},
    }


def common() -> dict[str, Any]:
    history = [
        {"epoch": e, "train/loss": 9 / (e + 1), "kl_weight": min(1, e / 3), "lr": 1e-3} for e in range(6)
    ]
    for row in history[::2]:
        row |= {"valid/loss": 10 / (row["epoch"] + 1), "valid/kl_per_frame": 0.3}
    return {
        "title": "VRNN on data",
        "setting": {
            "model": "VRNN",
            "data": "jsb",
            "parameters": 1234567,
            "options": {"z_dim": 4, "norm": None, "sizes": [64, 32], "tied": True},
            "data_sha256": "ab" * 32,
        },
        "scores": [
            {
                "bound": "iwae",
                "particles": 100,
                "nats_per_frame": 6.41234,
                "nats_per_frame_by_sequence": 6.5,
                "frames": 4725,
                "sequences": 77,
                "first_frame": True,
                "split": "test",
                "data_sha256": "cd" * 32,
                "kl": "sampled",
                "seed": 0,
            },
            {"bound": "exact", "nats_per_frame": np.float32(6.0), "split": "test", "extra": "note"},
        ],
        "history": history,
        "kl_per_dim": [0.5, 0.001, 0.2, 0.011],
        "latents": [{"mean": RNG.normal(size=(30, 4)), "stddev": np.ones((30, 4))}],
        "log": ["the first note", "the second note"],
    }


RUNS = {"real": real_run, "music": music_run, "power": power_run}


@pytest.fixture(scope="module", params=RUNS)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("report") / "new folder" / "run.html"
    assert write_report(path, **common(), **RUNS[request.param]()) == path
    return Page(path)


class TestPage:
    def test_sections_in_order_with_contents(self, page: Page) -> None:
        assert page.sections == [
            *("scores", "setting", "training", "kl", "latents"),
            *("reconstructions", "samples", "forecasts", "imputations", "notes"),
        ]
        links = [attrs["href"] for attrs in page.all("a") if (attrs["href"] or "").startswith("#")]
        assert links == [f"#{section}" for section in page.sections]
        assert page.source.startswith("<!DOCTYPE html>")
        assert page.all("html") == [{"lang": "en"}]
        assert "VRNN on data" in page.said("title")

    def test_nothing_comes_from_outside(self, page: Page) -> None:
        for address in ("http:", "https:", "//www", "url(//", "@import", "<script", "<link", "<iframe"):
            assert address not in page.source
        sources = [a[k] or "" for _, a in page.tags for k in ("src", "href", "xlink:href", "data") if k in a]
        assert sources
        assert all(source.startswith(("#", "data:")) for source in sources)

    def test_identifiers_are_unique_and_references_resolve(self, page: Page) -> None:
        identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(identifiers) == len(set(identifiers))
        used = re.findall(r"url\(#([^)]*)\)", page.source)
        used += re.findall(r'(?:xlink:href|href|aria-labelledby)="#?([^":;]*)"', page.source)
        assert used
        assert set(used) <= set(identifiers)

    def test_every_figure_has_caption_and_alternative(self, page: Page) -> None:
        figures = len(page.all("figure"))
        assert (
            figures == len(page.all("figcaption")) == len(page.all("div", role="img")) == len(page.all("svg"))
        )
        assert figures >= 9
        assert all(len(attrs["aria-label"] or "") > 30 for attrs in page.all("div", role="img"))

    def test_colours_follow_the_page(self, page: Page) -> None:
        style = page.said("style")
        assert "prefers-color-scheme: dark" in style
        drawn = set(re.findall(r"var\((--[a-z]+)\)", page.source.split("</style>")[1]))
        assert {"--blue", "--muted", "--grid"} <= drawn
        for variable in drawn:
            assert len(re.findall(rf"{variable}: #", style)) == 2, variable  # one light, one dark
        assert "#01020" not in page.source

    def test_pictures_decode(self, page: Page) -> None:
        for data in page.data("image/png"):
            Image.open(io.BytesIO(data)).load()

    def test_it_is_small(self, page: Page) -> None:
        assert len(page.source) < 6e6


def test_the_page_does_not_depend_on_when_it_is_written(tmp_path: Path) -> None:
    run = {**common(), "samples": [np.arange(12.0).reshape(6, 2)]}
    first, second = (write_report(tmp_path / f"{i}.html", **run).read_bytes() for i in range(2))
    assert first == second


class TestSettingAndScores:
    def test_scores_say_what_they_are(self, tmp_path: Path) -> None:
        page = Page(write_report(tmp_path / "a.html", title="a", kind="binary", scores=common()["scores"]))
        cells = page.said("td")
        for entry in (
            "6.4123",
            "6.5000",
            "6.0000",
            "IWAE",
            "exact log-likelihood",
            "4725",
            "mass",
            "sampled",
            "note",
        ):
            assert entry in cells
        rows = page.said("th")
        assert "test · IWAE, K = 100" in rows
        for name in (
            "particles K",
            "first frame scored",
            "seed",
            "KL, analytic or sampled",
            "data, SHA-256",
            "extra",
        ):
            assert name in rows
        assert "not stated" in page.source  # the second score leaves a lot open
        assert 'title="' + "cd" * 32 in page.source
        assert "lower is better" in page.source
        assert "6.412" in page.said("strong")

    def test_density_is_said(self, tmp_path: Path) -> None:
        score = {"nats_per_frame": -3.25}
        page = Page(write_report(tmp_path / "a.html", title="a", kind="real", scores=[score]))
        assert "may be negative" in page.source
        assert "−3.2500" in page.said("td")
        assert "density" in page.said("td")
        page = Page(write_report(tmp_path / "b.html", title="b", scores=[{**score, "measure": "mass"}]))
        assert "mass" in page.said("td")

    def test_a_score_that_is_not_finite(self, tmp_path: Path) -> None:
        scores = [{"nats_per_frame": float("nan")}, {"nats_per_frame": float("inf")}]
        page = Page(write_report(tmp_path / "a.html", title="a", scores=scores))
        assert "NaN" in page.said("td")
        assert "∞" in page.said("td")

    def test_setting(self, tmp_path: Path) -> None:
        page = Page(write_report(tmp_path / "a.html", title="a", setting=common()["setting"]))
        assert page.sections == ["setting"]
        said = page.said("dd")
        assert "1\u202f234\u202f567" in said
        assert "64, 32" in said
        assert "yes" in said
        assert "z_dim" in page.said("code")
        assert "ab" * 32 in page.said("code")

    def test_everything_is_escaped(self, tmp_path: Path) -> None:
        evil = '<script>alert("x")</script> & <b>'
        x = np.zeros((3, 2))
        path = write_report(
            tmp_path / "a.html",
            title=evil,
            setting={evil: evil, "options": {evil: [evil]}},
            scores=[{"bound": evil, "split": evil, "nats_per_frame": 1.0, evil: evil}],
            history=[{"epoch": i, evil: i} for i in range(3)],
            reconstructions=[{"name": evil, "data": x, "mean": x}],
            forecasts=[{"name": evil, "context": x, "samples": x[None]}],
            imputations=[{"name": evil, "data": x, "mean": x}],
            meta={"x_names": [evil, "日本 $x$"]},
            log=[evil],
        )
        page = Page(path)
        assert not page.all("script")
        assert not page.all("b")
        assert page.text["h1"] == [evil]
        assert evil in page.text["li"]


class TestHistory:
    def write(self, path: Path, history: list[dict[str, Any]]) -> Page:
        return Page(write_report(path / "a.html", title="a", history=history))

    def test_one_chart_per_quantity(self, tmp_path: Path) -> None:
        page = self.write(tmp_path, common()["history"])
        assert page.text["h3"] == ["loss", "KL, nats per frame", "weight of the KL", "learning rate"]
        assert "valid: from 10 to 2, smallest 2 at epoch 4" in page.said("figcaption")

    def test_ragged_rows_and_other_names(self, tmp_path: Path) -> None:
        history = [
            {"step": 10, "val_loss": 3.0, "note": "text", "flag": True},
            {"step": 20, "train_loss": torch.tensor(1.5).item()},
            {"val_loss": 9.9},  # no step: cannot be placed
            {"step": 30, "val_loss": np.float32(2.0), "grad_norm": None},
        ]
        page = self.write(tmp_path, history)
        assert page.text["h3"] == ["loss"]
        assert "train: 1.5; valid: from 3 to 2" in page.said("figcaption")

    def test_rows_without_a_clock_are_counted(self, tmp_path: Path) -> None:
        assert "by row" in self.write(tmp_path, [{"loss": 2.0}, {"loss": 1.0}]).said("figcaption")

    def test_values_that_are_not_finite_are_left_out_and_mentioned(self, tmp_path: Path) -> None:
        history = [{"epoch": 0, "loss": 2.0}, {"epoch": 1, "loss": float("nan")}, {"epoch": 2, "loss": 1.0}]
        caption = self.write(tmp_path, history).said("figcaption")
        assert "from 2 to 1. 1 value was NaN or infinite and left out." in caption

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        assert self.write(tmp_path, [{"epoch": 0, "loss": float("nan")}]).sections == []


def test_active_units_are_counted(tmp_path: Path) -> None:
    page = Page(
        write_report(tmp_path / "a.html", title="a", kl_per_dim=torch.tensor([0.5, 0.001, 0.2, 0.011]))
    )
    assert "3 active units of 4" in page.said("h3")
    assert "exceeds 0.01 nats per frame" in page.said("figcaption")
    assert "0.712 nats per frame in all" in page.said("figcaption")


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Page:
    pytest.importorskip("pretty_midi")
    return Page(write_report(tmp_path_factory.mktemp("music") / "a.html", title="a", **music_run()))


class TestMusic:
    def test_sounds_play_for_the_clip(self, song: Page) -> None:
        sounds = song.data("audio/wav")
        assert len(sounds) == len(song.all("audio")) == 2 + 2 + 3 + 2
        assert all("controls" in attrs and attrs["aria-label"] for attrs in song.all("audio"))
        for sound in sounds:
            with wave.open(io.BytesIO(sound)) as file:
                seconds = file.getnframes() / file.getframerate()
            assert seconds == pytest.approx(24 * 0.25 + music.RELEASE_SECONDS, abs=1e-3)

    def test_midi_files_hold_what_is_shown(self, song: Page) -> None:
        links = [attrs for attrs in song.all("a") if "download" in attrs]
        files = song.data("audio/midi")
        assert len(links) == len(files) == len(song.all("audio"))
        assert all(re.fullmatch(r"[\w-]+\.mid", attrs["download"] or "") for attrs in links)
        assert music.from_midi(files[0], frame_seconds=0.25).shape == (24, 88)

    def test_axes_are_named(self, song: Page) -> None:
        assert "time (s)" in song.said("text")
        assert {"C4", "G4"} <= set(song.text["text"])

    def test_long_clips_are_cut(self, tmp_path: Path) -> None:
        run = music_run(frames=400, seconds=0.25)
        path = write_report(tmp_path / "a.html", title="a", **{**run, "samples": run["samples"] * 4})
        page = Page(path)
        assert path.stat().st_size < 6e6
        assert "The first 80 of 400 frames." in page.said("figcaption")
        assert "The first 4 of 8 are shown." in page.said("p")
        for sound in page.data("audio/wav"):
            with wave.open(io.BytesIO(sound)) as file:
                assert file.getnframes() / file.getframerate() <= 20 + music.RELEASE_SECONDS

    def test_without_pretty_midi_the_page_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(music, "can_write_midi", lambda: False)
        run = {**music_run(), "forecasts": None, "imputations": None}
        page = Page(write_report(tmp_path / "a.html", title="a", **run))
        assert page.data("audio/wav")
        assert not page.data("audio/midi")
        assert "pretty_midi is not installed" in page.said("p")

    def test_binary_data_without_notes_are_rasters(self, tmp_path: Path) -> None:
        page = Page(write_report(tmp_path / "a.html", title="a", **{**music_run(), "meta": {}}))
        assert not page.all("audio")
        assert page.data("image/png")
        assert "dimension" in page.said("text")


class TestSequences:
    def test_errors_and_coverage_are_computed(self, tmp_path: Path) -> None:
        x = np.zeros((4, 1))
        observed = np.array([[True], [True], [False], [True]])
        mean = np.array([[3.0], [0.0], [7.0], [0.0]])
        samples = np.linspace(-1, 1, 101)[:, None, None] * np.ones((1, 4, 1))
        truth = np.array([[0.0], [0.5], [2.0], [np.nan]])
        run = {
            "reconstructions": [{"name": "r", "data": x, "observed": observed, "mean": mean}],
            "imputations": [{"name": "i", "data": x, "observed": observed, "mean": mean}],
            "forecasts": [{"name": "f", "context": x, "truth": truth, "samples": samples}],
        }
        said = Page(write_report(tmp_path / "a.html", title="a", **run)).said("figcaption")
        assert "Root mean squared error 1.732 over the observed values" in said  # sqrt(9 / 3)
        assert "25% of the values are missing" in said
        assert "Root mean squared error 7 over the held-out values" in said
        assert "67% of the true values lie in the 90 % band" in said

    def test_missing_values_in_the_context_and_one_frame(self, tmp_path: Path) -> None:
        x = np.array([[np.nan, 1.0]])
        run = {
            "samples": [np.zeros((1, 2))],
            "forecasts": [{"context": x, "truth": x, "samples": np.zeros((1, 1, 2))}],
            "reconstructions": [{"data": x, "mean": np.zeros((1, 2))}],
            "latents": {"mean": np.zeros((1, 3)), "stddev": np.ones((1, 3))},
        }
        page = Page(write_report(tmp_path / "a.html", title="a", **run))
        assert page.sections == ["latents", "reconstructions", "samples", "forecasts"]
        assert "forecasts[0]" in page.said("h3")

    @pytest.mark.parametrize("kind", ["real", "binary", "power", "categorical"])
    def test_nothing_observed(self, kind: str, tmp_path: Path) -> None:
        x = np.full((5, 3), np.nan)
        item = {"name": "n", "data": x, "mean": np.full((5, 3), 0.5)}
        page = Page(
            write_report(
                tmp_path / "a.html", title="a", kind=kind, imputations=[item], reconstructions=[item]
            )
        )
        assert page.sections == ["reconstructions", "imputations"]

    def test_categorical_data(self, tmp_path: Path) -> None:
        x = np.eye(3)[[0, 2, 1, 1]]
        run = {"samples": [x], "reconstructions": [{"name": "c", "data": x, "mean": x}]}
        assert (
            len(
                Page(write_report(tmp_path / "a.html", title="a", kind="categorical", **run)).data(
                    "image/png"
                )
            )
            >= 3
        )

    def test_tensors_of_several_types(self, tmp_path: Path) -> None:
        x = torch.zeros(6, 2, dtype=torch.float16, requires_grad=True)
        observed = torch.ones(6, 2, dtype=torch.bool)
        run = {
            "samples": [x],
            "reconstructions": [{"name": "t", "data": x, "observed": observed, "mean": x.double()}],
            "latents": [{"mean": x, "stddev": x}],
        }
        page = Page(write_report(str(tmp_path / "a.html"), title="a", **run))
        assert page.sections == ["latents", "reconstructions", "samples"]

    def test_the_dimensions_shown_vary_most(self) -> None:
        x = RNG.normal(size=(100, 12)) * np.arange(12)
        x[3, 4] = np.nan
        assert choose_dims([x]) == list(range(4, 12))
        gaps = np.zeros((100, 12), dtype=bool)
        gaps[:5, 1] = True
        assert 1 in choose_dims([x], gaps=gaps)


class TestBadInput:
    @pytest.mark.parametrize(
        ("run", "message"),
        [
            ({"kind": "sound"}, "kind should be one of binary, real, power, categorical; got 'sound'"),
            ({"samples": [np.zeros(88)]}, r"samples\[0\] should have shape \(T, x_dim\); got \(88,\)"),
            ({"kl_per_dim": np.zeros((2, 3))}, r"kl_per_dim should have shape \(z_dim,\); got \(2, 3\)"),
            (
                {"reconstructions": [{"name": "a", "mean": 0}]},
                r"reconstructions\[0\] has no 'data'; it has 'name'",
            ),
            (
                {"imputations": [{"data": np.zeros((3, 2)), "mean": np.zeros((2, 2))}]},
                r"imputations\[0\]\['mean'\] should have the shape of the data, \(3, 2\); got \(2, 2\)",
            ),
            (
                {"latents": {"mean": np.zeros((3, 2)), "stddev": np.zeros((3, 1))}},
                r"latents\[0\]: mean and stddev should have the same shape; got \(3, 2\) and \(3, 1\)",
            ),
            (
                {"kl_per_dim": [1.0], "latents": {"mean": np.zeros((3, 2)), "stddev": np.zeros((3, 2))}},
                r"z_dim should be the same everywhere; got kl_per_dim: 1, latents\[0\]: 2",
            ),
            (
                {"forecasts": [{"context": np.zeros((3, 2)), "samples": np.zeros((5, 3))}]},
                r"forecasts\[0\]\['samples'\] should have shape \(S, H, x_dim\); got \(5, 3\)",
            ),
            (
                {"forecasts": [{"context": np.zeros((3, 2)), "samples": np.zeros((5, 4, 3))}]},
                "context and samples should agree in x_dim; got 2 and 3",
            ),
            (
                {
                    "forecasts": [
                        {
                            "context": np.zeros((3, 2)),
                            "truth": np.zeros((3, 2)),
                            "samples": np.zeros((5, 4, 2)),
                        }
                    ]
                },
                r"truth should have shape \(H, x_dim\) = \(4, 2\); got \(3, 2\)",
            ),
            ({"samples": [np.zeros((3, 2)), np.zeros((3, 4))]}, "x_dim should be the same .*; got 2, 4"),
            (
                {"samples": [np.zeros((3, 2))], "meta": {"x_names": ["a"]}},
                r"meta\['x_names'\] should have one name for each of 2 dimensions; got 1",
            ),
            (
                {"meta": {"frame_seconds": 0}},
                r"meta\['frame_seconds'\] should be a positive number of seconds; got 0",
            ),
            (
                {"kind": "binary", "samples": [np.zeros((3, 88))], "meta": {"lowest_midi": 60}},
                r"meta\['lowest_midi'\] = 60 with 88 columns leaves MIDI's notes 0 to 127",
            ),
        ],
    )
    def test_it_is_said(self, run: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path / "a.html", title="a", **run)
        assert not (tmp_path / "a.html").exists()


class TestTheme:
    def test_settings_of_the_caller_come_back(self) -> None:
        before = dict(matplotlib.rcParams)
        with theme.theme():
            assert matplotlib.rcParams["svg.fonttype"] == "none"
        assert dict(matplotlib.rcParams) == before

    def test_pictures_are_embedded_without_loss(self) -> None:
        values = RNG.random((7, 9, 4)) * [1, 1, 1, 0] + [0, 0, 0, 1]
        values = np.round(values * 5) / 5
        with theme.theme():
            drawing = theme.figure()
            drawing.add_subplot().imshow(values, origin="upper")
            text = theme.svg(drawing, "picture")
        (encoded,) = re.findall(r"data:image/png;base64,([^\"]*)", text)
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert picture.mode == "P"
        pixels = np.asarray(picture.convert("RGBA")) / 255
        flipped = pixels[::-1] if not np.allclose(pixels, values, atol=2 / 255) else pixels
        np.testing.assert_allclose(flipped, values, atol=2 / 255)

    def test_text_stays_text(self) -> None:
        with theme.theme():
            text = theme.svg(figures.kl_bars(np.array([1.0, 0.5]), 0.01), "bars")
        assert "nats per frame</text>" in text
        assert "<style" not in text
        assert "font-family" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-3, "−3"),
        (0.0, "0"),
        (1e-9, "1e−9"),
        (123456.7, "1.235e5"),
        (6.0, "6"),
        (float("-inf"), "−∞"),
        (np.float32(0.25), "0.25"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert html.number(value) == text
