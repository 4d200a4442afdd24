# SPDX-License-Identifier: Apache-2.0
"""`vtc.calibrate`: the divergence, its bounds, the rule, and what is refused."""

from __future__ import annotations

import json
import math
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mini
import mini_llava
import numpy as np
import pytest
import torch
from PIL import Image
from snapshot import snapshot
from typer.testing import CliRunner

import vtc
from vtc import cli
from vtc.benchmarks.accuracy import calibration
from vtc.benchmarks.shared.prompts import make_batches
from vtc.benchmarks.support import mini_families
from vtc.benchmarks.support.mini_models import mini_llava as mini_model
from vtc.benchmarks.support.mini_models import mini_processor
from vtc.benchmarks.tasks.items import BadItem, Entry, Questions
from vtc.method import Chain
from vtc.methods.fastv import FastV
from vtc.methods.random import Random
from vtc.methods.tome import ToMe
from vtc.methods.uniform import Uniform
from vtc.transformers_contract import cache_left, giving
from vtc.tuning import bounds, divergence
from vtc.tuning import calibrate as calibrating
from vtc.tuning.bounds import mean_bound, share_bound
from vtc.tuning.calibrate import CAP, Point, calibrate
from vtc.tuning.divergence import kl_divergence
from vtc.views.decoder import DecoderView

LOOSE = 1.999
"""A limit that any divergence passes, with few prompts."""


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "DRAWS", 1000)


@pytest.fixture
def model() -> Any:
    """A random LLaVA with opinions, so that compression changes its answers."""
    net = mini_llava.build()
    with torch.no_grad():
        net.lm_head.weight.mul_(30)
    return net


@pytest.fixture
def samples() -> list[dict[str, torch.Tensor]]:
    return [mini_llava.prompt(batch=4, seed=seed) for seed in range(3)]


def one_point(model: Any, samples: Any, method: Any, ratio: float, **more: Any) -> Point:
    """The point of a single budget."""
    (point,) = calibrate(
        model, samples, method, LOOSE, grid=(ratio,), steps=0, max_new_tokens=4, **more
    ).curve
    return point


# ---- the divergence
# -------------------------------------------------------------------------------


def test_divergence_is_the_one_computed_by_hand() -> None:
    stock, other = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log(), torch.empty(2, 3)
    other = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.3, 0.5]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.05)
    got = kl_divergence(stock + 3.0, other - 2.0)  # logits are free up to a constant
    assert got.tolist() == pytest.approx([by_hand, 0.0], abs=1e-6)
    assert got[0] != pytest.approx(kl_divergence(other[:1], stock[:1] + 1e-9).item(), abs=0.1)
    assert kl_divergence(stock.bfloat16(), stock.bfloat16()).tolist() == [0.0, 0.0]


def written_by_hand(model: Any, row: dict[str, Any], method: Any, steps: int) -> tuple[Any, Any]:
    """Greedy tokens of the stock model, and the mean divergence, by a manual decoding loop."""

    def logits(answer: torch.Tensor | None) -> torch.Tensor:
        out = model(**row, use_cache=True)
        found = [out.logits[:, -1]]
        for t in range(steps - 1):
            token = found[-1].argmax(-1) if answer is None else answer[:, t]
            out = model(input_ids=token[:, None], **giving(model, cache_left(out)))
            found.append(out.logits[:, -1])
        return torch.stack(found, 1)

    with torch.no_grad():
        p = logits(None)
        answer = p.argmax(-1)
        with vtc.compressing(model, method):
            q = logits(answer)
    kl = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    return answer, (kl.mean(1).clamp_max(CAP), (q.argmax(-1) == answer).all(1))


@pytest.mark.parametrize("name", ["fastv", "divprune", "tome", "prefixkv"])
def test_the_compressed_model_writes_the_stock_answer(model: Any, samples: Any, name: str) -> None:
    """Against a manual loop over prompts one by one, on the compressed cache."""
    method = vtc.methods()[name](keep_ratio=0.5)
    kl, same = [], []
    for sample in samples:
        for r in range(4):
            row = {k: v[r : r + 1] for k, v in sample.items()}
            _, (one, unchanged) = written_by_hand(model, row, method, 4)
            kl += one.tolist()
            same += unchanged.tolist()
    point = one_point(model, samples, name, 0.5)
    assert max(kl) > 0.05, "nothing changed, no teeth"
    assert point.kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert point.agreement == pytest.approx(np.mean(same))
    assert point.kl_low <= point.kl <= point.kl_high


