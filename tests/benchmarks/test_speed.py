# SPDX-License-Identifier: Apache-2.0
"""The speed harness on mini random models and fake clocks: what is timed, counted and written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vtc
from vtc import cli
from vtc.benchmarks.accuracy import tables
from vtc.benchmarks.measure import allocations, timing
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.speed import compiled as speed_compiled
from vtc.benchmarks.speed import rounds as speed_rounds
from vtc.benchmarks.speed import run as speed
from vtc.benchmarks.speed import shapes as speed_shapes
from vtc.benchmarks.speed import tables as shown
from vtc.benchmarks.speed.rounds import (
    STOCK,
    Run,
    measure_untimed,
    row_of,
    text_only,
    time_call,
    time_rounds,
)
from vtc.benchmarks.speed.settings import EIGHT, SpeedSettings
from vtc.benchmarks.speed.shapes import Prompt, Shape, own
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor
from vtc.transformers_contract import CACHE, DynamicCache, LanguageModelOutput

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
METHODS = ("fastv", "visionzip", "prefixkv", "vidkv", "mod")
MEGA = 10**6


@pytest.fixture(scope="module")
def model():
    return mini_llava()


@pytest.fixture(scope="module")
def shape(model) -> Shape:
    return own(model, mini_processor(model), "mini", 56)


@pytest.fixture(scope="module")
def result(shape):
    """Every kind of row: 16 image tokens, a prompt long enough for VidKV to pack."""
    settings = SpeedSettings(methods=METHODS, texts=(200,), decode=3, repeats=2)
    return speed.run(settings, shape, command="vtc speed")


def run_of(shape: Shape, model, name: str | None, text: int = 8, batch: int = 1) -> Run:
    method = None if name is None else seeded(name, None if name == "vidkv" else 4, 0)
    return Run(name or STOCK, method, shape.inputs(model, Prompt(batch, text)))


def row(part: dict, name: str) -> dict:
    return next(r for r in part["rows"] if r["method"].startswith(name))


# ---- what a result holds -------------------------------------------------------------------------


def test_a_result_is_complete(result):
    assert json.loads(json.dumps(result))["parts"][0]["rows"]
    assert result["benchmark"] == "speed" and result["finished"]
    assert {"date", "command", "settings", "versions", "machine", "rule"} <= result.keys()
    (part,) = result["parts"]
    assert (part["batch"], part["text_tokens"], part["image_tokens"]) == (1, 200, 16)
    assert set(part["attention"].values()) == {"sdpa"}
    assert part["weights_bytes"] == 4 * sum(p.numel() for p in mini_llava().parameters()) + sum(
        b.numel() * b.element_size() for b in mini_llava().buffers()
    )
    names = [r["method"].split("(")[0] for r in part["rows"]]
    assert names == [STOCK, *METHODS, ""]
    for r in part["rows"]:
        for name in (*speed_rounds.TIMES, *(f"{n}_speedup" for n in speed_rounds.RATIOS)):
            low, middle, high = (r[name + end] for end in ("_low", "", "_high"))
            assert (low is None) == (middle is None) == (high is None)
            assert middle is None or 0 <= low <= middle <= high
        assert set(r) == set(part["rows"][0])
    mod = row(part, "mod")
    assert "routers" in mod["error"] and mod["rounds"] == 0 and mod["ttft_ms"] is None


def test_rows_hold_together(result):
    (part,) = result["parts"]
    stock = part["rows"][0]
    assert stock["pays"] is None and stock["ttft_speedup"] == 1
    for name in METHODS[:-1]:
        r = row(part, name)
        assert r["error"] is None and r["rounds"] == 2
        assert r["kv_bytes_held"] == r["kv_bytes_reported"] < stock["kv_bytes_held"]
        assert r["kv_share"] == r["kv_bytes_held"] / stock["kv_bytes_held"]
        assert r["promised"] == pytest.approx(1 / r["flops_share"])
        assert r["reached"] == pytest.approx(r["ttft_speedup"] / r["promised"])
        assert r["pays"] == (min(r["ttft_speedup"], r["answer_speedup"]) >= 1.05)
        assert r["same_kernels"] and r["kernels"] == stock["kernels"]
        assert r["peak_bytes"] > r["kv_bytes_held"]
        assert r["vision_ms"] + r["llm_prefill_ms"] > r["method_ms"]
    assert row(part, "vidkv")["final_tokens"] == 16 > row(part, "fastv")["final_tokens"]
    text = row(part, f"({STOCK}")
    assert "204 text tokens" in text["method"] and text["error"] is None
    assert text["flops_share"] < 1 and text["pays"] is None


# ---- rounds --------------------------------------------------------------------------------------


def played(seed: int, names: str = "abcdef") -> list[list[str]]:
    orders: list[list[str]] = []
    time_rounds([Run(n, None, {}) for n in names], lambda run: {}, 4, 1, seed, orders)
    return orders


def test_the_order_is_random_and_seeded():
    orders = played(0)
    assert len(orders) == 5 and all(sorted(o) == list("abcdef") for o in orders)
    assert len(set(map(tuple, orders))) > 3
    assert orders == played(0) != played(1)


def test_the_order_of_a_result_is_the_one_that_ran(shape, monkeypatch):
    ran = []
    monkeypatch.setattr(speed, "time_call", lambda model, run, decode: ran.append(run.name) or {})
    settings = SpeedSettings(methods=("fastv", "random"), texts=(8,), repeats=3, seed=5)
    (part,) = speed.run(settings, shape)["parts"]
    assert [name for names in part["order"] for name in names] == ran and len(part["order"]) == 4


class Ticking(torch.nn.Module):
    """A stand-in whose calls take a known time: 100 ms the first prompts, then 10; a token 2 ms."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.now, self.prompts = 0.0, 0

    def forward(self, input_ids, cache=None, use_cache=True):
        if cache is None:
            self.prompts += 1
            self.now += 0.1 if self.prompts <= 2 else 0.01
        else:
            self.now += 0.002
        field = CACHE.among(LanguageModelOutput.__dataclass_fields__)
        return LanguageModelOutput(**{field: DynamicCache()})


