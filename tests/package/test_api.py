# SPDX-License-Identifier: Apache-2.0
"""The public API is what `tests/package/api.txt` says: names, signatures, and parameters of
methods.

python tests/package/test_api.py    writes it anew; read the difference before you commit it
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import vtc
from vtc.registry import known_methods

SNAPSHOT = Path(__file__).with_name("api.txt")


def signature(thing: Any) -> str:
    """A signature without addresses of default objects, and quotes, which Pythons set or not."""
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    return re.sub(r" at 0x[0-9a-f]+|'", "", text)


def members(cls: type) -> list[str]:
    """Public fields, methods and properties that a class of vtc defines or inherits from vtc."""
    lines = []
    if dataclasses.is_dataclass(cls):
        lines += [f"{f.name}: {f.type}" for f in dataclasses.fields(cls)]
    for name in sorted(n for n in dir(cls) if not n.startswith("_")):
        owner = next((base for base in cls.__mro__ if name in vars(base)), object)
        value = vars(owner).get(name)
        if not owner.__module__.startswith("vtc") or f"{name}: " in "\n".join(lines):
            continue
        if isinstance(value, property):
            lines.append(f"{name} (property)")
        elif isinstance(value, (classmethod, staticmethod)):
            lines.append(f"{name}{signature(getattr(cls, name))} ({type(value).__name__})")
        elif inspect.isfunction(value):
            lines.append(f"{name}{signature(value)}")
    return lines


def snapshot() -> str:
    """The API as text, one line for each name."""
    lines = []
    for name in sorted(vtc.__all__):
        thing = getattr(vtc, name)
        if inspect.isclass(thing) and not issubclass(thing, enum.Enum):
            lines.append(f"vtc.{name}")
            lines += [f"vtc.{name}.{member}" for member in members(thing)]
        elif callable(thing):
            lines.append(f"vtc.{name}{signature(thing)}")
        else:
            lines.append(f"vtc.{name}: {type(thing).__name__}")
    for name, cls in sorted(known_methods().items()):
        own = [f"{f.name}={f.default!r}" for f in dataclasses.fields(cls)]
        lines.append(f"method {name}: {cls.__module__}.{cls.__name__}({', '.join(own)})")
    return "\n".join(lines) + "\n"


def test_the_public_api_is_the_recorded_one():
    """A change here breaks somebody's code: see the deprecation policy in CONTRIBUTING.md."""
    recorded, now = SNAPSHOT.read_text("utf-8").splitlines(), snapshot().splitlines()
    gone = [line for line in recorded if line not in now]
    new = [line for line in now if line not in recorded]
    assert not gone, f"gone or changed: {gone}; instead: {new}"
    assert not new, f"not recorded yet: {new}; run: python tests/package/test_api.py"


def test_every_public_name_has_a_docstring():
    for name in vtc.__all__:
        thing = getattr(vtc, name)
        if callable(thing):
            assert inspect.getdoc(thing), name


def test_tab_completion_shows_the_public_api():
    assert dir(vtc) == sorted(vtc.__all__)
    assert all(hasattr(vtc, name) for name in dir(vtc))


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), "utf-8")
    sys.stdout.write(f"{SNAPSHOT}\n")