def test_agreement_is_that_of_free_answers(model: Any, samples: Any) -> None:
    """Whether the stock answer would have come by itself says whether it does."""
    method, same = FastV(keep_ratio=0.25), []
    for sample in samples:
        how = {**sample, "max_new_tokens": 4, "do_sample": False}
        want = model.generate(**how)
        with vtc.compressing(model, method):
            same += (model.generate(**how) == want).all(1).tolist()
    assert 0 < sum(same) < len(same), "no teeth"
    assert one_point(model, samples, "fastv", 0.25).agreement == np.mean(same)


def test_an_answer_ends_with_its_end_token(model: Any, samples: Any) -> None:
    """Tokens that `generate` writes behind it are not compared; the end itself is."""
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    first = model.generate(**samples[0], max_new_tokens=4, do_sample=False)[:, -4:]
    end = first[0, 1].item()  # the first row ends at its second token, if not before
    model.generation_config.eos_token_id = [end]
    answer = divergence.StockAnswer.of(model, samples[0], 4)
    for row, written in zip(answer.tokens.tolist(), answer.written.tolist()):
        length = row.index(end) + 1 if end in row else len(row)
        assert written == [i < length for i in range(len(row))]
    assert not answer.written.all(), "no row ended, no teeth"
    kl = []
    for sample in samples:
        for r in range(4):
            row = {k: v[r : r + 1] for k, v in sample.items()}
            tokens, _ = written_by_hand(model, row, Uniform(keep_ratio=0.5), 4)
            found = tokens[0].tolist()
            length = found.index(end) + 1 if end in found else 4
            kl += written_by_hand(model, row, Uniform(keep_ratio=0.5), length)[1][0].tolist()
    assert one_point(model, samples, "uniform", 0.5).kl == pytest.approx(np.mean(kl), rel=1e-3)


def test_everything_kept_is_no_divergence(model: Any, samples: Any) -> None:
    point = one_point(model, samples, "pitome", 1.0)
    assert (point.kl, point.agreement, point.final_tokens) == (pytest.approx(0, abs=1e-6), 1.0, 16)
    assert point.flops_share == 1.0
    assert point.kl_high == pytest.approx(CAP * (1 - 0.05 ** (1 / 12)), rel=0.1)
    assert point.promised_loss == pytest.approx(1 - 0.05 ** (1 / 12), abs=1e-6)
    assert point.promised_shift == pytest.approx(math.sqrt(point.kl_high / 2))


def test_samples_may_be_batched_in_any_way(model: Any, samples: Any) -> None:
    rows = [{k: v[r : r + 1] for k, v in s.items()} for s in samples for r in range(4)]
    one, all_ = (one_point(model, given, "divprune", 0.25) for given in (rows, samples))
    assert one.kl == pytest.approx(all_.kl, rel=1e-3)
    assert (one.agreement, one.final_tokens) == (all_.agreement, all_.final_tokens)


@dataclass(frozen=True, kw_only=True)
class Looking(FastV):
    """Notes how long the sequence is that it sees."""

    def on_decoder_layer(self, v: DecoderView) -> Any:
        SEEN.append(v.hidden.shape[1])
        return super().on_decoder_layer(v)


SEEN: list[int] = []


def test_methods_never_see_the_answer(model: Any, samples: Any) -> None:
    SEEN.clear()
    one_point(model, samples, Looking(), 0.5)
    assert set(SEEN) == {samples[0]["input_ids"].shape[1]}
    assert len(SEEN) == 3, "more than the prefill of each sample"


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "InternVL"])
def test_other_families(family: str) -> None:
    net = mini_families.build(family)
    sizes = mini_families.EVERY[family].sizes
    given = [mini_families.prompt(family, [[sizes[0]]], seed=seed) for seed in range(4)]
    found = calibrate(net, given, "divprune", LOOSE, grid=(1.0, 0.5), steps=0, max_new_tokens=3)
    assert found.curve[0].kl == pytest.approx(0.0, abs=1e-6)
    assert found.curve[0].agreement == 1.0
    assert found.curve[1].kl > 1e-6
    assert found.curve[1].final_tokens < found.curve[0].final_tokens


