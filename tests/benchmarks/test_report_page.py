# SPDX-License-Identifier: Apache-2.0
"""`vtc report`: everything in the files is on the page, nothing in them gets out of its place."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vtc import cli
from vtc.benchmarks.pages import html as page
from vtc.benchmarks.pages import kinds as report_kinds
from vtc.benchmarks.pages import parts as report_parts
from vtc.benchmarks.pages import plots
from vtc.benchmarks.pages import read as report

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
NASTY = "\"><script>alert('x')</script><img src=https://e.vil/ onerror=x> | $\\bad{ & `_*[a](b)"

COMMON: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "vtc bench scenes --model https://example.org/model",
    "settings": {"seed": 0, "keep": ["1/3", "1/9"]},
    "versions": {"python": "3.11", "torch": "2.14"},
    "machine": {"cpu": "a processor", "cores": 2},
    "finished": True,
}


def task_row(method: str, tokens: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "stages": [],
        "asked_tokens": tokens,
        "parameters": f"{method}(keep_ratio={tokens / 9})",
        "final_tokens": float(tokens),
        "flops_all_g": tokens / 10,
        "prefill_ms": 5.0 + tokens,
        "prefill_ratio": 0.5,
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.02,
        "accuracy_high": accuracy + 0.02,
        "accuracy_by_kind": {"colour": accuracy, "shape": 1.0},
        "summary": {"f1": 0.123},
        "kl": 0.0312,
        "agreement": 0.987,
        "error": None,
        **more,
    }


def task(**more: Any) -> dict[str, Any]:
    return {
        **COMMON,
        "benchmark": "task",
        "task": "scenes",
        "questions": 77,
        "images": 9,
        "visual_tokens": 9,
        "model": {"name": "toy", "dtype": "float32"},
        "skipped": [{"where": "f.jsonl:17", "why": "no such image"}],
        "rows": [
            task_row("uncompressed", 9, 0.9, blank_accuracy=0.21),
            task_row(NASTY, 3, 0.8),
            task_row(NASTY, 1, 0.4),
            task_row("random", 3, 0.7),
            {"method": "refused", "asked_tokens": 3, "error": "it takes <no> images"},
        ],
        **more,
    }


def recall(value: float) -> dict[str, Any]:
    return {d: dict.fromkeys(("1", "5", "10"), value) for d in ("image_to_text", "text_to_image")}


def retrieval() -> dict[str, Any]:
    row = {"asked_tokens": 4, "flops_share": 0.5, "encode_ms": 3.0, "error": None}
    rows = [
        {
            **row,
            "method": name,
            "final_tokens": n,
            "recall": recall(value),
            "recall_low": recall(value - 0.1),
            "recall_high": recall(value + 0.1),
        }
        for name, n, value in (("uncompressed", 9, 0.625), ("tome", 4, 0.5))
    ]
    return {**COMMON, "benchmark": "retrieval", "task": "pairs", "captions": 5, "rows": rows}


def classification() -> dict[str, Any]:
    rows = [
        {"method": name, "final_tokens": n, "accuracy": value, "top5": 0.875, "error": None}
        for name, n, value in (("uncompressed", 9, 0.75), ("pitome", 4, 0.7))
    ]
    return {**COMMON, "benchmark": "classification", "task": "folders", "rows": rows}


def calibration(finished: bool = True) -> dict[str, Any]:
    def point(ratio: float, kl: float, loss: float) -> tuple[dict, dict]:
        at = {"keep_ratio": ratio, "final_tokens": 9 * ratio, "flops_share": ratio}
        at |= {"kl": kl, "kl_low": kl / 2, "kl_high": 2 * kl, "agreement": 1 - kl}
        at |= {"promised_loss": kl + 0.05, "promised_shift": kl**0.5}
        held = {"keep_ratio": ratio, "accuracy": 0.9 - loss, "loss": loss}
        return at, held | {"loss_low": loss - 0.01, "loss_high": loss + 0.01, "agreement": 0.5}

    points = [point(1.0, 0.001, 0.0), point(0.5, 0.05, 0.013), point(0.25, 0.4, 0.3)]
    row = {
        "method": "fastv",
        "error": None,
        "max_divergence": 0.2,
        "samples": 64,
        "curve": [p for p, _ in points],
        "held_out": [h for _, h in points],
        "chosen": points[1][0],
    }
    bad = {"method": "mod", "error": "needs routers"}
    return {
        **COMMON,
        "benchmark": "calibration",
        "task": "scenes",
        "rows": [row, bad],
        "finished": finished,
    }


def speed() -> dict[str, Any]:
    row = {"method": "fastv(k=2)", "ttft_ms": 12.34, "ttft_speedup": 0.91, "pays": False}
    lost = {"method": "fastv(k=2)", "title": "a decoder", "ttft_speedup": 0.91, "words": "words"}
    stock = {"method": "uncompressed", "ttft_ms": 11.2, "error": None}
    part = {"title": "a decoder", "error": None, "rows": [stock, {**row, "error": None}]}
    late = {"title": "a large one", "error": "out of memory", "rows": []}
    return {**COMMON, "benchmark": "speed", "parts": [part, late], "does_not_pay": [lost]}


ALL = {
    "task": task,
    "retrieval": retrieval,
    "classification": classification,
    "calibration": calibration,
    "speed": speed,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of every kind, with an overlay, and files that are none."""
    out = tmp_path_factory.mktemp("in")
    (out / "empty").mkdir()
    for name, make in ALL.items():
        (out / f"{name}.json").write_text(json.dumps(make()))
    Image.new("RGB", (2000, 50), "red").save(out / "task-kept.png")
    (out / "speed-kept.png").write_text("no picture")
    (out / "broken.json").write_text("{")
    (out / "list.json").write_text("[1, 2]")
    (out / "other.json").write_text(json.dumps({"benchmark": "<b>unknown</b>", "rows": []}))
    return out


