# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it refuses, what it writes."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import typer
from invoking import invoke
from PIL import Image

import vtc
from vtc import cli
from vtc.benchmarks.metrics import scores as metrics
from vtc.benchmarks.speed import kernels
from vtc.benchmarks.support import mini_families
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor
from vtc.benchmarks.tasks import items as base
from vtc.benchmarks.tasks import registry

ROOT = Path(__file__).resolve().parents[2]


def toy_task(spec: str, n: int | None, seed: int, metric: str | None = None) -> base.Questions:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8))
    questions = ("what shape ?", "is there a red circle ?")
    entries = [base.Entry(0, lambda: image, questions[i % 2], "yes", "k") for i in range(n or 3)]
    chosen = metrics.metric(metric or "one-word").name
    return base.Questions(Path(spec).stem, entries, chosen, seed)


@pytest.fixture
def toy(monkeypatch):
    """A mini random model instead of the embedded one, and toy tasks."""
    model, real = mini_llava(), registry.open_task

    def open_task(spec: str, n: int | None, seed: int, metric: str | None, data_dir: Path | None):
        known = spec in registry.TASKS or spec.endswith(".jsonl")
        if known and data_dir is None:
            return toy_task(spec, n, seed, metric)
        return real(spec, n, seed, metric=metric, data_dir=data_dir)

    monkeypatch.setattr(registry, "open_task", open_task)
    monkeypatch.setattr(cli.bench, "load", lambda *_: (model, mini_processor(model)))


def test_version():
    done = invoke("version")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"vtc {vtc.__version__}, torch ")


def test_methods_lists_the_registry():
    names = set(vtc.methods())
    done = invoke("methods", "--json")
    rows = json.loads(done.stdout)
    assert {r["name"] for r in rows} == names
    assert all(r["summary"] and r["acts"] for r in rows)
    table = invoke("methods").stdout
    assert all(name in table for name in names)


def test_models_lists_classes_that_exist_and_that_an_adapter_takes():
    families = json.loads(invoke("models", "--json").stdout)
    table = invoke("models").stdout
    for family, classes in families.items():
        assert family in table
        for name in classes:
            if ":" not in name:  # timm, open_clip
                assert hasattr(transformers, name)
                assert name in table
    tested = {family.cls for family in mini_families.EVERY.values()}
    assert tested <= {name for classes in families.values() for name in classes}


def test_every_command_has_an_example():
    for name in typer.main.get_command(cli.app).commands:
        done = invoke(name, "--help")
        assert done.exit_code == 0
        assert f"Example: vtc {name}" in done.stdout