# ---- the bounds
# -----------------------------------------------------------------------------------


def test_the_bound_of_a_share() -> None:
    assert share_bound(0, 64) == pytest.approx(1 - 0.05 ** (1 / 64), abs=1e-8)
    assert share_bound(3, 10) == pytest.approx(0.6066242, abs=1e-6)  # Beta(4, 7) at 95 %
    assert share_bound(30, 500) == pytest.approx(0.0805047, abs=1e-6)
    assert share_bound(7, 7) == 1.0
    assert share_bound(900, 20_000) == pytest.approx(0.0475, abs=2e-4)


def test_the_bound_of_a_mean_is_clopper_pearson_of_zeros_and_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounds, "DRAWS", 30_000)
    for ones, of in ((0, 64), (3, 10), (20, 40)):
        values = np.arange(of) < ones
        assert mean_bound(values, 1.0) == pytest.approx(share_bound(ones, of), rel=0.02)
    assert mean_bound(np.full(50, CAP), CAP) == pytest.approx(CAP)


def test_the_bound_holds_where_few_prompts_have_all_the_divergence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """3 % of the prompts change a lot: a bootstrap's bound fails in a fifth of the trials."""
    monkeypatch.setattr(bounds, "DRAWS", 300)
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        rare = rng.random(n) < 0.03
        return np.where(rare, rng.exponential(2.0, n), rng.exponential(0.005, n)).clip(max=CAP)

    truth, trials = draw(1_000_000).mean(), [draw(64) for _ in range(100)]
    held = np.mean([mean_bound(values, CAP, i) >= truth for i, values in enumerate(trials)])
    assert held >= 0.95
    plain = [np.quantile(rng.choice(values, (300, 64)).mean(1), 0.95) >= truth for values in trials]
    assert np.mean(plain) < 0.85


# ---- the rule
# -------------------------------------------------------------------------------------


def search_on(monkeypatch: pytest.MonkeyPatch, bound: Any, refuse: int = 0) -> list[int]:
    """Let `calibrate` search a made-up curve of 576 tokens; gives the counts that it asks for."""
    asked: list[int] = []

    class Fake(calibrating._CurveSearch):
        def __init__(self, *_: Any) -> None:
            self.members, self.tune, self.tokens = (Uniform(),), -1, 576
            self.calls = self.prompts = 1000
            self.points, self.refused = {}, {}

        def measure(self, counts: Any) -> None:
            for k in counts:
                asked.append(k)
                if k < refuse:
                    self.refused[k] = ValueError(f"no fewer than {refuse}")
                else:
                    high = bound(k)
                    self.points[k] = Point(k / 576, k, k / 576, high / 2, 0.0, high, 1.0, 0.1, 0.1)

    monkeypatch.setattr(calibrating, "_CurveSearch", Fake)
    return asked


def test_the_strongest_that_passes_is_found_to_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for least in (1, 2, 37, 100, 287, 575):
        asked = search_on(monkeypatch, lambda k, least=least: 0.1 if k >= least else 0.3)
        found = calibrate(None, [], "uniform", 0.2, steps=12)  # type: ignore[arg-type]
        assert found.keep_ratio == least / 576
        assert found.method == Uniform(keep_ratio=least / 576)
        assert len(asked) == len(set(asked)), "a budget was measured twice"
        assert [p.keep_ratio for p in found.curve] == sorted((k / 576 for k in asked), reverse=True)


def test_bisection_is_stopped_after_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = search_on(monkeypatch, lambda k: 20 / k)
    found = calibrate(None, [], "uniform", 0.2, steps=2)  # type: ignore[arg-type]
    assert asked[:5] == [576, 288, 144, 72, 36] and len(asked) == 7
    assert found.chosen.kl_high <= 0.2 < min(20 / k for k in asked if k < found.keep_ratio * 576)


def test_the_upper_bound_decides_and_not_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    search_on(monkeypatch, lambda k: 20 / k)  # the mean is half of it
    found = calibrate(None, [], "uniform", 0.2, steps=12)  # type: ignore[arg-type]
    assert found.keep_ratio == 100 / 576


