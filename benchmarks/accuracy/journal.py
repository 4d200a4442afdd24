# SPDX-License-Identifier: Apache-2.0
"""The file of predictions: every answer is appended as it is given, so that a killed run goes on.

JSON Lines. The first line says what was asked of which model (`plan.conditions`), and whether the
run is ``open``: a command that stops before its last task is done goes on with all of them, so that
its journals are closed together (`seal`). Then a line for each answer,

    {"configuration": "fastv(keep_ratio=0.5)", "index": 7, "id": "3-2", "prediction": "red",
     "score": 1.0, "kl": 0.0021, "same": true}

``index`` being the position in the task, ``kl`` in nats (see `answering`; null where it is not
finite or was not measured) and ``same`` whether the stock model gave this answer; the lines of the
stock model also have question, answers, kind and image. A question that could not be asked has a
line with its index, ``where`` and ``why``. Nothing in it depends on how many processes ran.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class JournalError(ValueError):
    """A file of predictions that a run cannot go on with."""


class Journal:
    """The answers so far, in memory and, once opened, in a file.

    Attributes:
        answers: for each configuration the lines by index; skipped: what could not be asked.
        failure: why the file could not be written any further, or None; what comes then is in
            memory only.
    """

    def __init__(self, header: Line, say: Callable[[str], None] = lambda text: None) -> None:
        self.header, self.say = header, say
        self.path = Path()
        self.answers: dict[str, dict[int, Line]] = {}
        self.skipped: dict[int, Line] = {}
        self.failure: str | None = None
        self._file: Any = None

    def open(self, path: Path, fresh: bool) -> None:
        """Go on with the open run in a file, or start a new one in it.

        A finished run is replaced, and ``say`` told so.

        Raises:
            JournalError: the file is of an unfinished run of other settings, or not a journal
                (``fresh`` starts over in both cases), or it cannot be read or written.
        """
        self.path = path
        try:
            self._open(path, fresh)
        except OSError as error:
            raise JournalError(
                f"cannot write {path}: {error.strerror}; give another --out"
            ) from None

    def _open(self, path: Path, fresh: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() and not fresh else b""
        whole = data.rfind(b"\n") + 1  # the rest is a line torn by a kill
        if whole:
            header, lines = _parse(path, data[:whole])
            if header.pop("open"):
                self._must_be_the_same(header)
                for line in lines:
                    self._remember(line)
                count = sum(map(len, self.answers.values()))
                self.say(f"going on with {path}: {count} answers are there")
            else:
                self.say(f"{path} is of a finished run and will be replaced")
                whole = 0
        # Unbuffered: what is written has left the process.
        self._file = path.open("r+b" if whole else "wb", buffering=0)
        if whole:
            self._file.truncate(whole)
            self._file.seek(whole)
        else:
            _write(self._file, _first(self.header, is_open=True))

    def _must_be_the_same(self, header: Line) -> None:
        was, now = dict(_flat(header)), dict(_flat(self.header))
        differ = [
            f"{key} was {was.get(key)}, is {now.get(key)}"
            for key in dict.fromkeys([*was, *now])
            if was.get(key) != now.get(key)
        ]
        if differ:
            raise JournalError(
                f"{self.path} is of an unfinished run of other settings ({'; '.join(differ)}): "
                "finish that one, give another --out, or start over with --fresh"
            )

    def _remember(self, line: Line) -> bool:
        """Keep a line, and say whether it is new."""
        known = self.skipped
        if "configuration" in line:
            known = self.answers.setdefault(line["configuration"], {})
        new = line["index"] not in known
        known.setdefault(line["index"], line)
        return new

    def add(self, lines: Iterable[Line]) -> None:
        """Remember lines and append the new ones to the file; if that fails, say so once."""
        data = b"".join(_dump(line) for line in lines if self._remember(line))
        if self._file is None or not data:
            return
        try:
            _write(self._file, data)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.close()
        if self.failure is None:
            self.say(f"cannot write {self.path}: {error.strerror}; going on without")
        self.failure = str(error.strerror)

    def lines(self) -> list[Line]:
        """All lines, in the order in which they came."""
        return [*self.skipped.values(), *(x for a in self.answers.values() for x in a.values())]

    def finish(self, lines: Iterable[Line], result: Callable[[], bool], is_open: bool) -> None:
        """Write the final file: the header and these lines.

        Args:
            is_open: other tasks of the same command follow.
            result: writes the result of the run and says whether it could. Called after the final
                file is written, and before it takes the place of the old one: a run of which one
                of the two is missing is not finished.
        """
        final = self.path.with_name(self.path.name + ".new")
        try:
            with final.open("wb") as file:
                file.write(_first(self.header, is_open))
                file.writelines(map(_dump, lines))
            self.failure = None
        except OSError as error:
            self._fail(error)
        if result() and self.failure is None:
            os.replace(final, self.path)
        final.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def seal(path: Path) -> None:
    """Close the journal in a file: it is of a finished run."""
    with path.open("r+b") as file:
        header = json.loads(file.readline())
        del header["open"]
        file.seek(0)
        file.write(_first(header, is_open=False))


def _write(file: Any, data: bytes) -> None:
    """Write all bytes to an unbuffered file, which may take them in parts."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _first(header: Line, is_open: bool) -> bytes:
    """The first line, of one length whether open or not."""
    return _dump({**header, "open": is_open}).replace(b'"open": true}', b'"open": true }')


def _dump(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _parse(path: Path, data: bytes) -> tuple[Line, list[Line]]:
    """Header and lines of a journal's text."""
    lines = []
    for number, text in enumerate(data.splitlines(), 1):
        try:
            line = json.loads(text)
            known = isinstance(line, dict) and ("open" if number == 1 else "index") in line
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise JournalError(
                f"{path}:{number} is no line of a file of predictions: move the file away, or "
                "start over with --fresh"
            )
        lines.append(line)
    return lines[0], lines[1:]


def _flat(header: Line, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested dicts, with dotted names."""
    for key, value in header.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