def test_bench_prints_a_table_and_writes_its_files(toy, tmp_path):
    pytest.importorskip("matplotlib")
    done = invoke(
        *("bench", "--methods", "random,fastv", "--keep", "0.5,4", "--samples", "3"),
        *("--repeats", "1", "--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    assert "uncompressed" in done.stdout
    assert "fastv" in done.stdout
    written = {p.name for p in tmp_path.iterdir()}
    assert written == {
        f"{task}{end}"
        for task in ("easy-vqa", "scenes", "small-text")
        for end in (".json", ".predictions.jsonl", "-pareto.png", "-kept.png")
    }


def test_json_is_all_there_is_on_stdout(toy, tmp_path):
    pytest.importorskip("matplotlib")
    done = invoke(
        *("bench", "scenes", "--methods", "random", "--keep", "0.5", "--samples", "2"),
        *("--repeats", "0", "--json", "--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    (result,) = json.loads(done.stdout)
    assert result["task"] == "scenes"
    assert len(result["rows"]) == 2
    assert json.loads((tmp_path / "scenes.json").read_text()) == result
    assert result["command"].startswith("vtc")


@pytest.fixture(scope="module")
def first_case():
    return kernels.cases("cpu", torch.float32, small=True)[0]


@pytest.fixture
def energy(first_case, monkeypatch):
    """All that is timed is one kernel at 577 tokens and a small merge step."""
    step = functools.partial(kernels.merge_step, sizes=(65,), batch=2, hidden_width=32, rounds=1)
    few = [first_case]
    monkeypatch.setattr(kernels, "merge_step", step)
    monkeypatch.setattr(kernels, "cases", lambda *args, **kwargs: few)
    return few


def test_kernels_prints_its_tables(energy, tmp_path):
    done = invoke("kernels", "--json", "--out", str(tmp_path))
    assert done.exit_code == 0
    tables = json.loads(done.stdout)
    assert tables["kernels-cpu"][0]["kernel"] == "energy"
    assert float(tables["merge-step-cpu"][0]["speedup"]) > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kernels-cpu.csv", "merge-step-cpu.csv"]


def test_a_kernel_that_is_wrong_ends_in_an_error(energy, tmp_path):
    case = energy[0]
    energy[0] = replace(case, run=lambda: case.run() + 1)
    done = invoke("kernels", "--device", "cpu", "--out", str(tmp_path))
    assert done.exit_code == 2
    assert f"error: wrong results on this device: energy {case.shape}\n" == done.stderr


def test_kernels_prints_where_its_files_are(energy, tmp_path):
    done = invoke("kernels", "--device", "cpu", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    paths = f"{tmp_path / 'kernels-cpu.csv'}, {tmp_path / 'merge-step-cpu.csv'}"
    assert done.stdout.endswith(f"written: {paths}\n")


def test_bench_without_matplotlib_and_with_a_method_that_cannot_run(toy, tmp_path, monkeypatch):
    """The rest of the table and the picture are there, with a line on each of the two."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = invoke(
        *("bench", "scenes", "--methods", "evs,random", "--keep", "4", "--samples", "2"),
        *("--repeats", "0", "--out", str(tmp_path / "out[new]")),
    )
    assert done.exit_code == 0, done.output
    assert re.search(r"^evs on scenes: .*frames", done.stdout, re.M)
    assert (
        'no plot without matplotlib; pip install "visual-token-compression[bench]"' in done.stderr
    )
    names = {"scenes.json", "scenes.predictions.jsonl", "scenes-kept.png"}
    there = {str(p) for p in (tmp_path / "out[new]").iterdir()}
    assert {Path(p).name for p in there} == names
    (last,) = [x for x in done.stdout.splitlines() if x.startswith("written: ")]
    assert set(last.removeprefix("written: ").split(", ")) == there


def test_pictures_that_cannot_be_written_are_said_and_the_command_fails(toy, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "scenes-kept.png").mkdir()
    done = invoke(
        *("bench", "scenes", "--methods", "random", "--keep", "4", "--samples", "2"),
        *("--repeats", "0", "--out", str(tmp_path)),
    )
    assert done.exit_code == 1
    assert "cannot write the pictures: Is a directory" in done.stderr
    (last,) = [x for x in done.stdout.splitlines() if x.startswith("written: ")]
    assert "scenes.json" in last and "png" not in last


def test_a_broken_installation_is_no_mistake_of_the_caller(monkeypatch):
    """No extra would bring the module back, so the traceback stays."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = invoke("version")
    assert isinstance(done.exception, ImportError) and done.exception.name == "transformers"
    assert "pip install" not in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_clear_line(toy):
    done = invoke("bench", "scenes", "--device", "cuda")
    assert done.exit_code == 2
    assert done.stderr == "error: no CUDA device is available; use --device cpu\n"


def test_a_dtype_that_is_none_is_one_clear_line():
    done = invoke("bench", "scenes", "--dtype", "int8")
    assert done.exit_code == 2
    assert done.stderr == 'error: unknown dtype "int8"; use float32, bfloat16, float16\n'


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["bench", "--methods", "fastvv"], "fastv"),
        (["bench", "--keep", "1.5"], "(0, 1]"),
        (["bench", "--keep", "many"], "many"),
        (["bench", "nonsense"], "easy-vqa"),
        (["bench", "--device", "warp"], "warp"),
        (["bench", "--metric", "nonsense"], "one-word"),
        (["bench", "scenes", "--data-dir", "."], "scenes takes no data_dir"),
        (["bench", "a/test.jsonl", "b/test.jsonl"], "--out"),
    ],
)
def test_mistakes_are_one_clear_line(toy, args, says):
    done = invoke(*args)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert "Traceback" not in done.output


def test_a_file_that_the_system_refuses_is_one_clear_line():
    done = invoke("bench", "x" * 300 + ".jsonl")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: xxx")
    assert done.stderr.endswith("xxx.jsonl: File name too long\n")
    assert done.stderr.count("\n") == 1


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path):
    done = invoke("bench", "scenes", "--model", str(tmp_path / "nothing"))
    assert done.exit_code == 2
    assert done.stderr.startswith("error: cannot load")
    assert done.stderr.count("\n") == 1


def test_full_runs_every_method(toy, tmp_path, monkeypatch):
    seen = {}

    def run(model, processor, task, items, metric, settings, progress, **_):
        seen[task] = (len(items), settings)
        raise cli.common.Mistake("enough")

    monkeypatch.setattr("vtc.benchmarks.accuracy.run.run", run)
    invoke("bench", "scenes", "--full", "--out", str(tmp_path))
    count, settings = seen["scenes"]
    assert count >= 500
    assert set(settings.methods) == set(vtc.methods())


def test_block_of_the_results_page_is_filled(toy, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("docs/results.md").write_text("a\n<!-- results:begin -->\n<!-- results:end -->\nb\n")
    args = ("bench", "scenes", "--methods", "random", "--keep", "4", "--samples", "2")
    done = invoke(*args, "--repeats", "1", "--readme")
    assert done.exit_code == 0, done.output
    text = Path("docs/results.md").read_text()
    assert "| random |" in text
    assert text.startswith("a\n")
    assert text.endswith("b\n")


def test_a_metric_can_be_chosen(toy, tmp_path):
    args = ("bench", "own.jsonl", "--methods", "random", "--keep", "4", "--repeats", "0")
    done = invoke(*args, "--metric", "ocr", "--json", "--out", str(tmp_path))
    (result,) = json.loads(done.stdout)
    assert result["metric"] == "ocr"
    assert result["questions"] == 3  # your own data is asked whole
    assert (tmp_path / "own.json").exists()


def test_an_unfinished_run_of_other_settings_is_a_mistake_and_fresh_starts_over(toy, tmp_path):
    args = ("bench", "scenes", "--methods", "random", "--keep", "4", "--samples", "2")
    args = (*args, "--repeats", "0", "--json", "--out", str(tmp_path))
    assert invoke(*args).exit_code == 0
    book = tmp_path / "scenes.predictions.jsonl"
    book.write_text(book.read_text().replace('"open": false', '"open": true'))
    done = invoke(*args, "--seed", "1")
    assert done.exit_code == 2 and done.stdout == ""
    assert "settings.seed was 0, is 1" in done.stderr and "--fresh" in done.stderr
    assert invoke(*args, "--seed", "1", "--fresh").exit_code == 0


def test_progress_on_no_terminal_is_a_line_every_half_minute(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(cli.common.time, "monotonic", lambda: now[0])
    with cli.common.ProgressBar("scenes", quiet=False) as progress:
        for done in range(10, 101):  # ten of a hundred steps were done by an earlier run
            progress("fastv, 64", done, 100)
            now[0] += 2.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scenes ..."
    assert lines[1] == "scenes: 25/100 (25%), about 0:02:30 left; fastv, 64"
    assert len(lines) == 1 + 180 // 30
    with cli.common.ProgressBar("scenes", quiet=True) as progress:
        progress("fastv, 64", 1, 2)
        now[0] += 100
        progress("fastv, 64", 2, 2)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_estimates_the_time_that_remains():
    bar = cli.common.ProgressBar("scenes", quiet=False).bar
    assert any(isinstance(c, cli.common.TimeRemainingColumn) for c in bar.columns)


def test_python_dash_m_vtc_cli_and_the_console_script():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vtc.cli", "version"]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "vtc" in done.stdout


@pytest.mark.slow
def test_the_embedded_model_answers_from_the_command_line(tmp_path):
    pytest.importorskip("matplotlib")
    done = invoke(
        *("bench", "scenes", "--methods", "divprune,random", "--keep", "0.11"),
        *("--samples", "24", "--repeats", "1", "--json", "--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    base, *rows = json.loads(done.stdout)[0]["rows"]
    assert base["final_tokens"] == 576
    assert base["accuracy"] > base["blank_accuracy"]
    assert all(r["final_tokens"] == 64 for r in rows)
