# SPDX-License-Identifier: Apache-2.0
"""Several processes that share one benchmark, and Ctrl-C.

    accelerate launch --num_processes 8 -m vtc.cli bench ...            eight GPUs of a machine
    accelerate launch --multi_gpu --num_processes 16 --num_machines 2 --machine_rank 0 \\
        --main_process_ip HOST --main_process_port 29500 -m vtc.cli bench ...
                                    eight GPUs of each of two: on the other, --machine_rank 1
    torchrun --nproc-per-node 2 -m vtc.cli bench ...                    two on a CPU
    accelerate launch --multi_gpu --num_processes 2 -m vtc.cli bench ...          the same

(`accelerate launch --cpu` starts a single process, whatever ``--num_processes`` says.)

Each process holds the model and takes its turn at the batches. They keep in step: all answer with
one configuration, then tell each other what they have got. So process 0 alone writes every answer
at once, other machines need no common disk, and an error or an interrupt in one is known to all; a
slow process holds the others up by a batch.
"""

from __future__ import annotations

import datetime
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=1)
"""How long a process waits for the others, which may be timing; a dead one is noticed at once."""


class LostError(RuntimeError):
    """Another process of the run has failed."""


class Interrupts:
    """SIGINT and SIGTERM raise KeyboardInterrupt, but only inside `allowed` blocks.

    So they stop computing, and never the writing down of what was computed: a signal that comes
    then raises on entering the next block. A second SIGINT ends the process at once; SIGTERM, which
    launchers pass on to processes that may have had it already, does not.

    Attributes:
        asked: whether a signal came.
    """

    def __init__(self) -> None:
        self.asked = self._inside = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # of a job in the background
                    self._before[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread, the only one that gets signals
            pass
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: Any) -> None:
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if signal.SIGTERM in self._before:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.asked = True
        if self._inside:
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A block that a signal may end."""
        self._inside = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._inside = False


class World:
    """The processes of a run, of which this is number ``rank``; alone by default.

    Attributes:
        stopped: whether one of them was interrupted; the same in all of them.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.interrupts, self.stopped = Interrupts(), False

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, times and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Gather the values of all processes, in each of them.

        Raises:
            LostError: one of them is gone.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise LostError(f"another process of this run is gone ({error})") from None
        return values

    def together(
        self, function: Callable[[], T], accept: Callable[[T], None] = lambda value: None
    ) -> list[T]:
        """Call a function in all processes, each its own, and share what they give.

        Args:
            accept: called with the value of each process that did not fail, before any error is
                raised.

        Raises:
            KeyboardInterrupt: one of them was interrupted.
            LostError: one of the others has failed; that one raises its own error.
        """
        value: Any = None
        failure: BaseException | None = None
        try:
            with self.interrupts.allowed():
                value = function()
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        told = None if failure is None else f"{type(failure).__name__}: {failure}"
        stop = isinstance(failure, KeyboardInterrupt)
        try:
            outcomes = self.gather((value, told, stop))
        except LostError:
            if failure is None:
                accept(value)
            raise
        for got, text, _ in outcomes:
            if text is None:
                accept(got)
        if failure is not None and not stop:
            raise failure
        for rank, (_, text, stopped) in enumerate(outcomes):
            if text is not None and not stopped:
                raise LostError(f"process {rank} of {self.size} has failed: {text}")
        if any(stopped for *_, stopped in outcomes):
            raise KeyboardInterrupt
        return [got for got, *_ in outcomes]


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes that were launched together; one that was launched alone is a world as well.

    Args:
        device: "cpu", or else each process gets a GPU of its own as the current one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    import torch.distributed as dist
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)  # Python objects, on any device
        yield World(state.process_index, state.num_processes, group)
    finally:
        dist.destroy_process_group()
