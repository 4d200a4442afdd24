# SPDX-License-Identifier: Apache-2.0
"""Many images, many tokens, large images: work is linear and memory stays within formulas.

Work is counted (tests/support/work.py) and memory summed up (benchmarks/measure/allocations.py): no
clock. The table of docs/limits.md is `vtc.benchmarks.speed.memory_growth`'s.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from limit_cases import METHODS, made, square, steps
from PIL import Image
from work import growth

import vtc
from vtc.benchmarks.speed import memory_growth
from vtc.benchmarks.support import mini_families as mini
from vtc.kernels.attention_reduce import reference as attention_reference
from vtc.kernels.similarity_reduce import reference as similarity_reference
from vtc.methods import _common

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("LLaVA, CLIP", "LLaVA-NeXT", "Qwen2-VL", "InternVL")

FEW, MANY = 3, 12

BY_TOKENS = {
    "vispruner": "removes 8 near duplicates a round, so (N - k) / 8 rounds",
    "prefixkv": "256 query rows at a time",
    "downsample": "tries every length of a side",
}
"""Methods that do more steps for more tokens, never more than in proportion."""

QUADRATIC = {
    "cdpruner": lambda n, k: 4 * k * n,  # the Cholesky factor
    "tops": lambda n, k: 4 * n * n,  # every step reads all distances
    "vispruner": lambda n, k: 4 * n * n,
    "zero-tprune": lambda n, k: 2 * 4 * n * n,  # one head's map, and its scores before softmax
}
"""Bytes of what is held at once beyond O(N), by tokens and budget."""


@functools.cache
def build(family: str) -> Any:
    return mini.build(family)


@functools.cache
def prompt(family: str, images: int) -> dict[str, torch.Tensor]:
    size = mini.EVERY[family].sizes[0]
    return mini.prompt(family, [[1 if isinstance(size, int) else size] * images])


def more_than_linear(family: str, method: str, few: int, many: int) -> list[str] | None:
    chosen, model = made(method, family, 4), build(family)
    small = steps(model, prompt(family, few), chosen)
    large = steps(model, prompt(family, many), chosen)
    return None if small is None else growth(small, large, 1.05 * many / few)


# ---- work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_work_is_linear_in_images(method: str) -> None:
    """Every loop and every operator, on one family each; `make soak` runs all, to 100 images."""
    first = METHODS.index(method)
    turn = [FAMILIES[(first + i) % len(FAMILIES)] for i in range(len(FAMILIES))]
    few = 12 if method == "vidkv" else FEW  # below, there is too little to pack
    found = (more_than_linear(family, method, few, MANY // FEW * few) for family in turn)
    assert next(bad for bad in found if bad is not None) == []


@pytest.mark.soak
@pytest.mark.parametrize("family", list(mini.EVERY))
@pytest.mark.parametrize("method", METHODS)
def test_work_is_linear_to_a_hundred_images(method: str, family: str) -> None:
    assert not more_than_linear(family, method, 10, 100)


@pytest.mark.parametrize("method", METHODS)
def test_more_tokens_are_not_more_steps(method: str) -> None:
    """144 and 256 tokens of an image, the same budget: Python and torch do as many steps."""
    sides = (16, 24) if method == "vidkv" else (12, 16)  # enough to pack
    small, large = (steps(*square(s), made(method, "LLaVA, CLIP", 36)) for s in sides)
    most = 1.3 * (sides[1] / sides[0]) ** 2 if method in BY_TOKENS else 1.05
    assert growth(small, large, most) == []


@pytest.mark.parametrize("method", ["cdpruner", "divprune", "mob", "todre", "tops"])
def test_greedy_methods_take_as_many_steps_as_tokens(method: str) -> None:
    """By definition each step waits for the one before; then linear in the budget."""
    model, inputs = square(16)
    counts = [steps(model, inputs, made(method, "LLaVA, CLIP", k)).total() for k in (20, 40, 80)]
    assert counts[2] - counts[1] <= 2.6 * (counts[1] - counts[0])


@dataclass(frozen=True, kw_only=True)
class Pairs(vtc.Method):
    """Looks at every pair of images, and at every token, in Python."""

    name = "pairs"
    of: str = "images"

    def on_decoder_layer(self, v: Any) -> None:
        n = len(v.images[0]) if self.of == "images" else 0
        for _ in range(n * n):
            pass
        for _ in v.position[0].tolist() if self.of == "tokens" else ():
            pass


def test_loops_are_seen() -> None:
    model = build("LLaVA, CLIP")
    small, large = (steps(model, prompt("LLaVA, CLIP", n), Pairs()) for n in (FEW, MANY))
    assert "on_decoder_layer" in growth(small, large, 1.05 * MANY / FEW)[0]
    small, large = (steps(*square(side), Pairs(of="tokens")) for side in (12, 16))
    assert "on_decoder_layer" in growth(small, large, 1.05)[0]


# ---- memory --------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks held at once, made small beside what is measured."""
    monkeypatch.setattr(similarity_reference, "BLOCK", 1 << 12)
    monkeypatch.setattr(_common, "BLOCK", 1 << 12)
    monkeypatch.setattr(attention_reference, "BLOCK", 1 << 12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("small_blocks")
def test_memory_is_linear_in_tokens_or_as_documented(method: str) -> None:
    """Peaks at 144 and 576 tokens, budgets that grow along."""
    peaks = []
    for side in (12, 24):
        model, inputs = square(side)
        chosen = made(method, "LLaVA, CLIP", side**2 // 4)
        with vtc.compressing(model, chosen):
            peaks.append(memory_growth.peak(model, inputs))
    extra = 0
    if method in QUADRATIC:
        extra = QUADRATIC[method](576, 144)
        assert peaks[1] > 0.7 * extra, "needs less than its formula: update it"
    assert peaks[1] - extra < 4.6 * peaks[0], peaks


@pytest.mark.parametrize("family", ["Qwen2-VL", "Mistral 3", "LLaVA, Pixtral"])
def test_small_images_beside_a_large_one_stay_small(family: str) -> None:
    """Images were padded to the largest: one of 1024 patches and 40 of 16 took 100 times more."""
    large, small = {"Qwen2-VL": ((16, 16), (2, 2)), "Mistral 3": ((128, 128), (32, 32))}.get(
        family, ((128, 128), (16, 16))
    )
    model = build(family)
    inputs = mini.prompt(family, [[large] + [small] * 40])
    stock = memory_growth.peak(model, inputs)
    with vtc.compressing(model, made("visionzip", family, 2)):
        assert memory_growth.peak(model, inputs) < 2 * stock + 2**20


def test_a_run_beyond_the_limit_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory is an empty cell; any other error stays an error."""
    model, inputs = square(16)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not enough memory: you tried to allocate 4294967296 bytes")

    monkeypatch.setattr(model, "forward", fail)
    assert memory_growth.peak(model, inputs) is None
    monkeypatch.setattr(model, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory_growth.peak(model, inputs)
    with pytest.raises(RuntimeError, match="size of tensor"):
        memory_growth.peak(lambda **_: torch.ones(2) + torch.ones(3), {})


def test_the_table_is_that_of_its_numbers(tmp_path: Path) -> None:
    rows = memory_growth.measure(["random", "evs"], [400])
    assert [r["method"] for r in rows[:4]] == ["stock", "random", "stock, video", "evs"]
    assert all(r["peak_bytes"] > 0 for r in rows)
    mega = 2**20
    table = memory_growth.table(
        [
            {"method": "stock", "tokens": 1024, "peak_bytes": mega},
            {"method": "stock", "tokens": 4096, "peak_bytes": 4 * mega},
            {"method": "square", "tokens": 1024, "peak_bytes": 2 * mega},
            {"method": "square", "tokens": 4096, "peak_bytes": 32 * mega},
            {"method": "more", "tokens": 1024, "peak_bytes": mega},
            {"method": "more", "tokens": 4096, "peak_bytes": None},
        ]
    )
    assert table.splitlines()[2:] == [
        "| stock | 1.0 | 4.0 | 1.00 |",
        "| square | 2.0 | 32.0 | 2.00 |",
        "| more | 1.0 | more |  |",
    ]


def test_memory_from_the_command_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    limits: list[Any] = []
    monkeypatch.setattr(memory_growth.resource, "setrlimit", lambda *limit: limits.append(limit))
    out = tmp_path / "results" / "memory.csv"
    options = ["--methods", "mod,vidkv,evs", "--tokens", "400", "--limit", "1.5", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["memory", *options])
    memory_growth.main()
    names = ["stock", "mod", "vidkv", "stock, video", "evs"]
    assert [row["method"] for row in memory_growth.read(out)] == names
    table = memory_growth.table(memory_growth.read(out))
    assert capsys.readouterr().out.endswith(f"\n{table}\n")
    unlimited = memory_growth.resource.RLIM_INFINITY
    assert limits == [(memory_growth.resource.RLIMIT_DATA, (3 * 2**29, unlimited))]
    monkeypatch.setattr("sys.argv", ["memory", "--show", str(out)])
    memory_growth.main()
    assert capsys.readouterr().out == f"{table}\n"


def test_memory_of_methods_for_videos_alone() -> None:
    rows = memory_growth.measure(["evs"], [400])
    assert [row["method"] for row in rows] == ["stock, video", "evs"]
    assert [x.split(" |")[0] for x in memory_growth.table(rows).splitlines()[2:]] == [
        "| stock, video",
        "| evs",
    ]


def test_images_of_which_memory_is_measured_are_square() -> None:
    with pytest.raises(ValueError, match="one square image cannot have 1000 tokens"):
        memory_growth.image_prompt(1000)


def test_the_docs_show_the_recorded_table() -> None:
    recorded = memory_growth.table(
        memory_growth.read(ROOT / "benchmarks" / "data" / "memory-cpu.csv")
    )
    assert recorded in (ROOT / "docs" / "limits.md").read_text()


# ---- large images --------------------------------------------------------------------------------


def crops_of_4k(family: str) -> dict[str, Any]:
    """Pixels of an image of 4096 x 4096, cut as the family's own processor cuts it."""
    from transformers import LlavaNextImageProcessor, LlavaOnevisionImageProcessor

    kind = LlavaNextImageProcessor if family == "LLaVA-NeXT" else LlavaOnevisionImageProcessor
    crop = {"height": 32, "width": 32}
    processor = kind(size=crop, crop_size=crop, image_grid_pinpoints=[[32, 64]])
    return dict(processor(Image.new("RGB", (4096, 4096)), return_tensors="pt"))


@pytest.mark.parametrize("family", ["LLaVA-NeXT", "LLaVA-OneVision"])
@pytest.mark.parametrize("method", ["divprune", "visionzip", "fastv", "prefixkv"])
@torch.no_grad()
def test_images_of_4096_pixels_in_crops(family: str, method: str) -> None:
    """The processor scales them to the largest canvas it knows, whatever their size."""
    pixels = crops_of_4k(family)
    assert pixels["image_sizes"].tolist() == [[4096, 4096]]
    model = build(family)
    token = torch.tensor([[1, *[mini.IMAGE] * (16 + 4 * 5), 8, 9]])
    inputs = {"input_ids": token, "attention_mask": torch.ones_like(token), **pixels}
    with vtc.compressing(model, made(method, family, 6)) as session:
        model(**inputs, use_cache=True)
        report = session.report()
    assert report.visual_tokens == 16 + 16
    assert (report.kv_tokens if method == "prefixkv" else report.final_tokens) == 6


@pytest.mark.soak
@pytest.mark.parametrize("method", ["divprune", "visionzip", "mustdrop", "fastv", "prefixkv"])
def test_images_of_4096_pixels_at_their_own_resolution(method: str) -> None:
    """Qwen2-VL with its limit of pixels raised: 4096 x 4096 pixels are 21,316 tokens."""
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(max_pixels=4096**2, patch_size=14, merge_size=2)
    made_of = processor(Image.new("RGB", (4096, 4096)), return_tensors="pt")
    frames, rows, columns = made_of["image_grid_thw"][0].tolist()
    n = rows * columns // 4
    assert (frames, n) == (1, 21316)
    model = build("Qwen2-VL")  # patches of 4 pixels: the middle of each of 14 is enough
    pixels = made_of["pixel_values"].reshape(-1, 3, 2, 14, 14)[..., 5:9, 5:9].reshape(4 * n, -1)
    ids = torch.tensor([[1, mini.BREAK, *[mini.IMAGE] * n, mini.END, 8, 9]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == mini.IMAGE).long(),
        "pixel_values": pixels,
        "image_grid_thw": made_of["image_grid_thw"],
    }
    stock = memory_growth.peak(model, inputs)
    with vtc.compressing(model, made(method, "Qwen2-VL", n // 9)):
        assert memory_growth.peak(model, inputs) < 2 * stock + 2**26
