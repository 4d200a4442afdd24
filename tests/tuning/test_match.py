# SPDX-License-Identifier: Apache-2.0
"""`vtc.match`: several methods at the same FLOPs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import mini
import mini_llava
import pytest
import torch
from snapshot import snapshot

import vtc
from vtc.method import Chain
from vtc.methods.fastv import FastV
from vtc.methods.random import Random
from vtc.methods.todre import ToDRE
from vtc.methods.tome import ToMe
from vtc.methods.uniform import Uniform


@pytest.fixture
def model() -> Any:
    return mini_llava.build()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return mini_llava.prompt()


def shares(model: Any, inputs: Any, method: Any) -> tuple[float, float]:
    """(all FLOPs, LLM FLOPs of visual tokens) of a method, relative to the stock model."""
    with vtc.compressing(model, method) as session, torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
        report = session.report()
    llm = float("nan") if report.flops is None else report.flops / report.flops_full
    return report.flops_all / report.flops_all_full, llm


class Prefills:
    """Counts the forwards of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.handle = model.register_forward_pre_hook(self._count)
        self.count = 0

    def _count(self, module: Any, args: Any) -> None:
        self.count += 1


@pytest.fixture
def prefills(model: Any) -> Iterator[Prefills]:
    counter = Prefills(model)
    yield counter
    counter.handle.remove()


def test_methods_of_every_kind_cost_the_same(model: Any, inputs: Any) -> None:
    names = ["fastv", "visionzip", "divprune", "tome", "vscan", "tops", "random"]
    for which, target in (("llm", 0.5), ("all", 0.8)):
        found = vtc.match(names, target, model=model, inputs=inputs, which=which, tolerance=0.04)
        assert list(found) == names
        for name, method in found.items():
            assert type(method) is vtc.methods()[name]
            got = shares(model, inputs, method)[which == "llm"]
            assert got == pytest.approx(target, abs=0.04)
            assert not hasattr(model, "vtc")
    # Early pruning must keep more than pruning in front of the LLM: they do differ in tokens.
    assert found["fastv"].keep_ratio < found["random"].keep_ratio


def test_it_finds_a_known_budget(model: Any, inputs: Any, prefills: Prefills) -> None:
    """The share of a budget leads back to that budget: nothing else is within the tolerance."""
    for k in (1, 5, 8, 15, 16):
        want = shares(model, inputs, Uniform(keep_tokens=k))[0]
        prefills.count = 0
        found = vtc.match(["uniform"], want, model=model, inputs=inputs, tolerance=1e-6)
        assert found["uniform"].budget(16) == k
        assert prefills.count <= 1 + 5  # the stock model, and log2(16) steps and one


def test_other_parameters_stay(model: Any, inputs: Any) -> None:
    given = FastV(k=3, keep_tokens=2, positions="compact")
    found = vtc.match(given, 0.8, model=model, inputs=inputs, which="llm", tolerance=0.03)
    method = found["fastv"]
    assert isinstance(method, FastV)
    assert (method.k, method.positions, method.keep_tokens) == (3, "compact", None)
    assert method.keep_ratio is not None and given.keep_tokens == 2
    both = vtc.match(
        [FastV(k=1), FastV(k=3)], 0.8, model=model, inputs=inputs, which="llm", tolerance=0.03
    )
    assert list(both) == ["fastv(k=1)", "fastv(k=3)"]
    assert both["fastv(k=1)"].keep_ratio > both["fastv(k=3)"].keep_ratio  # type: ignore