class Tags(HTMLParser):
    """Tags with their attributes, and the text of the cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "tr"):
            self.inside = tag
            self.rows += [[]] if tag == "tr" else []
            if tag == "td":
                self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == "td" else self.inside

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.inside == "td":
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tags, str, str]:
    pytest.importorskip("matplotlib")
    (html, text), refused = page.write([folder], tmp_path_factory.mktemp("out"))
    assert {Path(where).name for where, _ in refused} == {"broken.json", "list.json", "other.json"}
    return Tags(html.read_text("utf-8")), html.read_text("utf-8"), text.read_text("utf-8")


def test_every_row_is_on_the_page(written: Any) -> None:
    tags, _, text = written
    cells = {cell for row in tags.rows for cell in row}
    found = [row for row in tags.rows if row and row[0] == NASTY]
    assert len(found) == 4  # two budgets, in two tables
    assert found[0][1:4] == ["3", "3", "80.0 (78.0 to 82.0)"]
    assert {"uncompressed", "random", "tome", "pitome", "fastv(k=2)"} <= cells
    for value in (
        "98.7",
        "0.031",
        "62.5 (52.5 to 72.5)",
        "87.5",
        "12.3",
        "0.91x",
        "1.3 (0.3 to 2.3)",
    ):
        assert value in cells, value
        assert value in text, value
    for words in (
        *("f.jsonl:17: no such image", "refused: not run: it takes <no> images", "77 questions"),
        *("mod: not run: needs routers", "a large one: not measured: out of memory"),
        *("A blank image scores 21.0 %", "Where it does not pay", "keep 1/3 1/9", "torch 2.14"),
        *("vtc bench scenes --model https://example.org/model", "cores 2", "a processor"),
        "fastv: at keep_ratio 0.5000 held-out questions lost 1.3 points, within the 10.0",
        "<b>unknown</b>",
    ):
        assert words in tags.words, words


def test_nothing_is_loaded_and_no_name_becomes_markup(written: Any) -> None:
    tags, html, text = written
    assert [tag for tag, _ in tags.tags].count("script") == 1
    for tag, attributes in tags.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "meta http-equiv")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert re.match(r"#|data:image/jpeg;base64,", value or ""), (tag, name, value)
            if name == "style":
                assert not re.search(r"url\((?!#)", value or "")
    assert "alert('x')</script>" not in html.replace("&#39;", "'")
    assert "@import" not in html and "xmlns" not in html
    assert not re.search(r"url\(['\"]?(?!#)[a-z/]", html)
    assert "<script>" not in text and "<img" not in text


def test_the_drawings_are_part_of_the_page(written: Any) -> None:
    tags, html, _ = written
    drawings = [tag for tag, _ in tags.tags].count("svg")
    assert drawings == 3 + 3 + 1 + 2  # task, retrieval, classification, calibration
    assert "currentColor" in html and "#000000" not in html
    assert html.count("data:image/jpeg;base64,") == 1  # the broken picture is left out
    assert NASTY in tags.words


def test_markdown_tables_have_as_many_cells_as_columns(written: Any) -> None:
    _, _, text = written
    lines = [line for line in text.splitlines() if line.startswith("|")]
    widths = []
    for line, following in pairwise(lines):
        width = len(re.findall(r"(?<!\\)\|", line))
        if set(following) <= set("|-: "):
            widths.append(width)
        assert width == widths[-1], line
    assert len(widths) == 1 + 2 + 1 + 1 + 1 + 2  # overview, task, one each, speed with losses
    assert page.escaped(NASTY) in text
    assert page.escaped("a\nb|<c>") == r"a b\|&lt;c&gt;"


def test_writing_again_gives_the_same(written: Any, folder: Path, tmp_path: Path) -> None:
    (html, text), _ = page.write([folder], tmp_path)
    assert (html.read_text("utf-8"), text.read_text("utf-8")) == written[1:]


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    file = tmp_path / "calibration-scenes.json"
    file.write_text(json.dumps(calibration(finished=False)))
    (section,) = report.sections(report.read([file])[0])
    assert section.title == "calibration: scenes"
    assert section.notes[0].startswith("Not finished")
    assert section.brief["state"] == "not finished"


def test_a_file_that_lacks_something_costs_only_its_section(tmp_path: Path) -> None:
    short = task(rows=[{"method": "a", "recall": 3}, {"nothing": 1}], task="short")
    (tmp_path / "a.json").write_text(json.dumps(short))
    (tmp_path / "b.json").write_text(json.dumps({**calibration(), "rows": [{"method": "odd"}]}))
    (tmp_path / "c.json").write_text(json.dumps(retrieval()))
    found = report.sections(report.read([tmp_path])[0])
    assert [len(s.tables) for s in found] == [1, 1, 0]
    assert "cannot be shown: KeyError('chosen')" in found[2].notes[-1]
    assert "tome" in page.html(found)


def test_without_matplotlib_the_tables_are_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (html, _), _ = page.write([folder], tmp_path / "out")
    text = html.read_text("utf-8")
    assert "<svg" not in text
    assert "matplotlib is missing" in text
    assert "98.7" in text


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an installed copy has no results")
def test_the_results_of_this_repository(tmp_path: Path) -> None:
    """Files of every age are shown whole."""
    pytest.importorskip("matplotlib")
    found, refused = report.read([RESULTS])
    assert not refused
    made = report.sections(found)
    assert len(made) == len(list(RESULTS.glob("*.json")))
    by_file = {section.source: section for section in made}
    for path, result in found:
        section = by_file[str(path)]
        assert not any("cannot be shown" in note for note in section.notes), section.notes
        rows = result.get("rows") or [r for part in result["parts"] for r in part["rows"]]
        shown = " ".join(section.notes)
        shown += " ".join(c.text for t in section.tables for line in t.rows for c in line)
        shown += " ".join(t.title for t in section.tables)
        for row in rows:
            assert report_parts.rounded(row["method"]).split(":")[0] in shown, row["method"]


def test_where_it_does_not_pay_in_results_without_a_verdict() -> None:
    rows = [
        {"method": "slow(a=1)", "measured": 2.0, "whole_measured": 0.8},
        {"method": "fast(a=1)", "measured": 1.5, "whole_measured": 1.2},
        {"method": "tower", "measured": 0.7},
        {"method": "(stock model, prompt of 3 text tokens)", "measured": 0.5},
    ]
    found = report_kinds.where_it_does_not_pay({"parts": [{"title": "here", "rows": rows}]})
    assert [(r["method"], r["measured"]) for r in found] == [("slow(a=1)", 0.8), ("tower", 0.7)]


# ---- fronts
# ---------------------------------------------------------------------------------------


def test_the_front_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(p) for p in rng.integers(0, 8, (12, 2)).tolist()]

        def beaten(i: int, points: list = points) -> bool:
            x, y = points[i]
            return any(
                (a <= x and b >= y and (a, b) != (x, y)) or ((a, b) == (x, y) and j < i)
                for j, (a, b) in enumerate(points)
            )

        want = [i for i in range(12) if not beaten(i)]
        got = plots.optimal(points)
        assert sorted(got) == want
        assert [points[i][0] for i in got] == sorted(points[i][0] for i in got)
    assert plots.optimal([]) == []


def test_of_many_methods_those_on_a_front_get_a_colour() -> None:
    rows = [task_row("uncompressed", 9, 0.95)]
    rows += [task_row(f"m{i}", 3, 0.5 + i / 100) for i in range(12)] + [task_row("random", 3, 0.1)]
    assert plots.names_of(rows, ["final_tokens"]) == ["m11", "random"]
    assert plots.names_of(rows[:4], ["final_tokens"]) == ["m0", "m1", "m2"]


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = task()
    result["rows"][1]["method"] = result["rows"][2]["method"] = "_$x$"
    for i, path in enumerate(
        (
            plots.pareto(result, tmp_path / "new" / "pareto.png"),
            plots.calibration_plot(calibration(), tmp_path / "calibration.png"),
        )
    ):
        with Image.open(path) as image:
            assert image.width > 400 * (2 - i)
    with pytest.raises(ValueError, match="no method could be calibrated on scenes"):
        plots.calibration_plot({**calibration(), "rows": [{"error": "no"}]}, tmp_path / "x.png")


# ---- the command
# ----------------------------------------------------------------------------------


def test_the_command(folder: Path, tmp_path: Path) -> None:
    target, files = tmp_path / "out", [str(folder / f"{n}.json") for n in ("speed", "broken")]
    done = CliRunner().invoke(cli.app, ["report", *files, "--out", str(target)])
    assert done.exit_code == 0, done.output
    assert {p.name for p in target.iterdir()} == {"report.html", "report.md"}
    assert "not read: " in done.stderr and "broken.json" in done.stderr


@pytest.mark.parametrize("what", ["nothing.json", "empty", "list.json"])
def test_nothing_to_report_is_one_clear_line(folder: Path, what: str) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(folder / what), "--out", str(folder)])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: nothing to report: ") and what in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("rows", [None, {}, [1]])
def test_a_result_without_rows_is_not_read(tmp_path: Path, rows: Any) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({"benchmark": "retrieval", "rows": rows}))
    done = CliRunner().invoke(
        cli.app, ["report", str(tmp_path / "bad.json"), "--out", str(tmp_path)]
    )
    assert done.exit_code == 2
    assert done.stderr.endswith("bad.json: no result file: no rows\n")


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(
        cli.app, ["report", str(folder / "speed.json"), "--out", str(tmp_path / "file")]
    )
    assert done.exit_code == 2
    assert done.stderr.startswith("error: cannot write")
