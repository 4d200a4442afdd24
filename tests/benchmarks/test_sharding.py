# SPDX-License-Identifier: Apache-2.0
"""Several gloo processes give the predictions, metrics and files of one, and fail together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mini_bench import (
    MODEL,
    PROCESSOR,
    bench,
    command,
    comparable,
    in_world,
    predictions,
    shared_bench,
    wait_for_lines,
)
from typer.testing import CliRunner

from vtc import cli

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    bench(folder)
    return folder


def same_files(a: Path, b: Path) -> None:
    assert predictions(a).read_bytes() == predictions(b).read_bytes()
    assert comparable(a / "toy.json") == comparable(b / "toy.json")
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}


def test_two_processes_give_the_files_of_one(tmp_path, alone):
    one, two = [process.answer() for process in in_world(shared_bench, 2, tmp_path)]
    same_files(tmp_path, alone)
    assert one["machine"]["processes"] == 2
    assert one["rows"][1]["final_tokens"] == 8 and two["rows"][1]["final_tokens"] is None
    for a, b in zip(one["rows"], two["rows"]):
        assert a["accuracy"] == b["accuracy"] and a["kl"] == b["kl"]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_killed_run_goes_on_with_another_number_of_processes(tmp_path, alone, before, after):
    processes = in_world(shared_bench, before, tmp_path, 0.05)
    wait_for_lines(tmp_path, 40)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert not (tmp_path / "toy.json").exists()
    for process in in_world(shared_bench, after, tmp_path):
        assert process.answer()["finished"]
    same_files(tmp_path, alone)


def test_an_error_in_one_process_ends_all(tmp_path, alone):
    """Images 2 and 3 are those of the second batch, which is process 1's."""
    one, two = [process.answer() for process in in_world(shared_bench, 2, tmp_path, 0.0, (2,))]
    assert two == "RuntimeError: image 2 is fatal"
    assert one == "LostError: process 1 of 2 has failed: RuntimeError: image 2 is fatal"
    left = [json.loads(x) for x in predictions(tmp_path).read_text().splitlines()[1:]]
    assert [x["index"] for x in left] == [0, 11, 1, 12]  # what the other one had answered
    bench(tmp_path)
    same_files(tmp_path, alone)


def test_a_process_that_dies_ends_the_others(tmp_path, alone):
    one, two = in_world(shared_bench, 2, tmp_path, 0.05)
    wait_for_lines(tmp_path, 40)
    two.kill()
    assert one.answer().startswith("LostError: another process of this run is gone")
    bench(tmp_path)
    same_files(tmp_path, alone)


def test_an_interrupt_of_one_process_stops_all_with_a_partial_result(tmp_path, alone):
    one, two = in_world(shared_bench, 2, tmp_path, 0.05)
    wait_for_lines(tmp_path, 80)
    os.kill(two.pid, signal.SIGINT)
    first, second = one.answer(), two.answer()
    assert first["finished"] is second["finished"] is False
    written = json.loads((tmp_path / "toy.json").read_text())
    assert 0 < written["questions"] == first["questions"] < 22
    assert [r["accuracy"] for r in written["rows"]] == [r["accuracy"] for r in first["rows"]]
    bench(tmp_path)
    same_files(tmp_path, alone)


def test_an_interrupt_of_one_process_stops_the_command_in_all(tmp_path):
    args = ["toy", "next", "--methods", "random", "--keep", "4", "--repeats", "0"]
    args += ["--batch-size", "2", "--device", "cpu", "--fresh", "--out", str(tmp_path)]
    one, two = in_world(command, 2, args, None, 0.05)
    wait_for_lines(tmp_path, 20)
    os.kill(two.pid, signal.SIGINT)
    code, out, err = one.answer()
    assert code == 130 and "uncompressed" in out
    assert "stopped; to go on: vtc bench toy next --methods" in err and "--fresh" not in err
    assert two.answer()[:2] == (130, "")  # only the first one prints
    assert not list(tmp_path.glob("next*"))


@pytest.mark.slow
def test_accelerate_launch_runs_the_command(tmp_path):
    """The whole way: launcher, command line, a model from a folder; only one prints."""
    MODEL.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    args = ["bench", "scenes", "--model", str(tmp_path / "model"), "--json"]
    args += ["--methods", "random", "--keep", "4", "--samples", "20", "--batch-size", "5"]
    args += ["--repeats", "0", "--device", "cpu", "--out"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    shared = subprocess.run(
        [sys.executable, *launch, "--module", "vtc.cli", *args, str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert shared.returncode == 0, shared.stderr
    alone = CliRunner().invoke(cli.app, [*args, str(tmp_path / "one")])
    found = []
    for name, done, count in (("one", alone, 1), ("two", shared, 2)):
        (result,) = json.loads(done.stdout)
        assert result["questions"] == 20 and result["finished"]
        assert result["machine"]["processes"] == count
        assert comparable(tmp_path / name / "scenes.json") == comparable(result)
        predicted = (tmp_path / name / "scenes.predictions.jsonl").read_bytes()
        found.append((comparable(result), predicted))
    assert found[0] == found[1]
