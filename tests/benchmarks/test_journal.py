# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, interrupted or out of disk loses nothing that it can keep."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mini_bench import (
    METRIC,
    MODEL,
    PROCESSOR,
    SETTINGS,
    Toy,
    bench,
    command,
    comparable,
    predictions,
    slow_bench,
    start,
    wait_for_lines,
    waiting,
)

from vtc.benchmarks.accuracy import evaluation, journal
from vtc.benchmarks.accuracy import plan as plans
from vtc.benchmarks.accuracy import run as runner
from vtc.benchmarks.accuracy.distributed import Interrupts, World
from vtc.benchmarks.accuracy.journal import Journal, JournalError
from vtc.benchmarks.metrics import scores as metrics

QUICK = replace(SETTINGS, methods=("random",), keep=(4,))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    bench(folder)
    return folder


def same_files(a: Path, b: Path) -> None:
    assert comparable(a / "toy.json") == comparable(b / "toy.json")
    assert predictions(a).read_bytes() == predictions(b).read_bytes()
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}


def unfinished(folder: Path, whole: Path, lines: int, torn: str = "") -> None:
    """Write the files that a kill leaves after so many lines of a run."""
    folder.mkdir(exist_ok=True)
    first, *rest = predictions(whole).read_text().splitlines(keepends=True)
    header = {**json.loads(first), "open": True}
    predictions(folder).write_text(json.dumps(header) + "\n" + "".join(rest[:lines]) + torn)


@pytest.mark.parametrize("answers", [1, 17, 60])
def test_a_killed_process_goes_on_from_its_last_answer(tmp_path, whole, answers):
    process = start(slow_bench, tmp_path, 0.05)
    wait_for_lines(tmp_path, answers)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "toy.json").exists()
    left = predictions(tmp_path).read_text().splitlines()
    told: list[str] = []
    bench(tmp_path, say=told.append)
    same_files(tmp_path, whole)
    (note,) = told
    assert f"{len(left) - 1} answers are there" in note


@pytest.mark.parametrize("lines", [0, 3, 4, 30, 175])
@pytest.mark.parametrize("torn", ["", '{"configuration": "fastv(keep'])
def test_it_goes_on_from_any_line_and_drops_a_torn_one(tmp_path, whole, lines, torn):
    unfinished(tmp_path, whole, lines, torn)
    asked: list[str] = []
    bench(tmp_path, progress=lambda text, done, total: asked.append(text))
    same_files(tmp_path, whole)
    # Of 6 batches x 8 configurations; the stock model answers a batch again that is not complete.
    assert len(asked) - 2 == {0: 48, 3: 48, 4: 48, 30: 42, 175: 2}[lines]


def test_no_answer_is_asked_for_twice(tmp_path, whole, monkeypatch):
    """All but one: the batch of this one is asked again, of this configuration and of the stock
    model with which it is compared."""
    unfinished(tmp_path, whole, 175)
    asked = []
    real = evaluation.answer
    count = lambda *args, **kw: (asked.append(len(args[2].items)), real(*args, **kw))[1]  # noqa: E731
    monkeypatch.setattr(evaluation, "answer", count)
    bench(tmp_path)
    assert asked == [2, 2]
    same_files(tmp_path, whole)


@pytest.mark.parametrize("left", [b"", b'{"task": "toy", "finge'])
def test_a_run_killed_while_it_wrote_its_first_line_starts_anew(tmp_path, whole, left):
    predictions(tmp_path).write_bytes(left)
    bench(tmp_path)
    same_files(tmp_path, whole)