def test_a_curve_that_falls_again_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weaker compression has to pass as well."""
    search_on(monkeypatch, lambda k: 0.3 if 130 < k < 150 else 0.1)
    found = calibrate(None, [], "uniform", 0.2, steps=12)  # type: ignore[arg-type]
    assert found.keep_ratio == 150 / 576
    assert any(p.keep_ratio < found.keep_ratio and p.kl_high < 0.2 for p in found.curve)


def test_budgets_that_the_method_refuses_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    search_on(monkeypatch, lambda k: 0.1, refuse=50)
    found = calibrate(None, [], "uniform", 0.2, steps=12)  # type: ignore[arg-type]
    assert found.keep_ratio == 50 / 576
    search_on(monkeypatch, lambda k: 0.1, refuse=1000)
    with pytest.raises(vtc.UnsupportedError, match=r"ran at no budget .* no fewer than 1000"):
        calibrate(None, [], "uniform", 0.2)  # type: ignore[arg-type]


def test_budgets_that_a_method_cannot_reach_are_left_out(model: Any, samples: Any) -> None:
    """ToMe halves the tokens in every block at most."""
    how = {"steps": 0, "max_new_tokens": 1}
    found = calibrate(model, samples, "tome", LOOSE, grid=(0.5, 0.06), **how)
    assert [p.keep_ratio for p in found.curve] == [0.5]
    with pytest.raises(vtc.UnsupportedError, match=r"tome.* ran at no budget .*out of reach"):
        calibrate(model, samples, "tome", LOOSE, grid=(0.06,), **how)


def test_nothing_that_passes_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    search_on(monkeypatch, lambda k: 0.5 + 1 / k)
    with pytest.raises(vtc.UnsupportedError, match=r"within 0.2 nats at no .*keep_ratio 1.0000"):
        calibrate(None, [], "uniform", 0.2)  # type: ignore[arg-type]


def test_a_real_search(model: Any, samples: Any) -> None:
    """All of it on a model: the chosen point is within the limit, and `wrap` takes the method."""
    with torch.no_grad():
        model(**samples[0])  # transformers installs hooks of its own on the first call
    before, calls = snapshot(model), []
    found = vtc.calibrate(
        *(model, samples, "fastv", 0.9),
        max_new_tokens=4,
        steps=2,
        progress=lambda text, done, total: calls.append((text, done, total)),
    )
    assert snapshot(model) == before
    assert found.chosen in found.curve
    assert found.chosen.kl_high <= 0.9
    below = [p for p in found.curve if p.keep_ratio < found.keep_ratio]
    assert below and below[0].kl_high > 0.9
    assert found.method == FastV(keep_ratio=found.keep_ratio)
    assert found.prompts == 12
    for p in found.curve:  # five of the grid and two steps share the 5 %
        changed = round(12 * (1 - p.agreement))
        assert p.promised_loss == share_bound(changed, 12, 1 - 0.05 / 7)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["samples"] == 12 and data["chosen"] in data["curve"]
    assert f"-> keep_ratio {found.keep_ratio:.4f}" in str(found)
    with vtc.compressing(model, found.method) as session, torch.no_grad():
        model(**samples[0])
        assert session.report().final_tokens == found.chosen.final_tokens
    assert [done for _, done, _ in calls] == list(range(1, len(calls) + 1))
    assert all(done <= total for _, done, total in calls)
    assert calls[0][0] == "uncompressed" and calls[1][0] == "fastv, 16 of 16"


def test_chains(model: Any, samples: Any) -> None:
    pair = vtc.chain(Random(keep_ratio=0.75), FastV(k=3, keep_tokens=1))
    found = calibrate(model, samples, pair, LOOSE, grid=(0.5,), steps=0, max_new_tokens=2)
    assert isinstance(found.method, Chain)
    assert found.method.methods == (pair.methods[0], FastV(k=3, keep_ratio=0.5))
    assert found.chosen.final_tokens == 8
    found = calibrate(model, samples, pair, LOOSE, grid=(0.5,), steps=0, max_new_tokens=2, tune=0)
    assert isinstance(found.method, Chain)
    assert found.method.methods == (Random(keep_ratio=0.5), pair.methods[1])
    with pytest.raises(ValueError, match=r"tune=2: .* has 2 methods"):
        calibrate(model, samples, pair, 0.5, tune=2)


def test_one_sample_is_in_memory_at_a_time(model: Any, samples: Any) -> None:
    alive: list[weakref.ref] = []

    class Disk:
        """Reads each sample when its turn comes."""

        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for seed in range(3):
                assert sum(ref() is not None for ref in alive) <= 1
                sample = mini_llava.prompt(batch=4, seed=seed)
                alive.append(weakref.ref(sample["pixel_values"]))
                yield sample

    got, want = (one_point(model, given, "uniform", 0.5) for given in (Disk(), samples))
    assert got == want
    assert len(alive) > 3


# ---- what is refused
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_divergence": 0.0}, r"max_divergence is in nats, in \(0, 2\); got 0.0"),
        ({"max_divergence": 2.0}, "got 2.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1"),
        ({"steps": -1}, "steps at least 0"),
        ({"grid": ()}, r"grid holds budgets in \(0, 1\]"),
        ({"grid": (0.5, 1.5)}, r"grid .* got \(0.5, 1.5\)"),
        ({"method": "fast"}, "did you mean fast"),
        ({"samples": []}, "samples is empty"),
        ({"samples": iter([])}, "an iterator, which can be read once"),
        ({"samples": mini_llava.prompt()}, "samples is a list"),
        ({"samples": [torch.zeros(2, 3)]}, r"sample 0 is a mapping .*input_ids.*got Tensor"),
        ({"samples": [{"pixel_values": 1}]}, r"got \['pixel_values'\]"),
        ({"max_divergence": 0.2}, r"12 prompts cannot show .* 0.2 nats at 95%.* at least 29"),
    ],
)
def test_bad_arguments(model: Any, samples: Any, arguments: dict, message: str) -> None:
    given = {"samples": samples, "method": "random", "max_divergence": 0.9, **arguments}
    with pytest.raises(ValueError, match=message):
        calibrate(model, **given)


def test_enough_prompts_are_enough(model: Any) -> None:
    """The number in the message suffices; fewer could not pass even with the stock model itself."""
    assert CAP * share_bound(0, 26) < 0.22 < CAP * share_bound(0, 25)
    with pytest.raises(ValueError, match="at least 26"):
        calibrate(model, [mini_llava.prompt(batch=25)], "uniform", 0.22)
    rows = [mini_llava.prompt(batch=28)]
    assert calibrate(model, rows, "uniform", 0.22, grid=(1.0,), steps=0, max_new_tokens=1)


def test_samples_without_an_image(model: Any, samples: Any) -> None:
    blind = {"input_ids": samples[0]["input_ids"][:, -5:]}
    for given in ([blind, *samples], [*samples, blind]):
        with pytest.raises(ValueError, match=r"sample [03] has no image or video; leave it out"):
            calibrate(model, given, "fastv", LOOSE, max_new_tokens=1)


def test_samples_that_change(model: Any, samples: Any) -> None:
    class Shrinking:
        left = 4

        def __iter__(self) -> Iterator[Any]:
            self.left -= 1
            return iter(samples[: self.left])

    with pytest.raises(ValueError, match=r"12 prompts when they were read first and 4 now"):
        calibrate(model, Shrinking(), "fastv", LOOSE, max_new_tokens=1)


def test_an_encoder_alone_has_no_answers() -> None:
    given = [{"input_ids": torch.zeros(40, 1), "pixel_values": mini.images()}]
    net = mini.ENCODERS["hf-clip"]()
    with pytest.raises(vtc.UnsupportedError, match=r"does not generate.* classification task"):
        calibrate(net, given, "tome", LOOSE)


def test_methods_that_do_not_fit(model: Any, samples: Any) -> None:
    with pytest.raises(vtc.UnsupportedError, match=r"tome\(r=4\) has no keep_ratio"):
        calibrate(model, samples, ToMe(r=4), LOOSE, max_new_tokens=1)
    with pytest.raises(vtc.UnsupportedError, match=r"\[CLS\]"):
        calibrate(mini_llava.build("siglip"), samples, "fastervlm", LOOSE, max_new_tokens=1)
    vtc.wrap(model, "random")
    with pytest.raises(ValueError, match="already wrapped"):
        calibrate(model, samples, "fastv", LOOSE)


def test_logits_that_are_not_numbers(
    model: Any, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = torch.full((4,), torch.nan)
    monkeypatch.setattr(divergence, "kl_divergence", lambda p, q: nothing)
    with pytest.raises(ValueError, match=r"sample 0: the logits are not finite .* wider dtype"):
        one_point(model, samples, "uniform", 0.5)


# ---- the benchmark and the commands
# ----------------------------------------------------------------


def make_task(images: int = 12, questions: int = 3, broken: tuple[int, ...] = ()) -> Questions:
    """Questions about random images, those of the broken ones unreadable."""
    words = ("is there a red circle ?", "what shape ?", "is there a blue square ?")

    def load(i: int) -> Image.Image:
        if i in broken:
            raise BadItem(f"image {i}: no image at all")
        rng = np.random.default_rng(i)
        return Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8))

    entries = [
        Entry(i, lambda i=i: load(i), words[q], "yes", "k")  # type: ignore[misc]
        for q in range(questions)
        for i in range(images)
    ]
    return Questions("toy", entries, "one-word")


def test_samples_and_held_out_questions_share_no_image() -> None:
    task = make_task(broken=(1, 8))
    first, rest, skipped = calibration.split(task, 4, 15, 0)
    keys = task.image_keys()
    assert [keys[i] for i in first] == [0, 2, 3, 4]
    assert [keys[i] for i in rest] == [5] * 3 + [6] * 3 + [7] * 3 + [9] * 3 + [10] * 3
    assert len(set(rest)) == 15
    assert skipped == [
        {"where": "image 1", "why": "no image at all"},
        {"where": "image 8", "why": "no image at all"},
    ]
    assert len({task[i].question for i in first}) > 1, "always the first question of an image"
    with pytest.raises(ValueError, match=r"12 images, 2 of them unreadable.*18 questions"):
        calibration.split(task, 4, 19, 0)


@pytest.fixture(scope="module")
def toy() -> tuple[Any, Any]:
    net = mini_model()
    with torch.no_grad():
        net.lm_head.weight.mul_(30)
    return net, mini_processor(net)


def test_the_benchmark_measures_what_was_lost(toy: Any) -> None:
    net, processor = toy
    settings = calibration.CalibrationSettings(
        methods=("fastv", "pitome", "mod"),
        samples=8,
        held_out=9,
        max_divergence=1.5,
        max_new_tokens=2,
        grid=(1.0, 0.25),
        steps=1,
        batch_size=4,
    )
    task, saved = make_task(), []
    result = calibration.run(
        net, processor, task, settings, save=lambda r: saved.append((len(r["rows"]), r["finished"]))
    )
    assert saved == [(1, False), (2, False), (3, False), (3, True)]
    fastv, pitome, mod = json.loads(json.dumps(result))["rows"]
    assert "mod" in mod["error"] and "curve" not in mod
    for row in (fastv, pitome):
        assert row["chosen"]["kl_high"] <= 1.5
        held = row["held_out"]
        assert [h["keep_ratio"] for h in held] == [p["keep_ratio"] for p in row["curve"]]
        assert held[0]["loss"] == 0.0 and held[0]["agreement"] == 1.0
        for h in held:
            assert h["loss"] == pytest.approx(h["stock_accuracy"] - h["accuracy"])
            assert h["loss_low"] <= h["loss"] <= h["loss_high"]
    assert result["images"] == 3


def test_sharing_the_encoder_changes_nothing(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, processor = toy
    settings = calibration.CalibrationSettings(
        methods=("fastv",),
        samples=8,
        held_out=9,
        max_divergence=1.5,
        max_new_tokens=2,
        grid=(0.25,),
        steps=0,
        batch_size=4,
    )
    found = []
    for alone in (True, False):
        monkeypatch.setattr(calibration, "leaves_encoder_alone", lambda method, alone=alone: alone)
        (row,) = calibration.run(net, processor, make_task(), settings)["rows"]
        found.append([*row["curve"], *row["held_out"]])
    for shared, fresh in zip(*found, strict=True):
        assert shared == pytest.approx(fresh, rel=1e-3, abs=1e-6)


def invoke(*args: str) -> Any:
    return CliRunner().invoke(cli.app, list(args))


@pytest.fixture
def commands(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.tune, "load", lambda *_: toy)
    monkeypatch.setattr(
        "vtc.benchmarks.tasks.registry.open_task", lambda spec, n, seed: make_task()
    )


def test_the_command_calibrates(commands: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = invoke(
        *("calibrate", "scenes", "--methods", "random,fastv", "--samples", "8", "--held-out", "6"),
        *("--max-divergence", "1.5", "--steps", "0", "--max-new-tokens", "2"),
        *("--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    assert "keep_ratio" in done.stdout and "promised" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"calibration-toy.json", "calibration-toy.png"}
    result = json.loads((tmp_path / "calibration-toy.json").read_text())
    assert result["finished"] and result["command"].startswith("vtc")


def test_calibrate_without_matplotlib_and_with_a_method_that_does_not_fit(
    commands: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = invoke(
        *("calibrate", "scenes", "--methods", "evs,random", "--samples", "8", "--held-out", "0"),
        *("--max-divergence", "1.5", "--steps", "0", "--max-new-tokens", "2"),
        *("--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    assert (
        'no plot without matplotlib; pip install "visual-token-compression[bench]"' in done.stderr
    )
    assert "evs: " in done.stderr and "evs" not in done.stdout
    assert "random" in done.stdout
    assert f"written: {tmp_path / 'calibration-toy.json'}\n" in done.stdout


def test_unlabeled_data_calibrate_without_held_out_questions(
    commands: None, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    done = invoke(
        *("calibrate", "my.jsonl", "--methods", "random", "--samples", "8", "--held-out", "0"),
        *("--max-divergence", "1.5", "--steps", "0", "--max-new-tokens", "2"),
        *("--out", str(tmp_path), "--json"),
    )
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    assert row["held_out"] == [] and row["chosen"]["kl_high"] <= 1.5


def test_the_command_matches(commands: None, tmp_path: Path) -> None:
    done = invoke("match", "fastv,visionzip", "--flops", "0.6", "--tolerance", "0.05", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["method"].split("(")[0] for row in rows] == ["fastv", "visionzip"]
    model = types.SimpleNamespace()
    for row in rows:
        assert row["flops_share"] == pytest.approx(0.6, abs=0.05)
        wrapped = eval(row["python"], {"vtc": types.SimpleNamespace(wrap=_made), "model": model})
        assert str(wrapped) == row["method"]
    Image.new("RGB", (30, 40)).save(tmp_path / "picture.png")
    done = invoke(
        *("match", "random,fastv", "--flops", "0.3", "--tolerance", "0.05"),
        *("--image", str(tmp_path / "picture.png"), "--question", "what shape ?"),
    )
    assert done.exit_code == 0, done.output
    assert 'vtc.wrap(model, "random", keep_ratio=' in done.stdout
    assert "left out: fastv() cannot cost 30.0%" in done.stderr


def _made(model: Any, name: str, **parameters: Any) -> Any:
    return vtc.methods()[name](**parameters)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["match", "fast", "--flops", "0.4"], "did you mean fast"),
        (["match", ",", "--flops", "0.4"], "at least one method"),
        (["match", "fastv", "--flops", "40"], "in (0, 1]; got 40"),
        (["match", "fastv", "--flops", "0.4", "--which", "some"], "some"),
        (["match", "fastv", "--flops", "0.4", "--image", "none.png"], "none.png"),
        (["calibrate", "--methods", "fast"], "did you mean fast"),
        (["calibrate", "--samples", "20"], "12 images"),
        (["calibrate", "--samples", "8", "--held-out", "6"], "cannot show"),
    ],
)
def test_mistakes_are_one_clear_line(commands: None, args: list[str], says: str) -> None:
    done = invoke(*args)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and says in done.stderr
    assert "Traceback" not in done.output


def test_no_method_within_reach_is_an_error(commands: None) -> None:
    done = invoke("match", "fastv", "--flops", "0.01")
    assert done.exit_code == 2
    assert "left out: fastv() cannot cost 1.0%" in done.stderr


def test_batches_are_read_when_their_turn_comes(toy: Any) -> None:
    net, processor = toy
    task = make_task()
    prompts = calibration.Prompts(net, processor, task, range(10), 4)
    (want,) = make_batches(processor, [task[i] for i in range(4)], 4)
    assert len(prompts) == 3
    for inputs, rows in zip(prompts, (4, 4, 2)):
        assert len(inputs["input_ids"]) == rows
    first = next(iter(prompts))
    torch.testing.assert_close(first["pixel_values"], want.inputs(net)["pixel_values"])