def test_chains(model: Any, inputs: Any) -> None:
    pair = vtc.chain(Random(keep_ratio=0.75), FastV(k=2))
    found = vtc.match(
        [pair, "random"], 0.5, model=model, inputs=inputs, which="llm", tolerance=0.03
    )
    tuned = found["random + fastv"]
    assert isinstance(tuned, Chain) and tuned.methods[0] == pair.methods[0]
    assert tuned.methods[1].keep_ratio not in (None, 0.5)
    assert shares(model, inputs, tuned)[1] == pytest.approx(0.5, abs=0.03)

    pair = vtc.chain(Random(), FastV(k=2, keep_tokens=4))
    found = vtc.match([pair], 0.5, model=model, inputs=inputs, which="llm", tolerance=0.03, tune=0)
    tuned = found["random + fastv"]
    assert isinstance(tuned, Chain) and tuned.methods[1] == pair.methods[1]
    assert shares(model, inputs, tuned)[1] == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match=r"tune=1: uniform.* has 1 method, counted from 0"):
        vtc.match([pair, "uniform"], 0.5, model=model, inputs=inputs, tune=1)
    pair = vtc.chain(Random(keep_ratio=0.75), FastV(k=2))
    with pytest.raises(vtc.UnsupportedError, match=r"reaches .* to 7[0-9]\.\d% here"):
        vtc.match([pair], 0.95, model=model, inputs=inputs, which="llm")


def test_shares_out_of_reach(model: Any, inputs: Any, prefills: Prefills) -> None:
    """FastV runs two of five layers on all tokens: 40 % of the LLM at least."""
    floor = shares(model, inputs, FastV(keep_tokens=1))[1]
    assert floor > 0.4
    message = rf"fastv.*cannot cost 30\.0% .* reaches {floor:.1%} to 100\.0% here"
    with pytest.raises(vtc.UnsupportedError, match=message):
        vtc.match(["random", "fastv"], 0.3, model=model, inputs=inputs, which="llm", tolerance=0.04)
    assert not hasattr(model, "vtc")
    with pytest.warns(UserWarning, match=rf"left out: {message}"):
        found = vtc.match(
            ["random", "fastv"],
            0.3,
            model=model,
            inputs=inputs,
            which="llm",
            tolerance=0.04,
            strict=False,
        )
    assert list(found) == ["random"]
    prefills.count = 0
    with pytest.raises(vtc.UnsupportedError, match="reaches"):
        vtc.match("fastv", 0.3, model=model, inputs=inputs, which="llm")
    assert prefills.count <= 10


def test_budgets_that_a_method_refuses(model: Any, inputs: Any) -> None:
    """ToMe halves at most in every block: one token of 16 is out of reach in two blocks' time."""
    with pytest.raises(ValueError, match=r"at most half|needs a layer"):
        shares(model, inputs, ToMe(keep_tokens=1))
    found = vtc.match("tome", 0.3, model=model, inputs=inputs, which="llm", tolerance=0.05)
    assert shares(model, inputs, found["tome"])[1] == pytest.approx(0.3, abs=0.05)
    with pytest.raises(vtc.UnsupportedError, match=r"reaches .* to 100.0% here .*(half|layer)"):
        vtc.match("tome", 0.05, model=model, inputs=inputs, which="llm")


class Picky(Uniform):
    """Refuses small budgets."""

    def on_features(self, v: Any) -> Any:
        if v.budget(self) < 12:
            raise ValueError("at least 12 tokens")
        return super().on_features(v)


def test_the_search_goes_on_above_a_refused_budget(model: Any, inputs: Any) -> None:
    for k in (12, 13, 15):
        want = shares(model, inputs, Uniform(keep_tokens=k))[0]
        found = vtc.match(Picky(), want, model=model, inputs=inputs, tolerance=1e-6)
        assert found["uniform"].budget(16) == k
    least = shares(model, inputs, Uniform(keep_tokens=12))[0]
    with pytest.raises(
        vtc.UnsupportedError, match=rf"reaches {least:.1%} to 100\.0% here \(at least 12 tokens\)"
    ):
        vtc.match(Picky(), least - 0.02, model=model, inputs=inputs, tolerance=1e-6)


