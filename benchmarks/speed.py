# SPDX-License-Identifier: Apache-2.0
"""How much of the speed-up that FLOPs promise is really there.

One process, one attention kernel, stock model and methods in turns, medians of their times after a
warm-up. Weights are random: speed does not depend on them, and answers are not looked at.

* An encoder alone is timed as a whole. Of a LLaVA, the language model is timed and its FLOPs are
  counted (all tokens); the time a method takes before the language model is added to its side. The
  whole prompt, from pixels to the first logits, stands beside it.
* The stock language model on a short text prompt, as long as what methods before it leave, shows
  what can be had at all: FLOPs leave out that the weights must be read however short the prompt.
* promised: FLOPs of the stock model over those of the compressed one.
* measured: median time of the stock model, without any hook of ours, over the compressed one's.
* reached: measured / promised.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import nn

from ..cost import decoder_flops
from ..errors import UnsupportedError
from ..method import Method, known_methods, resolve
from ..wrapping import compressing, wrap
from .budgets import seeded
from .environment import machine, versions
from .timing import Progress, cache_bytes, synchronize

Forward = Callable[[], Any]
Build = Callable[[str], tuple[Any, dict[str, Any]]]
"""Device -> a model and the arguments of a call of it."""
TEXT_TOKENS = 64


def vit_large(device: str, batch: int = 4) -> tuple[Any, dict[str, Any]]:
    """CLIP ViT-L/14 at 336 px (24 layers, width 1024) with random weights, and pixels for it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    model = CLIPVisionModel(config).eval().to(device, dtype_on(device))
    pixels = torch.randn(batch, 3, 336, 336).to(device, dtype_on(device))
    return model, {"pixel_values": pixels}


def llava(
    device: str, text: Any, tower: tuple[int, int, int], image_token: int, batch: int
) -> tuple[Any, dict[str, Any]]:
    """A LLaVA with random weights, and a prefill of 576 image and 64 text tokens.

    On a GPU the weights are bfloat16, as users have them there, on a CPU float32.

    Args:
        text: configuration of the decoder; tower: layers, width and heads of the CLIP tower.
    """
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            num_hidden_layers=tower[0],
            hidden_size=tower[1],
            intermediate_size=4 * tower[1],
            num_attention_heads=tower[2],
            image_size=336,
            patch_size=14,
        ),
        text_config=text,
        image_token_index=image_token,
        image_token_id=image_token,
        image_seq_length=576,
        dtype=dtype_on(device),
    )
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config).eval()
    words = torch.arange(1000, 1000 + TEXT_TOKENS)
    ids = torch.cat([words[:5], torch.full((576,), image_token), words[5:]])
    ids = ids.expand(batch, -1).to(device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, 336, 336).to(device, dtype_on(device)),
    }
    return model, {**inputs, "use_cache": True, "logits_to_keep": 1}


def half_billion(device: str, batch: int = 1) -> tuple[Any, dict[str, Any]]:
    """A decoder of the shape of Qwen2-0.5B.

    Its tower is small (4 layers, width 128), so that what is timed is the language model.
    """
    from transformers import Qwen2Config

    text = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    return llava(device, text, (4, 128, 4), 151646, batch)


def seven_billion(device: str, batch: int = 1) -> tuple[Any, dict[str, Any]]:
    """The shape of LLaVA-1.5-7B: CLIP ViT-L/14 at 336 px and a Llama of 32 layers of width 4096."""
    from transformers import LlamaConfig

    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)
    return llava(device, text, (24, 1024, 16), 32000, batch)


def vision_only(model: Any) -> bool:
    return not hasattr(model, "lm_head")


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


@contextmanager
def stopwatch(module: nn.Module | None) -> Iterator[list[float]]:
    """Milliseconds of every forward of a module inside the block, the same way for all models."""
    taken: list[float] = []
    if module is None:
        yield taken
        return
    device = next(module.parameters()).device

    def now() -> float:
        synchronize(device)
        return 1e3 * time.perf_counter()

    # Outermost: what other hooks of this module do is part of its time.
    start = module.register_forward_pre_hook(lambda *_: taken.append(now()), prepend=True)
    stop = module.register_forward_hook(lambda *_: taken.append(now() - taken.pop()))
    try:
        yield taken
    finally:
        start.remove()
        stop.remove()


@torch.no_grad()
def timed(model: nn.Module, forward: Forward, inner: nn.Module | None) -> tuple[float, float, Any]:
    """Milliseconds of one forward, of the inner module in it (0 without one), and the output."""
    device = next(model.parameters()).device
    with stopwatch(inner) as parts:
        synchronize(device)
        start = time.perf_counter()
        out = forward()
        synchronize(device)
        whole = 1e3 * (time.perf_counter() - start)
    return whole, sum(parts), out


