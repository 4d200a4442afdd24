# SPDX-License-Identifier: Apache-2.0
"""How much of the speed-up that FLOPs promise is really there.

One process, one attention kernel, stock model and methods in turns, medians of their times after a
warm-up. Weights are random: speed does not depend on them, and answers are not looked at.

* promised: FLOPs of the stock model over those of the compressed one, all tokens, encoder included.
* measured: median time of the stock model, without any hook, over that of the compressed one.
* reached: measured / promised.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..method import Method, resolve
from ..wrapping import compressing, observe
from .runner import Progress, cache_bytes, machine, synchronize, versions

Forward = Callable[[], Any]


def vit_large(device: str, batch: int = 4) -> tuple[Any, Forward]:
    """CLIP ViT-L/14 at 336 px (24 layers, width 1024) with random weights, and a forward of it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    model = CLIPVisionModel(config).eval().to(device)
    pixels = torch.randn(batch, 3, 336, 336, device=device)
    return model, lambda: model(pixel_values=pixels)


def half_billion(device: str, text_tokens: int = 64) -> tuple[Any, Forward]:
    """A LLaVA with a decoder of the shape of Qwen2-0.5B, 576 image and 64 text tokens.

    Its tower is small (4 layers, width 128), so that what is timed is the language model.
    """
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
    )

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
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    image_token = 151646
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_token_id=image_token,
        image_seq_length=576,
    )
    model = LlavaForConditionalGeneration(config).eval().to(device)
    words = torch.arange(1000, 1000 + text_tokens)
    ids = torch.cat([words[:5], torch.full((576,), image_token), words[5:]])[None].to(device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336, device=device),
    }
    return model, lambda: model(**inputs, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def timed(model: Any, forward: Forward) -> tuple[float, Any]:
    """Milliseconds of one forward and its output."""
    device = next(model.parameters()).device
    synchronize(device)
    start = time.perf_counter()
    out = forward()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start), out


def compare(
    model: Any,
    forward: Forward,
    methods: list[Method],
    repeats: int,
    tick: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Stock model and methods in turns, one warm-up round and ``repeats`` counted ones."""
    device = next(model.parameters()).device
    base: list[float] = []
    base_kv = None
    taken: list[dict[str, list[float]]] = [{"ms": [], "method": []} for _ in methods]
    reports: list[Any] = [None] * len(methods)
    kv: list[int | None] = [None] * len(methods)
    for round_ in range(repeats + 1):
        tick(f"round {round_} of {repeats}" if round_ else "warm-up")
        ms, out = timed(model, forward)
        base_kv = _kv(out)
        del out
        if round_:
            base.append(ms)
        for i, method in enumerate(methods):
            with compressing(model, method) as session:
                ms, out = timed(model, forward)
                kv[i] = _kv(out)
                del out
                if device.type == "cuda":  # the parts need waits, which slow the whole
                    session.synchronize()
                    timed(model, forward)
                reports[i] = session.report()
            if round_:
                taken[i]["ms"].append(ms)
                taken[i]["method"].append(reports[i].method_ms)
    stock = statistics.median(base)
    rows = []
    for i, method in enumerate(methods):
        report = reports[i]
        ms, chosen = (statistics.median(taken[i][k]) for k in ("ms", "method"))
        promised, measured = report.flops_all_full / report.flops_all, stock / ms
        rows.append(
            {
                "method": str(method),
                "tokens": report.visual_tokens,
                "final_tokens": report.final_tokens,
                "flops_g": report.flops_all / 1e9,
                "flops_share": report.flops_all / report.flops_all_full,
                "stock_ms": stock,
                "ms": ms,
                "promised": promised,
                "measured": measured,
                "reached": measured / promised,
                "method_ms": chosen,
                "method_share": chosen / ms,
                "kv_bytes_stock": base_kv,
                "kv_bytes_reported": report.kv_bytes,
                "kv_bytes_measured": kv[i],
            }
        )
    return rows


def _kv(out: Any) -> int | None:
    cache = getattr(out, "past_key_values", None)
    return None if cache is None else cache_bytes(cache)


def run(
    device: str = "cpu", repeats: int = 7, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Both comparisons; see the module's docstring for what the columns mean."""
    plans: list[tuple[str, Callable[[str], tuple[Any, Forward]], list[Method]]] = [
        (
            "ViT-L/14, 336 px, batch 4, float32, encoder alone",
            vit_large,
            # A geometric schedule that ends at 20 % of the patches costs about half the FLOPs.
            [resolve(name, keep_ratio=0.2)[0] for name in ("pitome", "tome")],
        ),
        (
            "decoder of Qwen2-0.5B's shape, 576 image + 64 text tokens, batch 1, float32, prefill",
            half_billion,
            [resolve(name, keep_tokens=128)[0] for name in ("fastv", "visionzip")],
        ),
    ]
    steps, done = len(plans) * (repeats + 1), 0
    parts = []
    for title, build, methods in plans:
        torch.manual_seed(seed)
        model, forward = build(device)

        def tick(text: str, title: str = title) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(f"{title.split(',')[0]}, {text}", done, steps)

        rows = compare(model, forward, methods, repeats, tick)
        with observe(model) as session:
            timed(model, forward)
            full = session.report().flops_all_full
        parts.append({"title": title, "flops_g": full / 1e9, "rows": rows})
        del model, forward
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
    "KV reported / held / stock MB",
)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the speed table."""
    kv = [row[f"kv_bytes_{k}"] for k in ("reported", "measured", "stock")]
    return [
        row["method"],
        f"{100 * row['flops_share']:.1f}",
        f"{row['stock_ms']:.0f}",
        f"{row['ms']:.0f}",
        f"{row['promised']:.2f}x",
        f"{row['measured']:.2f}x",
        f"{100 * row['reached']:.0f}",
        f"{row['method_ms']:.1f}",
        f"{100 * row['method_share']:.1f}",
        "" if kv[0] is None else " / ".join(f"{b / 1e6:.2f}" for b in kv),
    ]
