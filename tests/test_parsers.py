# SPDX-License-Identifier: Apache-2.0
"""Whatever text or file comes in, parsers give a result or say what is wrong with it; none hangs."""

from __future__ import annotations

import json
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

import vtc
from vtc.benchmarks import journal, report
from vtc.benchmarks.budgets import parse_keep, seeded
from vtc.benchmarks.model_args import Loading, parse
from vtc.benchmarks.tasks import files, galleries
from vtc.method import Chain, resolve

NAMES = sorted(vtc.methods())
FIELDS = sorted({f.name for cls in vtc.methods().values() for f in fields(cls)})

numeric = st.text("0123456789./eE+-_ ١½", max_size=12)
text = st.one_of(st.text(max_size=20), numeric, st.sampled_from(["none", "nan", "inf", "1e999"]))
DEEP = "[" * 100_000
value: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    text,
    st.just(DEEP),
    st.lists(st.one_of(st.integers(), st.floats(), text, st.none()), max_size=3),
    st.lists(st.floats(0, 1), max_size=5).map(str),
    st.dictionaries(text, st.integers(), max_size=2),
    st.just("[1" + "0" * 400 + "]"),
)


@given(st.one_of(text, st.text()))
@example("1e999999999")
@example("1e-999999999")
@example("9" * 5000)
@example("0." + "3" * 5000)
@example("0/0")
def test_budgets(given: str) -> None:
    try:
        keep = parse_keep(given)
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(keep, int) if keep > 1 or isinstance(keep, int) else 0 < keep <= 1
    method = seeded("fastv", keep, 0)
    assert 1 <= method.budget(576) <= 576


def test_budgets_of_the_documentation() -> None:
    assert [parse_keep(k) for k in ("0.33", " 2/9", "128", "1")] == [
        Fraction(1, 3),
        Fraction(2, 9),
        128,
        1,
    ]


name = st.one_of(st.sampled_from(NAMES), text)


@given(
    st.lists(name, max_size=3).map(" + ".join) | text,
    st.dictionaries(
        st.one_of(
            st.sampled_from(FIELDS),
            st.tuples(name, st.sampled_from(FIELDS)).map(".".join),
            st.sampled_from([f.name for f in fields(Loading)]),
            text,
        ),
        value,
        max_size=3,
    ),
)
def test_model_args(method: str, arguments: dict[str, Any]) -> None:
    """Names and values as evaluation engines pass them, chains among them."""
    try:
        loading, chain = parse({"pretrained": "x", "method": method, **arguments})
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(loading, Loading)
    if chain is None:
        assert arguments.get("method", method).strip().lower() in ("", "none")
    else:
        assert isinstance(chain, Chain) and str(chain)


@given(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(FIELDS), value, max_size=2))
def test_parameters_of_every_method(name: str, given: dict[str, Any]) -> None:
    """A method is made, and makes sense, or a ValueError says why not."""
    taken = {f.name for f in fields(vtc.methods()[name])}
    try:
        (method,) = resolve(name, **given)
    except ValueError as error:
        assert str(error)
        return
    assert taken >= set(given) and str(method).startswith(name)
    assert 1 <= method.budget(576, (24, 24)) <= 576
    assert method.stages <= {"pixels", "vision", "features", "decoder", "bypass", "cache"}


json_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
ROW = ("image", "question", "answer", "answers", "kind", "id", "metric", "file_name")
row = st.dictionaries(st.sampled_from(ROW), json_value | st.just("a.png"), max_size=6)
good = st.fixed_dictionaries(
    {"image": st.just("a.png"), "question": st.just("what?"), "answer": st.just("a")},
    optional={"id": json_value, "kind": json_value, "metric": st.sampled_from(["vqa", "anls", "x"])},
)
ODD = [b"", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{", DEEP.encode(), b"9" * 5000, b'"\\ud800"', b"NaN"]
line = st.one_of(
    (row | good | json_value).map(lambda x: json.dumps(x).encode()),
    st.binary(max_size=20),
    st.sampled_from(ODD),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    Image.new("RGB", (2, 2)).save(made / "a.png")
    return made


@given(lines=st.lists(line, max_size=5), metric=st.none() | text)
def test_task_files(folder: Path, lines: list[bytes], metric: str | None) -> None:
    """Good rows are asked whatever the others hold; every other line is told of."""
    path = folder / "task.jsonl"
    sound = json.dumps({"image": "a.png", "question": "which?", "answer": "a"}).encode()
    path.write_bytes(b"\n".join([*lines, sound]))
    try:
        task = files.open_path(path, metric=metric)
    except ValueError as error:  # the metric is unknown, or no row has its kind of answer
        assert str(error) and (metric is not None or b"metric" in path.read_bytes())
        return
    count = sum(bool(x.strip()) for x in path.read_bytes().split(b"\n"))
    assert len(task) + len(task.problems) >= count - 1 and len(task) >= 1
    assert all(where and why for where, why in task.problems)


@given(lines=st.lists(line, max_size=4))
def test_journals(folder: Path, lines: list[bytes]) -> None:
    data = b"\n".join(lines)
    try:
        header, rows = journal._parse(folder / "x", data)
    except (journal.JournalError, IndexError) as error:
        assert isinstance(error, journal.JournalError) or not data.splitlines()
        return
    assert "open" in header and all("index" in r for r in rows)


@given(data=line, suffix=st.sampled_from([".json", ".txt"]))
def test_result_files_and_class_names(folder: Path, data: bytes, suffix: str) -> None:
    path = folder / ("made" + suffix)
    path.write_bytes(data)
    for read in (lambda: report.read([path]), lambda: galleries.class_names(["a", "b"], path)):
        try:
            read()
        except ValueError as error:
            assert str(error)
    assume(True)
