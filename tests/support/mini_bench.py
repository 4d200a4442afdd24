# SPDX-License-Identifier: Apache-2.0
"""A benchmark on the mini model that takes a second, here or in processes that can be killed."""

from __future__ import annotations

import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

torch.set_num_threads(1)

from vtc import cli  # noqa: E402
from vtc.benchmarks.accuracy import distributed  # noqa: E402
from vtc.benchmarks.accuracy import run as runner  # noqa: E402
from vtc.benchmarks.metrics.scores import Metric  # noqa: E402
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor  # noqa: E402
from vtc.benchmarks.tasks import registry  # noqa: E402
from vtc.benchmarks.tasks.items import BadItem, Entry, Item, Questions  # noqa: E402

MODEL = mini_llava()
PROCESSOR = mini_processor(MODEL)
WORDS = ("is there a red circle ?", "what shape ?", "is there a blue square ?", "what colour ?")
METRIC = Metric("odd", lambda prediction, references: float(len(prediction) % 2))
"""Random weights never answer; any rule will do."""
SETTINGS = runner.BenchSettings(
    methods=("fastv", "random", "pitome"),
    keep=(Fraction(1, 2), 4),
    batch_size=4,
    max_new_tokens=3,
    repeats=0,
)
NOT_COMPARED = ("date", "seconds", "machine", "versions", "command")


def make_image(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_items(images: int = 3, questions: int = 3) -> list[Item]:
    """Items of which those about one image do not lie next to each other."""
    pictures = [make_image(i) for i in range(images)]
    return [
        Item(picture, WORDS[(i + q) % 4], "yes", f"kind{q % 2}")
        for q in range(questions)
        for i, picture in enumerate(pictures)
    ]


class Toy(Questions):
    """A task of 11 images and 22 questions; some images cannot be read, or end the process."""

    def __init__(
        self, bad: tuple[int, ...] = (), fatal: tuple[int, ...] = (), name: str = "toy"
    ) -> None:
        def load(number: int) -> Image.Image:
            self.loaded.append(number)
            if number in fatal:
                raise RuntimeError(f"image {number} is fatal")
            if number in bad:
                raise BadItem(f"toy.jsonl:{number}: no such image")
            return make_image(number)

        self.loaded: list[int] = []
        entries = [
            Entry(i, lambda i=i: load(i), WORDS[(i + q) % 4], "yes", f"kind{q}")
            for q in range(2)
            for i in range(11)
        ]
        super().__init__(name, entries, "one-word")


def bench(out: Path | None, items: Any = None, settings: Any = SETTINGS, **more: Any) -> dict:
    """The result of a run on the toy task."""
    given = Toy() if items is None else items
    return runner.run(MODEL, PROCESSOR, "toy", given, METRIC, settings, out=out, **more)


def comparable(result: dict | Path) -> dict:
    """A result, or the file of one, without what differs between any two runs."""
    if isinstance(result, Path):
        result = json.loads(result.read_text())
    return {k: v for k, v in result.items() if k not in NOT_COMPARED}


def predictions(folder: Path) -> Path:
    return folder / "toy.predictions.jsonl"


def wait_for_lines(folder: Path, count: int, timeout: float = 300) -> None:
    """Until a run has written so many answers."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if predictions(folder).exists() and predictions(folder).read_bytes().count(b"\n") > count:
            return
        time.sleep(0.002)
    raise AssertionError(f"no {count} answers after {timeout} s")


def slow(seconds: float) -> Any:
    """Progress that makes every step last longer."""
    return lambda text, done, total: time.sleep(seconds)


# ---- in other processes -------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("forkserver")


def start(function: Any, *args: Any, **env: str) -> Any:
    """Call a function of this module in a process of its own; `.answer()` is what it returned.

    All come from one server that has imported everything, so that they start at once.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    CONTEXT.set_forkserver_preload([__name__])
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_call, args=(theirs, env, function, args), daemon=True)
    process.start()
    theirs.close()

    def answer(timeout: float = 300) -> Any:
        got = ours.recv() if ours.poll(timeout) else None
        process.join(timeout)
        return got

    process.answer, process.ours = answer, ours
    return process


def _call(connection: Any, env: dict[str, str], function: Any, args: tuple) -> None:
    os.environ.update(env)
    if function is waiting:
        args = (connection,)
    connection.send(function(*args))


def in_world(function: Any, size: int, *args: Any) -> list[Any]:
    """`start` it in ``size`` processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    address |= {"LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    return [
        start(function, *args, **address, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(size)
    ]


def slow_bench(out: Path, seconds: float) -> dict:
    return bench(out, progress=slow(seconds))


def shared_bench(out: Path, seconds: float = 0.0, fatal: tuple[int, ...] = ()) -> dict | str:
    """Result of a process of several, or its error."""
    with distributed.joined("cpu") as world:
        try:
            return bench(out, Toy(fatal=fatal), world=world, progress=slow(seconds))
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"


def waiting(connection: Any) -> None:
    """Say so and wait; after an interrupt, the same again."""
    with distributed.Interrupts() as interrupts:
        try:
            with interrupts.allowed():
                connection.send("waits")
                time.sleep(60)
        except KeyboardInterrupt:
            connection.send("interrupted")
            time.sleep(60)


def command(
    args: list[str], file_size: int | None = None, seconds: float = 0.0
) -> tuple[int, str, str]:
    """Exit code, standard output and error of ``vtc bench`` on toy tasks.

    Args:
        file_size: no file can become longer, as on a full disk.
        seconds: how much longer every step lasts.
    """
    registry.open_task = lambda spec, **_: Toy(name=spec)
    cli.bench.load = lambda *_: (MODEL, PROCESSOR)
    progress = cli.common.ProgressBar._progress

    def slower(*given: Any) -> None:
        time.sleep(seconds)
        progress(*given)

    cli.common.ProgressBar._progress = slower
    if file_size is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            sys.argv = ["vtc", "bench", *args]
            cli.app()
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("the command did not exit")
