# SPDX-License-Identifier: Apache-2.0
"""Every method at every budget on the same questions, with the uncompressed model beside it.

What is measured, and how:

* Accuracy: greedy answers to padded batches. The stock model answers a batch first, then every
  configuration does, so that at any time all have answered the same questions. The image encoder
  runs once for each image, not once for each question. Methods that do not change it share its
  output; of blocks that they look into, the attention runs again on its remembered input. Nothing
  of a batch but the text of its answers outlives it.
* Without labels: agreement with the stock model's answers and KL divergence from it (`answering`).
* Time: one prompt with one image (batch 1), from pixels to the logits of the first answer token.
  The stock model, without any hook of ours, takes its turn among the methods in every round; the
  first round is a warm-up and is not counted. Medians are reported.
* KV bytes: the storage that the cache of that prompt holds.
* Nothing is estimated: what was not measured is None.

Every answer goes to a file at once (`journal`), several processes share the batches
(`distributed`), and a question that cannot be read is left out and counted (`batches`).
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...session import observe
from ..measure.timing import Progress, measure, timed_prefill
from ..metrics.scores import Metric
from ..shared.files import write_whole
from ..shared.names import BASELINE
from ..shared.provenance import describe_model, header
from .batches import Samples
from .distributed import World
from .evaluation import BLANK, Configuration, Exam
from .journal import Journal, Line
from .plan import BenchSettings, conditions, plan
from .rows import AccuracyRow, fill_costs


def run(
    model: Any,
    processor: Any,
    task: str,
    items: Sequence[Any],
    metric: Metric,
    settings: BenchSettings,
    progress: Progress = lambda text, done, total: None,
    *,
    out: Path | None = None,
    fresh: bool = False,
    more: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
    world: World | None = None,
) -> dict[str, Any]:
    """Benchmark all methods and budgets on one task.

    SIGINT and SIGTERM end the run early, with the result of the batches that are done.

    Args:
        model: a LLaVA-type model, not wrapped; processor: its processor.
        items: a task of `tasks.base.open_task`, or any sequence of `tasks.base.Item`.
        metric: what an answer is worth.
        out: folder for ``TASK.json`` and ``TASK.predictions.jsonl``; an unfinished run there is
            gone on with, unless ``fresh``, and a finished one replaced. None: nothing is written.
        more: other tasks follow before the run is finished; then close its files by `journal.seal`.
        command: what the result names as its command; say: is told of resumed runs and errors.
        world: the processes that share the work, each of which calls this; ``stopped`` tells then
            whether they were interrupted.

    Returns:
        The result, ready for JSON: task, settings, versions, machine and one row for each
        configuration, the uncompressed model first. ``finished`` is False after an interrupt,
        ``skipped`` are the questions that could not be asked, ``problems`` the rows that the task
        refused, and ``unwritten`` the files that could not be written. Only the first process
        measures costs and writes files.

    Raises:
        ValueError: no items, or an unknown method.
        BadItem: none of the items can be read.
        JournalError: ``out`` has an unfinished run of other settings, or cannot be written to at
            the start; what cannot be written later is in the result.
        LostError: another process has failed.
    """
    if not items:
        raise ValueError(f'task "{task}" gave no questions')
    world = world or World()
    began = time.perf_counter()
    samples = Samples(processor, items, settings.batch_size, metric)
    inputs = samples.first().inputs(model)
    with observe(model) as session:
        timed_prefill(model, inputs)
        total = round(session.report().visual_tokens)

    configurations = [
        Configuration(AccuracyRow(BASELINE, [], total)),
        Configuration(AccuracyRow(BLANK, [], None)),
        *(Configuration(row, method) for row, method in plan(model, inputs, total, settings)),
    ]
    journal = Journal(conditions(model, task, samples, metric, settings), say)
    exam = Exam(model, samples, configurations, settings.max_new_tokens, journal, world)
    steps = exam.steps + settings.repeats + 1

    def opened() -> list[Line]:
        if world.is_main and out is not None:
            journal.open(out / f"{file_stem(task)}.predictions.jsonl", fresh)
        return journal.lines()

    def cost() -> None:
        if world.is_main:
            done = itertools.count(exam.steps)

            def tick() -> None:
                progress("timing", next(done), steps)

            tick()
            _measure(model, inputs, configurations, settings.repeats, tick)

    finished = False
    with world.interrupts, closing(journal):
        for lines in world.together(opened):
            journal.add(lines)
        try:
            exam.ask_pending(lambda text, done: progress(text, done, steps))
            world.together(cost)
            finished = True
        except KeyboardInterrupt:
            pass
        asked = exam.score(settings.seed)
        result = {
            **header("task", model.device, command, processes=world.size),
            "task": task,
            "finished": finished,
            "metric": metric.name,
            "questions": len(asked),
            "questions_given": len(items),
            "images": len({line["image"] for line in asked}),
            "visual_tokens": total,
            "skipped": [{k: x[k] for k in ("where", "why")} for x in exam.skipped()],
            "problems": [{"where": a, "why": b} for a, b in getattr(items, "problems", ())],
            "unwritten": [],
            "seconds": round(time.perf_counter() - began, 1),
            "settings": settings.plain(),
            "timing": {
                "prompts": 1,
                "batch": 1,
                "warmup_rounds": 1,
                "rounds": settings.repeats,
                "attention": getattr(model.config, "_attn_implementation", None),
                "prompt_tokens": int(inputs["input_ids"].shape[1]),
            },
            "model": describe_model(model),
            "rows": [asdict(c.row) for c in configurations if c.row.method != BLANK],
        }
        if world.is_main and out is not None:
            write = functools.partial(_write, result, out / f"{file_stem(task)}.json", journal, say)
            if finished:
                journal.finish(exam.lines(), write, is_open=more)
            elif asked:
                write()
        # Nobody goes on while the first one writes, and none if another one stops.
        world.stopped = any(world.gather(world.interrupts.asked))
    return result


def file_stem(task: str) -> str:
    """Beginning of the names of a task's files."""
    return re.sub(r"[^\w.+-]+", "-", task)


def _measure(
    model: Any,
    inputs: dict[str, Any],
    configurations: Sequence[Configuration],
    repeats: int,
    tick: Callable[[], None],
) -> None:
    """Fill in the costs of the configurations that run."""
    alive = [c for c in configurations if c.row.error is None and c.row.method != BLANK]
    measured = measure(model, inputs, [c.method for c in alive], repeats, tick)
    for configuration, facts in zip(alive, measured):
        fill_costs(configuration.row, facts, measured[0])


def _write(
    result: dict[str, Any], path: Path, journal: Journal, say: Callable[[str], None]
) -> bool:
    """Write the result, and into it which file cannot be; whether there is none."""
    if journal.failure is not None:
        result["unwritten"].append({"where": str(journal.path), "why": journal.failure})
    try:
        write_whole(path, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        result["unwritten"].append({"where": str(path), "why": str(error.strerror)})
        say(f"cannot write {path}: {error.strerror}")
    return not result["unwritten"]
