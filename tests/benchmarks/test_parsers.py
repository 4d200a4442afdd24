# SPDX-License-Identifier: Apache-2.0
"""Whatever text or file comes in, parsers give a result or say what is wrong with it; none
hangs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import vtc
from vtc.benchmarks.accuracy import journal
from vtc.benchmarks.harnesses.model_args import LoadOptions, parse
from vtc.benchmarks.pages import read as report
from vtc.benchmarks.shared.budgets import parse_keep, seeded
from vtc.benchmarks.tasks import files, galleries
from vtc.method import Chain
from vtc.registry import resolve

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


def tried(call: Callable[[], Any], *also: type[Exception]) -> Any:
    """Result of a call; None where it says why not, by a ValueError or one of these."""
    try:
        return call()
    except (ValueError, *also) as error:
        said = str(error)
    assert said
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    Image.new("RGB", (2, 2)).save(made / "a.png")
    return made


@given(st.one_of(text, st.text()))
@example("9" * 5000)
@example("0." + "3" * 5000)
@example("0/0")
def test_budgets(given: str) -> None:
    keep = tried(lambda: parse_keep(given))
    if keep is None:
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


@pytest.mark.parametrize("keep", ["1e999999999", "1E9", "1e-2"])
def test_an_exponent_in_a_budget_is_refused(keep: str) -> None:
    """Fractions write 1e999999999 out, which never ends."""
    with pytest.raises(ValueError, match="no budget"):
        parse_keep(keep)


def test_a_number_that_no_float_holds() -> None:
    """It raised OverflowError instead of saying which parameter is wrong."""
    with pytest.raises(ValueError, match=r"keep_ratio is the fraction of tokens kept, in \(0, 1\]"):
        resolve("fastv", keep_ratio=10**400)
    with pytest.raises(ValueError, match=r"ratios=\[10+\] is not of type"):
        parse({"pretrained": "x", "method": "sparsevlm", "ratios": "[1" + "0" * 400 + "]"})


def test_a_value_nested_too_deeply(folder: Path) -> None:
    """RecursionError passed through."""
    with pytest.raises(ValueError, match="ratios="):
        parse({"pretrained": "x", "method": "sparsevlm", "ratios": DEEP})
    path = folder / "deep.json"
    path.write_text(DEEP)
    with pytest.raises(ValueError, match="no result file"):
        report.read([path])
    with pytest.raises(ValueError, match="cannot read"):
        galleries.class_names(["a"], path)
    with pytest.raises(journal.JournalError):
        journal._parse(path, DEEP.encode())


def test_one_number_too_long_does_not_refuse_the_file(folder: Path) -> None:
    """Its ValueError is no JSONDecodeError, and ended the reading of all other lines."""
    path = folder / "long.jsonl"
    sound = json.dumps({"image": "a.png", "question": "which?", "answer": "a"})
    path.write_text("9" * 5000 + "\n" + sound)
    task = files.open_path(path)
    assert len(task) == 1 and "digits" in dict(task.problems)["long.jsonl:1"]


@pytest.mark.parametrize("routers", [5, [1], {1: 2.0}])
def test_routers_that_are_none(routers: Any) -> None:
    with pytest.raises(ValueError, match="routers are"):
        resolve("mod", routers=routers)


name = st.one_of(st.sampled_from(NAMES), text)


@given(
    st.lists(name, max_size=3).map(" + ".join) | text,
    st.dictionaries(
        st.one_of(
            st.sampled_from(FIELDS),
            st.tuples(name, st.sampled_from(FIELDS)).map(".".join),
            st.sampled_from([f.name for f in fields(LoadOptions)]),
            text,
        ),
        value,
        max_size=3,
    ),
)
def test_model_args(method: str, arguments: dict[str, Any]) -> None:
    """Names and values as evaluation engines pass them, chains among them."""
    made = tried(lambda: parse({"pretrained": "x", "method": method, **arguments}))
    if made is None:
        return
    loading, chain = made
    assert isinstance(loading, LoadOptions)
    if chain is None:
        assert arguments.get("method", method).strip().lower() in ("", "none")
    else:
        assert isinstance(chain, Chain) and str(chain)


@given(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(FIELDS), value, max_size=2))
def test_parameters_of_every_method(name: str, given: dict[str, Any]) -> None:
    """A method is made, and makes sense, or a ValueError says why not."""
    taken = {f.name for f in fields(vtc.methods()[name])}
    made = tried(lambda: resolve(name, **given), FileNotFoundError)  # of routers
    if made is None:
        return
    (method,) = made
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
    optional={
        "id": json_value,
        "kind": json_value,
        "metric": st.sampled_from(["vqa", "anls", "x"]),
    },
)
ODD = [b"", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{", DEEP.encode(), b"9" * 5000, b'"\\ud800"', b"NaN"]
line = st.one_of(
    (row | good | json_value).map(lambda x: json.dumps(x).encode()),
    st.binary(max_size=20),
    st.sampled_from(ODD),
)


@given(lines=st.lists(line, max_size=5), metric=st.none() | text)
def test_task_files(folder: Path, lines: list[bytes], metric: str | None) -> None:
    """Good rows are asked whatever the others hold; every other line is told of."""
    path = folder / "task.jsonl"
    sound = json.dumps({"image": "a.png", "question": "which?", "answer": "a"}).encode()
    path.write_bytes(b"\n".join([*lines, sound]))
    task = tried(lambda: files.open_path(path, metric=metric))
    if task is None:  # the metric is unknown, or no row has its kind of answer
        assert metric is not None or b"metric" in path.read_bytes()
        return
    count = sum(bool(x.strip()) for x in path.read_bytes().split(b"\n"))
    assert len(task) + len(task.problems) >= count - 1 and len(task) >= 1
    assert all(where and why for where, why in task.problems)


@given(lines=st.lists(line | st.sampled_from([b'{"open": 1}', b'{"index": 2}']), min_size=1))
def test_journals(folder: Path, lines: list[bytes]) -> None:
    data = b"\n".join(lines) + b"\n"
    made = tried(lambda: journal._parse(folder / "x", data), journal.JournalError)
    if made is None:
        return
    header, rows = made
    assert "open" in header and all("index" in r for r in rows)


@given(data=line, suffix=st.sampled_from([".json", ".txt"]))
def test_result_files_and_class_names(folder: Path, data: bytes, suffix: str) -> None:
    path = folder / ("made" + suffix)
    path.write_bytes(data)
    tried(lambda: report.read([path]))
    names = tried(lambda: galleries.class_names(["a", "b"], path))
    assert names is None or (len(names) == 2 and all(map(str.strip, names)))