def test_skipped_questions_stay_skipped_when_a_run_goes_on(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    bench(whole, Toy(bad=(2,)), QUICK)
    unfinished(again, whole, 15)  # its batch is not done
    task = Toy(bad=(2,))
    result = bench(again, task, QUICK)
    assert 2 not in task.loaded
    assert len(result["skipped"]) == 2
    same_files(again, whole)


def test_an_unfinished_run_of_other_settings_is_left_alone(tmp_path, whole):
    unfinished(tmp_path, whole, 20)
    before = predictions(tmp_path).read_bytes()
    other = replace(SETTINGS, seed=1, methods=("fastv",))
    with pytest.raises(JournalError) as error:
        bench(tmp_path, settings=other)
    text = str(error.value)
    assert "settings.seed was 0, is 1" in text and "settings.methods was" in text
    assert "--fresh" in text and "batch_size" not in text
    assert predictions(tmp_path).read_bytes() == before
    result = bench(tmp_path, settings=other, fresh=True)
    assert result["finished"]
    first = json.loads(predictions(tmp_path).read_text().splitlines()[0])
    assert first["settings"]["seed"] == 1 and not first["open"]


def test_other_questions_weights_or_code_are_other_settings(tmp_path, whole, monkeypatch):
    unfinished(tmp_path, whole, 20)
    task = Toy()
    task.fingerprint = "other"
    with pytest.raises(JournalError, match=r"\(fingerprint was \w+, is other\)"):
        bench(tmp_path, task)
    other = copy.deepcopy(MODEL)
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(JournalError, match=r"\(model.weights was"):
        runner.run(other, PROCESSOR, "toy", Toy(), METRIC, SETTINGS, out=tmp_path)
    monkeypatch.setattr(plans, "_source", lambda: "edited")
    with pytest.raises(JournalError, match=r"\(vtc.source was \w+, is edited\)"):
        bench(tmp_path)


def test_more_timed_rounds_are_no_other_settings(tmp_path, whole):
    unfinished(tmp_path, whole, 100)
    result = bench(tmp_path, settings=replace(SETTINGS, repeats=1))
    assert result["rows"][0]["prefill_ms"] > 0
    assert predictions(tmp_path).read_bytes() == predictions(whole).read_bytes()


def test_a_finished_run_starts_anew_and_says_so(tmp_path):
    told: list[str] = []
    one = bench(tmp_path, settings=QUICK)
    task = Toy()
    two = bench(tmp_path, task, QUICK, say=told.append)
    assert comparable(one) == comparable(two)  # the same seed, the same figures
    assert len(task.loaded) == 11  # and they were measured again
    (note,) = told
    assert "finished run and will be replaced" in note


def test_a_task_that_is_done_is_not_asked_again_until_all_are(tmp_path, whole):
    """A command of several tasks that is killed in the last goes on with the last."""
    bench(tmp_path, more=True)
    assert json.loads((tmp_path / "toy.json").read_text())["finished"]
    asked: list[str] = []
    bench(tmp_path, more=True, progress=lambda text, done, total: asked.append(text))
    assert set(asked) == {"timing"}
    before = predictions(tmp_path).stat().st_size
    journal.seal(predictions(tmp_path))
    assert predictions(tmp_path).stat().st_size == before
    same_files(tmp_path, whole)


@pytest.mark.parametrize(
    ("content", "number"),
    [('{"a": 1}\n', 1), ("shopping list\n", 1), ('{"open": true}\n{"index": 0\n{}\n', 2)],
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content, number):
    predictions(tmp_path).write_text(content)
    with pytest.raises(JournalError, match=rf"jsonl:{number} is no line .*--fresh"):
        bench(tmp_path, settings=QUICK)
    assert predictions(tmp_path).read_text() == content


def test_a_folder_that_cannot_be_written_to_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"cannot write .*; give another --out"):
        bench(tmp_path / "file" / "out", settings=QUICK)


# ---- a full disk --------------------------------------------------------------------------------