def test_a_fake_clock_is_read_right_and_warm_up_left_out(monkeypatch):
    model = Ticking()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: model.now)
    run = Run("x", None, {"input_ids": torch.ones(3, 1, dtype=torch.long)})
    time_rounds([run], lambda run: time_call(model, run, 4), 3, 2, 0, [])
    assert len(run.samples) == 3
    for sample in run.samples:
        assert sample["ttft_ms"] == pytest.approx(10)
        assert sample["decode_ms"] == pytest.approx(2)
        assert sample["answer_ms"] == pytest.approx(18)
        assert sample["tokens_per_second"] == pytest.approx(3 * 4 / 0.008)
    got = row_of(run, run)
    assert (got["ttft_ms_low"], got["ttft_ms"]) == (pytest.approx(10), pytest.approx(10))


def samples(ttft: list[float], decode: float = 1.0) -> list[dict[str, float]]:
    return [{"ttft_ms": t, "decode_ms": decode, "answer_ms": t + 10 * decode} for t in ttft]


def test_spread_and_ratios_are_taken_within_rounds():
    stock = Run(STOCK, None, {}, samples([10, 20, 30, 40, 50]))
    other = Run("m", object(), {}, samples([5, 4, 10, 8, 10], 2.0))
    got = row_of(other, stock)
    base = row_of(stock, stock)
    assert [base[f"ttft_ms{e}"] for e in ("_low", "", "_high")] == [18, 30, 42]
    # 2, 5, 3, 5 and 5 in the rounds; the ratio of the medians would be 3.75.
    assert [got[f"ttft_speedup{e}"] for e in ("_low", "", "_high")] == pytest.approx([2.8, 5, 5])
    assert got["decode_speedup"] == 0.5
    assert got["answer_speedup"] == pytest.approx(40 / 30) and got["pays"] is True
    slow = row_of(Run("m", object(), {}, samples([29] * 5)), stock)
    assert slow["ttft_speedup"] < 1.05 and slow["pays"] is False
    # The first token gains, the whole answer does not.
    late = row_of(Run("m", object(), {}, samples([5] * 5, 9.0)), stock)
    assert late["ttft_speedup"] > 1.05 > late["answer_speedup"] and late["pays"] is False
    assert row_of(Run("m", object(), {}), stock)["ttft_speedup"] is None