def compare(
    model: Any,
    forward: Forward,
    methods: list[Method],
    repeats: int,
    tick: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Stock model and methods in turns, one warm-up round and ``repeats`` counted ones.

    Of a LLaVA the last row is the stock model on a text prompt, as short as the shortest of them.
    """
    inner = getattr(getattr(model, "model", None), "language_model", None)
    shorter: list[float] = []
    on_gpu = next(model.parameters()).device.type == "cuda"
    base: dict[str, list[float]] = {"whole": [], "inner": []}
    taken: list[dict[str, list[float]]] = [
        {"whole": [], "inner": [], "method": []} for _ in methods
    ]
    rows: list[dict[str, Any]] = [{} for _ in methods]
    for round_ in range(repeats + 1):
        tick(f"round {round_} of {repeats}" if round_ else "warm-up")
        whole, part, out = timed(model, forward, inner)
        kv, batch = _kv(out), len(out[0])
        del out
        if round_:
            base["whole"].append(whole)
            base["inner"].append(part)
        for method, row, times in zip(methods, rows, taken):
            with compressing(model, method) as session:
                whole, part, out = timed(model, forward, inner)
                held = _kv(out)
                del out
                if on_gpu:  # the parts need waits, which slow the whole
                    session.synchronize()
                    timed(model, forward, None)
                report = session.report()
                flops, full = _flops(report, session.sites)
            row.update(
                method=str(method),
                tokens=report.visual_tokens,
                final_tokens=report.final_tokens,
                flops_g=flops / 1e9,
                flops_share=flops / full,
                promised=full / flops,
                kv_bytes_stock=kv,
                kv_bytes_reported=report.kv_bytes,
                kv_bytes_measured=held,
            )
            if round_:
                times["whole"].append(whole)
                outside = bool(method.stages & {"pixels", "vision", "features"})
                chosen = report.method_ms or 0.0
                times["inner"].append(part + (chosen if outside else 0.0))
                times["method"].append(chosen)
        if inner is not None:
            length = TEXT_TOKENS + round(min(row["final_tokens"] for row in rows))
            ids = (5 + torch.arange(length, device=inner.device) % 50).expand(batch, -1)
            _, part, _ = timed(model, partial(model, input_ids=ids, logits_to_keep=1), inner)
            if round_:
                shorter.append(part)
    key = "whole" if inner is None else "inner"
    median = statistics.median
    for row, times in zip(rows, taken):
        row["stock_ms"], row["ms"] = median(base[key]), median(times[key])
        row["measured"] = row["stock_ms"] / row["ms"]
        row["reached"] = row["measured"] / row["promised"]
        row["method_ms"] = median(times["method"])
        row["method_share"] = row["method_ms"] / row["ms"]
        row["whole_stock_ms"], row["whole_ms"] = median(base["whole"]), median(times["whole"])
        row["whole_measured"] = row["whole_stock_ms"] / row["whole_ms"]
    if shorter:
        least = min(rows, key=lambda row: row["flops_share"])
        floor = {
            "method": f"(stock model, prompt of {length} text tokens)",
            "stock_ms": median(base["inner"]),
            "ms": median(shorter),
            **{k: least[k] for k in ("flops_g", "flops_share", "promised")},
        }
        floor["measured"] = floor["stock_ms"] / floor["ms"]
        floor["reached"] = floor["measured"] / floor["promised"]
        rows.append(floor)
    return rows


@torch.no_grad()
def compare_compiled(
    device: str, build: Build, methods: list[Method], repeats: int
) -> list[dict[str, Any]]:
    """Whole calls with an encoder, or the language model of a LLaVA, compiled.

    ``torch.compile(mode="reduce-overhead")`` replays a CUDA graph and spares the launches. Hooks
    that come after a compiled call are not seen, so each method has a model of its own.
    """
    forwards: list[tuple[Any, Forward]] = []
    rows: list[dict[str, Any]] = []
    for method in (None, *methods):
        model, inputs = build(device)
        if method is not None:
            wrap(model, method)
        model(**inputs)  # transformers registers hooks of its own in the first call
        if method is not None:
            report = model.vtc.report()
            flops, full = report.flops_all, report.flops_all_full
            row: dict[str, Any] = {"method": str(method), "flops_share": flops / full}
            rows.append({**row, "flops_g": flops / 1e9, "promised": full / flops})
        part = model if vision_only(model) else model.get_decoder()
        part.compile(mode="reduce-overhead", fullgraph=True)
        forwards.append((model, partial(model, **inputs)))
    taken: list[list[float]] = [[] for _ in forwards]
    for round_ in range(3 + repeats):  # compiled, recorded as a CUDA graph, and one to be sure
        for times, (model, forward) in zip(taken, forwards):
            torch.compiler.cudagraph_mark_step_begin()
            whole, _, _ = timed(model, forward, None)
            if round_ >= 3:
                times.append(whole)
    stock, *others = map(statistics.median, taken)
    for row, ms in zip(rows, others):
        row.update(stock_ms=stock, ms=ms, measured=stock / ms)
        row["reached"] = row["measured"] / row["promised"]
    return rows


def _flops(report: Any, sites: Any) -> tuple[float, float]:
    """FLOPs of what is timed, compressed and in full: the encoder alone, or the language model."""
    llm = sites.decoder
    if llm is None:
        return report.flops_all, report.flops_all_full
    shape = (llm.hidden, llm.mlp_width, llm.heads, llm.kv_heads, llm.head_dim)
    text = TEXT_TOKENS
    attended = [n + text for n in report.attended_per_layer]
    used = decoder_flops([n + text for n in report.tokens_per_layer], *shape, attended)
    full = decoder_flops([report.visual_tokens + text] * len(report.tokens_per_layer), *shape)
    return used, full


def _kv(out: Any) -> int | None:
    cache = getattr(out, "past_key_values", None)
    return None if cache is None else cache_bytes(cache)


def every_method(keep: Fraction, seed: int) -> list[Method]:
    """All methods at one budget; as they come where they take none."""
    made = []
    for name in known_methods():
        try:
            made.append(seeded(name, keep, seed))
        except ValueError:
            made.append(seeded(name, None, seed))
    return made


def run(
    device: str = "cpu",
    repeats: int = 7,
    seed: int = 0,
    progress: Progress | None = None,
    full: bool = False,
) -> dict[str, Any]:
    """The comparisons; see the module's docstring for what the columns mean.

    Args:
        full: instead of a few methods at a time, every method at 22 % on the 0.5 B decoder; on a
            GPU on a 7 B LLaVA too.
    """
    dtype = str(dtype_on(device)).removeprefix("torch.")
    small = "decoder of Qwen2-0.5B's shape, 576 image + 64 text tokens"
    large = "LLaVA-1.5-7B's shape, 576 image + 64 text tokens"
    on_gpu = torch.device(device).type == "cuda"
    shapes = [(small, half_billion, batch) for batch in ((1,) if full else (1, 4))]
    if on_gpu:
        shapes += [(large, seven_billion, 1), (large, seven_billion, 8)]
    if full:
        methods, note = every_method(Fraction(2, 9), seed), ", every method at 22 %"
    else:
        methods, note = [resolve(n, keep_tokens=128)[0] for n in ("fastv", "visionzip")], ""
    plans: list[tuple[str, Build, list[Method]]] = [
        (f"{title}, batch {batch}, {dtype}{note}, prefill", partial(build, batch=batch), methods)
        for title, build, batch in shapes
    ]
    if not full:
        # A geometric schedule that ends at 20 % of the patches costs about half the FLOPs.
        towers = [resolve(name, keep_ratio=0.2)[0] for name in ("pitome", "tome")]
        title = f"ViT-L/14, 336 px, batch 4, {dtype}, encoder alone"
        plans.insert(0, (title, vit_large, towers))
    steps, done = len(plans) * (repeats + 1), 0
    parts = []
    for title, build, methods in plans:
        torch.manual_seed(seed)
        model, inputs = build(device)

        def tick(text: str, title: str = title) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(f"{title.split(',')[0]}, {text}", done, steps)

        able, refused = [], []
        for method in methods:
            try:
                with compressing(model, method):
                    able.append(method)
            except UnsupportedError as error:
                refused.append({"method": f"{method}: {error}"})
        rows = compare(model, partial(model, **inputs), able, repeats, tick) + refused
        parts.append({"title": title, "rows": rows})
        del model, inputs
    if on_gpu and not full:
        compiled: list[tuple[str, Build, list[Method]]] = [
            ("ViT-L/14, 336 px, batch 32, encoder alone", partial(vit_large, batch=32), towers),
            (f"{large}, batch 1, whole prompt", seven_billion, methods),
        ]
        for title, build, chosen in compiled:
            rows = compare_compiled(device, build, chosen, repeats)
            parts.append({"title": f"{title}, {dtype}, compiled", "rows": rows})
    return {
        "benchmark": "speed",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": {"repeats": repeats, "warmup_rounds": 1, "seed": seed, "attention": "sdpa"},
        "versions": versions(),
        "machine": machine(torch.device(device)),
        "parts": parts,
    }


COLUMNS = (
    "method",
    "FLOPs %",
    "stock ms",
    "ms",
    "promised",
    "measured",
    "reached %",
    "method ms",
    "of prefill %",
    "whole prompt",
    "KV reported / held / stock MB",
)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the speed table; what does not apply stays empty."""

    def shown(name: str, form: str, factor: float = 1.0, unit: str = "") -> str:
        return format(factor * row[name], form) + unit if name in row else ""

    kv: list[Any] = [row.get(f"kv_bytes_{k}") for k in ("reported", "measured", "stock")]
    return [
        row["method"],
        shown("flops_share", ".1f", 100),
        shown("stock_ms", ".0f"),
        shown("ms", ".0f"),
        shown("promised", ".2f", 1, "x"),
        shown("measured", ".2f", 1, "x"),
        shown("reached", ".0f", 100),
        shown("method_ms", ".1f"),
        shown("method_share", ".1f", 100),
        shown("whole_measured", ".2f", 1, "x"),
        "" if kv[0] is None else " / ".join(f"{b / 1e6:.2f}" for b in kv),
    ]