def test_a_full_disk_is_told_once_and_nothing_is_lost(tmp_path, monkeypatch, whole):
    real, written = journal._write, []

    def full_after_five(file, data):
        written.append(data)
        if len(written) > 5:
            file.write(data[:10])  # a part of it still fits
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    monkeypatch.setattr(journal, "_write", full_after_five)
    final = Path.open

    def no_new_file(path, *args, **kwargs):
        if path.name.endswith(".new"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return final(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", no_new_file)
    told: list[str] = []
    result = bench(tmp_path, say=told.append)
    assert len([t for t in told if "predictions.jsonl: No space left" in t]) == 1
    assert [Path(x["where"]).name for x in result["unwritten"]] == [
        "toy.predictions.jsonl",
        "toy.json",
    ]
    assert {x["why"] for x in result["unwritten"]} == {"No space left on device"}
    expected = comparable(whole / "toy.json")
    assert {**comparable(json.loads(json.dumps(result))), "unwritten": []} == expected
    assert {p.name for p in tmp_path.iterdir()} == {"toy.predictions.jsonl"}

    monkeypatch.undo()  # somebody made room
    bench(tmp_path)
    same_files(tmp_path, whole)


def test_room_on_the_disk_again_at_the_end_heals_the_file(tmp_path, monkeypatch, whole):
    real, written = journal._write, []

    def full_once(file, data):
        written.append(data)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    monkeypatch.setattr(journal, "_write", full_once)
    result = bench(tmp_path)
    assert result["unwritten"] == []
    same_files(tmp_path, whole)


def test_the_command_on_a_full_disk_prints_what_it_cannot_write(tmp_path):
    args = ("toy", "--methods", "random", "--keep", "4", "--repeats", "0", "--batch-size", "4")
    args = [*args, "--json", "--out", str(tmp_path)]
    process = start(command, args, 1500)
    code, out, err = process.answer()
    assert code == 1
    (result,) = json.loads(out)
    assert result["finished"] and result["questions"] == 22
    assert all(row["accuracy"] is not None for row in result["rows"])
    assert {Path(x["where"]).name for x in result["unwritten"]} == {
        "toy.json",
        "toy.predictions.jsonl",
    }
    assert err.count("cannot write") == 3 and "Traceback" not in err  # and the pictures
    assert predictions(tmp_path).stat().st_size <= 1500
    assert not (tmp_path / "toy.json").exists()


# ---- Ctrl-C -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def interrupted(request, tmp_path_factory):
    """A folder in which the command was interrupted, its arguments, and how it ended."""
    folder = tmp_path_factory.mktemp("interrupted")
    args = ["toy", "--methods", "fastv,random", "--keep", "4", "--repeats", "0"]
    args += ["--batch-size", "4", "--out", str(folder)]
    process = start(command, args, None, 0.05)
    wait_for_lines(folder, 30)
    os.kill(process.pid, request.param)
    return folder, args, process.answer()


def test_an_interrupt_leaves_a_partial_result_and_says_how_to_go_on(interrupted):
    folder, _, (code, out, err) = interrupted
    assert code == 130
    result = json.loads((folder / "toy.json").read_text())
    assert result["finished"] is False
    assert 0 < result["questions"] < 22 and result["questions"] % 4 == 0
    assert f"stopped early, {result['questions']} of 22 questions" in err
    assert "stopped; to go on: vtc" in err and "Traceback" not in err
    assert "uncompressed" in out and "fastv" in out  # the table of what is there
    answered = [json.loads(x) for x in predictions(folder).read_text().splitlines()[1:]]
    for row in result["rows"]:
        key = row["parameters"] or row["method"]
        lines = [x for x in answered if x["configuration"] == key][: result["questions"]]
        assert row["accuracy"] == sum(x["score"] for x in lines) / result["questions"]
        assert row["final_tokens"] is None  # costs come last, and nothing is estimated


@pytest.mark.parametrize("interrupted", [signal.SIGINT], indirect=True, ids=["SIGINT"])
def test_the_same_command_finishes_an_interrupted_run(interrupted, tmp_path):
    folder, args, _ = interrupted
    code, _, err = start(command, args).answer()
    assert code == 0 and "going on with" in err
    assert not json.loads(predictions(folder).read_text().splitlines()[0])["open"]
    settings = replace(SETTINGS, methods=("fastv", "random"), keep=(4,), max_new_tokens=6)
    metric = metrics.metric("one-word")
    runner.run(MODEL, PROCESSOR, "toy", Toy(), metric, settings, out=tmp_path)
    assert comparable(folder / "toy.json") == comparable(tmp_path / "toy.json")
    assert predictions(folder).read_bytes() == predictions(tmp_path).read_bytes()


def test_an_interrupt_before_the_first_batch_is_done_leaves_no_result(tmp_path):
    def stop(text, done, total):
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = bench(tmp_path, progress=stop)
    assert signal.getsignal(signal.SIGINT) is before
    assert result["finished"] is False and result["questions"] == 0
    assert not (tmp_path / "toy.json").exists()
    assert predictions(tmp_path).exists()


def test_an_interrupt_while_costs_are_measured_keeps_all_answers(tmp_path, whole):
    def stop(text, done, total):
        if text == "timing":
            os.kill(os.getpid(), signal.SIGINT)

    result = bench(tmp_path, progress=stop)
    assert result["finished"] is False and result["questions"] == 22
    expected = comparable(whole / "toy.json")
    assert [r["kl"] for r in result["rows"]] == [r["kl"] for r in expected["rows"]]
    bench(tmp_path)
    same_files(tmp_path, whole)


def test_a_second_interrupt_ends_the_process_at_once():
    process = start(waiting)
    process.ours.recv()  # it waits inside
    os.kill(process.pid, signal.SIGINT)
    assert process.ours.recv() == "interrupted"  # and now waits outside
    os.kill(process.pid, signal.SIGTERM)  # as a launcher passes on what it got
    time.sleep(0.1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == -signal.SIGINT


def test_signals_wait_until_something_is_written():
    interrupts = Interrupts()
    with interrupts:
        os.kill(os.getpid(), signal.SIGINT)  # nothing is raised here
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt), interrupts.allowed():
            raise AssertionError("the block is not entered")


def test_a_run_in_a_thread_leaves_signals_alone():
    before, asked = signal.getsignal(signal.SIGINT), []

    def run():
        with Interrupts() as interrupts:
            asked.append((signal.getsignal(signal.SIGINT), interrupts.asked))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [(before, False)]


def test_errors_of_a_step_come_through_and_its_value_is_kept_first():
    world, kept = World(), []
    assert world.together(lambda: 3, kept.append) == [3] == kept
    with pytest.raises(ZeroDivisionError):
        world.together(lambda: 1 / 0, kept.append)
    assert kept == [3]


def test_a_torn_line_is_gone_before_the_next_one_is_written(tmp_path):
    path, line = tmp_path / "j", {"configuration": "a", "index": 1}
    book = Journal({"task": "t"})
    book.open(path, fresh=False)
    book.close()
    path.write_bytes(path.read_bytes() + b'{"configuration": "a", "index": 1, "prediction": "long')
    book.open(path, fresh=False)
    book.add([line])
    book.close()
    assert [json.loads(x) for x in path.read_text().splitlines()][1:] == [line]


def test_a_journal_knows_no_answer_twice(tmp_path):
    book = Journal({"task": "t"})
    book.open(tmp_path / "j", fresh=False)
    line = {"configuration": "a", "index": 1, "prediction": "x"}
    book.add([line, {**line, "prediction": "y"}])
    book.add([line])
    book.close()
    assert len((tmp_path / "j").read_text().splitlines()) == 2
    assert book.answers["a"][1]["prediction"] == "x"