# ---- what is timed -------------------------------------------------------------------------------


def hooked(model: torch.nn.Module) -> bool:
    """Whether a hook of vtc is on any module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [h for m in model.modules() for kind in kinds for h in getattr(m, kind).values()]
    inner = [h.func if isinstance(h, partial) else h for h in hooks]
    return "vtc" in vars(model) or any((h.__module__ or "").startswith("vtc") for h in inner)


@pytest.mark.parametrize("name", [None, "fastv", "vidkv"])
def test_the_stock_model_is_timed_without_hooks(model, shape, monkeypatch, name):
    calls = []
    for which in ("forward", "timed_decode"):
        real = getattr(speed_rounds, which)

        def spy(model, *args, which=which, real=real):
            calls.append((which, hooked(model)))
            return real(model, *args)

        monkeypatch.setattr(speed_rounds, which, spy)
    sample = time_call(model, run_of(shape, model, name), 2)
    if name is None:
        # The second forward, which is observed, gives the parts alone.
        assert calls == [("forward", False), ("timed_decode", False), ("forward", True)]
    else:
        assert calls == [("forward", True), ("timed_decode", True)]
    assert {"ttft_ms", "decode_ms", "vision_ms", "llm_prefill_ms"} <= sample.keys()
    assert not hooked(model)


@pytest.mark.parametrize("name", [None, "fastv", "prefixkv", "vidkv"])
def test_decoding_runs_on_the_cache_that_the_method_left(model, shape, monkeypatch, name):
    caches, real = [], speed_rounds.timed_decode

    def spy(model, token, cache, steps):
        assert not torch.isin(token, torch.tensor([3])).any()  # no image placeholder
        ms = real(model, token, cache, steps)
        caches.append(cache)
        return ms

    monkeypatch.setattr(speed_rounds, "timed_decode", spy)
    time_call(model, run_of(shape, model, name, text=200), 3)
    (cache,) = caches
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [219] * 4  # logical
    if name is None:
        assert lengths == [219] * 4
    elif name == "fastv":
        assert lengths == [219, 219, 207, 207]
    elif name == "prefixkv":
        assert sum(lengths) == 4 * 207
    else:
        assert all(layer.packed > 0 for layer in cache.layers)
        assert all(n < 219 for n in lengths)


def test_a_changed_attention_implementation_is_an_error(model, shape, monkeypatch):
    answers = iter([{"a": "sdpa"}, {"a": "eager"}, {"a": "sdpa"}])
    monkeypatch.setattr(speed_rounds, "attention_of", lambda model: next(answers))
    run = run_of(shape, model, "fastv")
    run.attempt(lambda: measure_untimed(model, run, 0))
    assert "changed the attention implementation" in run.error


def test_other_kernels_are_said(result):
    part = json.loads(json.dumps(result["parts"][0]))
    assert shown.notes(part)[-1].startswith("attention: sdpa, flash_attention")
    part["rows"][1] |= {"kernels": [], "same_kernels": False}
    assert shown.notes(part)[-1] == "other kernels: fastv no fused kernel"


def test_kernels_that_differ_are_seen(model, shape):
    model.set_attn_implementation("eager")
    try:
        run = run_of(shape, model, None)
        measure_untimed(model, run, 0)
    finally:
        model.set_attn_implementation("sdpa")
    assert run.row["kernels"] == ()
    stock = run_of(shape, model, None)
    measure_untimed(model, stock, 0)
    assert stock.row["kernels"] and row_of(run, stock)["same_kernels"] is False


# ---- memory --------------------------------------------------------------------------------------


def test_peak_of_known_allocations():
    seen = allocations.Allocations()
    with allocations.watched(torch.device("cpu"), seen):
        a = torch.empty(4 * MEGA, dtype=torch.uint8)
        b = torch.empty(2 * MEGA, dtype=torch.uint8)
        del a
        c = torch.empty(3 * MEGA, dtype=torch.uint8)
    assert seen.peak == 6 * MEGA
    del b, c


def test_peak_on_a_gpu_is_that_of_its_allocator(monkeypatch):
    calls = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * MEGA)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * MEGA)
    seen = allocations.Allocations()
    with allocations.watched(torch.device("cuda"), seen):
        assert calls == ["synchronize", "reset_peak_memory_stats"]
    assert seen.peak == 2 * MEGA


def test_peak_of_a_model_that_allocates_more(model, shape):
    usual, more = (run_of(shape, model, "fastv") for _ in range(2))
    measure_untimed(model, usual, 2)
    block = model.model.language_model.layers[3]
    hook = block.register_forward_hook(lambda *_: torch.empty(MEGA).sum() and None)
    try:
        measure_untimed(model, more, 2)
    finally:
        hook.remove()
    extra = more.row["peak_bytes"] - usual.row["peak_bytes"]
    assert 4 * MEGA - usual.row["peak_bytes"] < extra < 4 * MEGA + 1000
    assert usual.row["kv_bytes_held"] == more.row["kv_bytes_held"]


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_sweep_survives_what_fails(shape, monkeypatch):
    def inputs(model, prompt):
        if prompt.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
        return shape.inputs(model, prompt)

    def failing(model, run, decode):
        if run.name == STOCK and len(run.inputs["input_ids"]) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.")
        return time_call(model, run, decode)

    monkeypatch.setattr(speed, "time_call", failing)
    some = Shape("model", "mini", shape.build, inputs)
    settings = SpeedSettings(methods=("fastv",), batches=(1, 2, 3), texts=(8,), decode=1, repeats=1)
    written = []
    result = speed.run(settings, some, save=lambda r: written.append(json.dumps(r)))
    first, second, third = result["parts"]
    assert result["finished"] and len(written) == 3
    assert first["error"] is None and first["rows"][1]["pays"] is not None
    assert second["rows"] == [] and second["error"].startswith("out of memory: CUDA")
    assert "more" not in second["error"]
    assert third["error"] is None and third["rows"][0]["error"].startswith("out of memory")
    assert third["rows"][1]["ttft_ms"] > 0 and third["rows"][1]["ttft_speedup"] is None
    assert "uncompressed, not timed: out of memory" in shown.notes(third)[0]
    assert shown.notes(second) == [f"not measured: {second['error']}"]


def interrupted(after: int):
    """`time_call`, until Ctrl-C."""
    calls = []

    def stop(model, run, decode):
        calls.append(run)
        if len(calls) > after:
            raise KeyboardInterrupt
        return time_call(model, run, decode)

    return stop


def test_ctrl_c_leaves_what_was_measured(shape, monkeypatch):
    # Two configurations and the text alone: six calls a part, two of them counted by the stop.
    monkeypatch.setattr(speed, "time_call", interrupted(6 + 5))
    settings = SpeedSettings(methods=("fastv",), texts=(8, 16), decode=1, repeats=1)
    result = speed.run(settings, shape)
    first, second = result["parts"]
    assert result["finished"] is False
    assert [r["rounds"] for r in first["rows"]] == [1, 1, 1]
    assert sorted(r["rounds"] for r in second["rows"]) == [0, 1, 1]
    assert len(second["order"]) == 2


# ---- plans and prompts ---------------------------------------------------------------------------


def test_default_plans():
    def cells(**options) -> list[tuple]:
        plan = SpeedSettings(**options).plan()
        return [(s.name, p.batch, p.text_tokens, c) for s, prompts, c in plan for p in prompts]

    half, seven = "half-billion", "seven-billion"
    few = [("vit-large", 4, 64, False), (half, 1, 64, False), (half, 4, 64, False)]
    assert cells() == few
    assert [c[:2] for c in cells(device="cuda") if c[3]] == [("vit-large", 32), (seven, 1)]
    assert cells(full=True) == [(half, 1, 64, False)]
    grid = cells(device="cuda", sweep=True)
    assert grid == [(s, b, t, False) for s in (half, seven) for b in (1, 8) for t in (64, 1024)]
    assert SpeedSettings(device="cuda").decoded == 64
    assert SpeedSettings().decoded == SpeedSettings(device="cuda", sweep=True).decoded == 16
    chosen = SpeedSettings(device="cuda", sweep=True).chosen(speed_shapes.SHAPES[half])
    assert [m.name for m in chosen] == list(EIGHT)
    towers = SpeedSettings().chosen(speed_shapes.SHAPES["vit-large"])
    assert [(m.name, m.keep_ratio) for m in towers] == [("pitome", 0.2), ("tome", 0.2)]


def test_full_is_every_method():
    chosen = SpeedSettings(full=True).chosen(speed_shapes.SHAPES["half-billion"])
    assert [m.name for m in chosen] == list(vtc.methods())


def test_shapes_are_those_of_their_titles():
    """In billions of weights, on a device that holds none."""
    sizes = {}
    for name, shape in speed_shapes.SHAPES.items():
        with torch.device("meta"):
            model = shape.build("meta", torch.bfloat16)
        sizes[name] = round(sum(p.numel() for p in model.parameters()) / 1e9, 1)
        assert not model.training and model.dtype == torch.bfloat16
        ((key, pixels),) = [x for x in shape.inputs(model, Prompt(2, 8)).items() if "pix" in x[0]]
        assert (key, pixels.shape) == ("pixel_values", (2, 3, 336, 336))
        if shape.encoder:
            assert speed_shapes.visual_tokens(model, {}) == 0
    assert sizes == {"vit-large": 0.3, "half-billion": 0.5, "seven-billion": 7.1}


def test_a_processor_with_other_image_tokens_is_refused(shape):
    other = mini_llava()
    other.config.image_token_id = 63
    with pytest.raises(ValueError, match="prompt has no image tokens that vtc knows"):
        shape.inputs(other, Prompt())


def test_text_alone_is_timed_beside_a_method_that_ran(model, shape):
    stock, failed = run_of(shape, model, None), run_of(shape, model, "fastv")
    failed.error = "out of memory"
    assert text_only(model, [stock, failed], 1, 8) is None
    assert text_only(model.model.vision_tower, [stock], 1, 8) is None


@pytest.mark.parametrize("options", [{"shapes": ("nine",)}, {"methods": ("fastvv",)}])
def test_unknown_names_are_refused_at_once(options):
    with pytest.raises(ValueError, match=r"shapes are vit-large|fastv"):
        SpeedSettings(**options)


@pytest.mark.parametrize(("batch", "text", "images"), [(1, 7, 1), (2, 30, 2)])
def test_own_prompts_have_the_length_asked_for(model, shape, batch, text, images):
    inputs = shape.inputs(model, Prompt(batch, text, images))
    ids = inputs["input_ids"]
    assert ids.shape == inputs["attention_mask"].shape == (batch, text + 16 * images)
    assert (ids == 3).sum() == 16 * images * batch and (ids[:, -1] != 3).all()
    assert len(inputs["pixel_values"]) == batch * images
    with pytest.raises(ValueError, match="at least"):
        shape.inputs(model, Prompt(1, 1, 1))


def test_shapes_with_random_weights_take_their_prompts():
    from transformers import LlamaConfig

    text = LlamaConfig(
        vocab_size=2100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = speed_shapes._llava("cpu", torch.float32, text, (2, 32, 2), 2064)
    inputs = speed_shapes.llava_inputs(model, Prompt(2, 1100, 2))
    assert inputs["input_ids"].shape == (2, 1100 + 2 * 576)
    assert speed_shapes.visual_tokens(model, inputs) == 2 * 576
    with torch.no_grad():
        assert model(**inputs).logits.shape == (2, 1, 2100)


def test_compiled_models_are_timed_one_for_each_method(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **k: asked.append(k))
    built = mini_llava()
    processor = mini_processor(built)
    shape = Shape(
        "model", "mini", lambda device, dtype: mini_llava(), own(built, processor, "", 56).inputs
    )
    settings = SpeedSettings(methods=("fastv", "mod"), repeats=2)
    part = speed.new_part(shape, Prompt(1, 8), settings, compiled=True)
    speed_compiled.compare_compiled(part, shape, Prompt(1, 8), settings.chosen(shape), settings)
    stock, fastv, mod = part["rows"]
    assert [k["mode"] for k in asked] == ["reduce-overhead"] * 2
    assert len(part["order"]) == 3 + 2 and stock["rounds"] == fastv["rounds"] == 2
    assert fastv["promised"] > 1 and fastv["ttft_speedup"] > 0 and fastv["decode_ms"] is None
    assert "routers" in mod["error"]
    assert part["title"].endswith("compiled") and part["image_tokens"] == 16


# ---- tables --------------------------------------------------------------------------------------


def test_words_say_where_it_does_not_pay(result):
    part = json.loads(json.dumps(result["parts"][0]))
    for r in part["rows"]:
        if r["pays"] is not None:
            r |= {"ttft_speedup": 1.5, "answer_speedup": 1.4, "pays": True}
    row(part, "fastv").update(ttft_speedup=0.9, pays=False)
    (loss,) = shown.losses([part])
    assert loss["batch"] == 1 and loss["text_tokens"] == 200 and loss["ttft_speedup"] == 0.9
    assert "the first token 0.90x as fast, the whole answer of 4 tokens 1.40x" in loss["words"]
    made = {**result, "parts": [part, part]}
    head, *rows = shown.grid(made).lines
    assert head[1] == "model, batch 1, 200 text"
    assert rows[0] == ["fastv", "0.90x / 1.40x ✗", "0.90x / 1.40x ✗"]
    bare = [r for r in part["rows"] if not r["method"].startswith("fastv")]
    assert shown.grid({**result, "parts": [part, {**part, "rows": bare}]}).lines[1][2] == "-"
    assert rows[1][0] == "visionzip" and "✗" not in rows[1][1]
    first, second, *_ = shown.verdicts(made)
    assert first.startswith("fastv pays in 0 of 2 cases; not at model, batch 1, 200 text")
    assert second == "visionzip pays in 2 of 2 cases"
    sweep = {**made, "settings": {"sweep": True}}
    assert "| `fastv` | 0.90x / 1.40x ✗ |" in tables.speed_overview(sweep)


def test_the_table_of_a_part_fits_on_a_narrow_screen(result):
    (part,) = result["parts"]
    head, *rows = shown.table(part).lines
    assert head == [column.title for column in shown.COLUMNS]
    assert [r[0] for r in rows] == [STOCK, *METHODS[:-1], "(text alone)"]
    widths = [max(map(len, (*name.split("\n"), *cells))) for name, *cells in zip(head, *rows)]
    assert sum(widths) + len(widths) <= 100
    assert "(text alone): uncompressed, 204 text tokens" in " ".join(shown.notes(part))
    bare = {**part["rows"][0], **dict.fromkeys(("decode_ms", "decode_speedup", "kv_bytes_held"))}
    assert "KV\nMB" not in shown.table({**part, "rows": [bare]}).lines[0]


def test_overviews_of_old_and_new_files(result):
    old = json.loads((RESULTS / "speed-all.json").read_text())
    text = tables.speed_overview(old)
    assert text.startswith("| method | tokens at the end | LLM FLOPs % | choosing, ms |")
    assert "| `fastv` | 128 | 34 | 4 | 2.49x | 36 |" in text
    assert "stock model: first token 2169 ms" in text and "* mod: mod runs routers" in text
    new = tables.speed_overview(result)
    assert new.splitlines()[0].count("|") == len(shown.OVERVIEW) - 1 + 2
    assert "LLM FLOPs" not in new
    assert "`vidkv`" in new and f"({STOCK}, 204 text tokens)" in new and "* mod: " in new
    assert "16 image tokens, stock model: first token" in new and "then 3 of" in new
    part = json.loads(json.dumps(result["parts"][0]))
    part["rows"][0] |= {"ttft_ms": None, "decode_ms": None, "error": "out of memory"}
    assert "stock model" not in tables.speed_overview({**result, "parts": [part]})


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("mini")
    model.save_pretrained(path)
    mini_processor(model).save_pretrained(path)
    return str(path)


def invoke(*args: str):
    return CliRunner().invoke(cli.app, ["speed", *args])


def mine(folder: str, out: Path, *more: str):
    options = ("--image-size", "56", "--methods", "fastv,vidkv", "--text", "8", "--decode", "1")
    return invoke(
        "--model", folder, *options, "--repeats", "1", "--device", "cpu", "--out", str(out), *more
    )


def test_the_command_times_a_model_of_ones_own(folder, tmp_path):
    done = mine(folder, tmp_path, "--sweep", "--batch", "1,2")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "speed-sweep.json").read_text())
    assert [p["batch"] for p in result["parts"]] == [1, 2] and result["finished"]
    assert result["command"].startswith("vtc")
    assert max(map(len, done.stdout.splitlines())) <= 150
    for word in ("fastv", "vidkv", "pays in", "attention: sdpa", "batch 2"):
        assert word in done.stdout
    assert "fastv" in tables.speed_overview(result)


def test_json_is_all_there_is_on_stdout(folder, tmp_path):
    done = mine(folder, tmp_path, "--json", "--keep", "4")
    assert done.exit_code == 0, done.output
    (part,) = json.loads(done.stdout)["parts"]
    assert row(part, "fastv")["final_tokens"] == 4


def test_an_interrupted_command_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "time_call", interrupted(4))
    done = mine(folder, tmp_path)
    assert done.exit_code == 130 and "interrupted" in done.output
    assert json.loads((tmp_path / "speed.json").read_text())["finished"] is False


def test_a_disk_that_is_full_does_not_lose_the_tables(folder, tmp_path):
    (tmp_path / "file").write_text("")
    done = mine(folder, tmp_path / "file" / "folder")
    assert done.exit_code == 2 and "cannot write" in done.output
    assert "attention: sdpa" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--shapes", "nine"], "seven-billion"),
        (["--methods", "fastvv"], "fastv"),
        (["--batch", "1,many"], "--batch"),
        (["--text", "0"], "--text"),
        (["--keep", "1.5"], "(0, 1]"),
        (["--dtype", "int8"], "bfloat16"),
        (["--model", "x", "--shapes", "vit-large"], "not both"),
        (["--model", "/nowhere"], "cannot load"),
    ],
)
def test_mistakes_are_one_clear_line(args, says, tmp_path):
    done = invoke(*args, "--device", "cpu", "--out", str(tmp_path))
    assert done.exit_code == 2, done.output
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1
