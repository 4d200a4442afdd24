# SPDX-License-Identifier: Apache-2.0
"""The one thread that runs models: requests queue up for it, and each is a stream of news."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Say = Callable[[T | None], None]
"""Tells whoever asked. None says nothing; like every call it ends the work if nobody listens."""


class _Left(Exception):
    """Nobody listens any more."""


class Worker:
    """Runs one request after the other, whoever asks and from whatever thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._closed = threading.Event()

    def close(self) -> None:
        """End the thread: what runs stops when it next says something, what waits is dropped."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def run(self, work: Callable[[Say[T]], None]) -> Iterator[T]:
        """Do ``work(say)`` when its turn comes, and yield what it says, as it says it.

        A caller that closes this generator ends the work the next time it says something. What the
        work raises is raised here.
        """
        box: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        left = threading.Event()

        def say(news: T | None) -> None:
            if left.is_set() or self._closed.is_set():
                raise _Left
            if news is not None:
                box.put(("news", news))

        def job() -> None:
            try:
                if not left.is_set():
                    work(say)
            except _Left:
                pass
            except BaseException as error:  # however it ends, the one who waits must hear of it
                box.put(("error", error))
            box.put(("end", None))

        self._thread.submit(job)
        try:
            while True:
                what, news = box.get()
                if what == "end":
                    return
                if what == "error":
                    raise news
                yield news
        finally:
            left.set()