def test_between_two_budgets(model: Any, inputs: Any) -> None:
    low, high = (shares(model, inputs, Uniform(keep_tokens=k))[0] for k in (7, 8))
    message = rf"nearest budgets cost {low:.1%} and {high:.1%}; raise the tolerance"
    with pytest.raises(vtc.UnsupportedError, match=message):
        vtc.match("uniform", (low + high) / 2, model=model, inputs=inputs, tolerance=1e-4)


def test_a_method_that_does_not_fit_the_model(inputs: Any) -> None:
    model = mini_llava.build("siglip")
    with pytest.raises(vtc.UnsupportedError, match=r"\[CLS\]"):
        vtc.match(["fastervlm"], 0.8, model=model, inputs=inputs, tolerance=0.05)
    with pytest.warns(UserWarning, match=r"left out: .*\[CLS\]"):
        found = vtc.match(
            ["fastervlm", "random"], 0.8, model=model, inputs=inputs, tolerance=0.05, strict=False
        )
    assert list(found) == ["random"]


def test_a_method_without_a_budget(model: Any, inputs: Any) -> None:
    with pytest.raises(vtc.UnsupportedError, match=r"tome\(r=4\) has no keep_ratio to tune"):
        vtc.match(ToMe(r=4), 0.8, model=model, inputs=inputs)
    # One whose own threshold drops more than the budget says is tuned all the same.
    found = vtc.match(ToDRE(tau=1.0), 0.4, model=model, inputs=inputs, which="llm", tolerance=0.04)
    assert found["todre"].tau == 1.0  # type: ignore[union-attr]
    with pytest.raises(vtc.UnsupportedError, match=r"cannot cost 95.0% .* to 80.0% here"):
        vtc.match(ToDRE(tau=1.0), 0.95, model=model, inputs=inputs, which="llm")


def test_an_encoder_alone() -> None:
    model, images = mini.ENCODERS["hf-clip"](), mini.images()
    found = vtc.match(["tome", "pitome"], 0.8, model=model, inputs=images, tolerance=0.02)
    for method in found.values():
        with vtc.compressing(model, method) as session, torch.no_grad():
            model(images)
            report = session.report()
        assert report.flops_all / report.flops_all_full == pytest.approx(0.8, abs=0.02)
    with pytest.raises(vtc.UnsupportedError, match="needs a language model"):
        vtc.match(["tome"], 0.8, model=model, inputs=images, which="llm")


def test_everything_and_the_model_as_it_was(model: Any, inputs: Any) -> None:
    with torch.no_grad():
        model(**inputs)  # transformers installs hooks of its own on the first call
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = vtc.match(["random", "fastv"], 1.0, model=model, inputs=inputs)
    assert [m.budget(16) for m in found.values()] == [16, 16]  # type: ignore[union-attr]
    assert snapshot(model) == before


def test_a_wrapped_model(model: Any, inputs: Any) -> None:
    vtc.wrap(model, "random")
    with pytest.raises(ValueError, match="already wrapped"):
        vtc.match(["fastv"], 0.5, model=model, inputs=inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flops": 0.0}, r"flops is a share .* in \(0, 1\]; got 0.0"),
        ({"flops": 40}, "got 40"),
        ({"flops": 0.5, "tolerance": 0.0}, "tolerance is a distance .* got 0.0"),
        ({"flops": 0.5, "which": "vision"}, "which is .* got 'vision'"),
        ({"flops": 0.5, "methods": ["fast"]}, "did you mean fast"),
    ],
)
def test_bad_arguments(model: Any, inputs: Any, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtc.match(**{"methods": ["random"], "model": model, "inputs": inputs, **arguments})


def test_a_method_that_refuses_every_budget(model: Any, inputs: Any) -> None:
    class Never(Uniform):
        """Refuses all budgets."""

        def on_features(self, v: Any) -> Any:
            raise ValueError("not today")

    with pytest.raises(vtc.UnsupportedError, match="ran at no budget that was tried: not today"):
        vtc.match(Never(), 0.3, model=model, inputs=inputs)
