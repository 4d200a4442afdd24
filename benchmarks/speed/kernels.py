# SPDX-License-Identifier: Apache-2.0
"""The fused kernels: checked first, then timed against eager torch and torch.compile.

``vtc kernels`` or `bench_kernels`: the Triton kernels on a GPU, the plain torch references on a
CPU, and PiToMe's whole merge step against N x N torch.

* eager: the formula as one would write it in torch, the N x N matrix stored; compiled: the same
  through torch.compile (GPU only).
* us: a call as Python makes it, with a cold L2; device_us: the same as a CUDA graph, with a warm L2
  and without the time of launching, which rules small shapes.
* mbytes (each input and output once) and gflops are counted from the kernels; bound_us is the time
  they take at the peak rates of an A100 or H100, and empty on other devices.
"""

from __future__ import annotations

import ctypes
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import attention_reduce, compact_tokens, merge_tokens, similarity_reduce
from ...kernels.dispatch import has_triton
from ...methods.pitome import match_energy
from ...reduction import Reduction
from ..shared.columns import comma_separated, fill, plain
from ..shared.files import write_whole
from ..shared.provenance import machine

PEAKS = {"A100": (312e12, 1.94e12), "H100": (989e12, 3.35e12)}
"""Dense bf16 FLOP/s and bytes/s of the data sheets (A100 80 GB PCIe/SXM, H100 SXM)."""

WRONG = 0.02
"""Relative error above which a kernel is not timed: bf16 outputs round by 0.4 %."""

COLUMNS = (
    "device",
    "kernel",
    "shape",
    "dtype",
    "error",
    "us",
    "eager_us",
    "compiled_us",
    "device_us",
    "eager_device_us",
    "compiled_device_us",
    "peak_mb",
    "eager_peak_mb",
    "compiled_peak_mb",
    "mbytes",
    "gflops",
    "bound",
    "bound_us",
)


@dataclass
class KernelCase:
    """One kernel at one shape: what to run, the same in eager torch, and what it costs."""

    kernel: str
    shape: str
    run: Callable[[], Any]
    eager: Callable[..., Any]
    inputs: tuple[Any, ...]
    bytes: float
    flops: float


# ---- the formulas in eager torch -----------------------------------------------------------------


def eager_energy(x: Tensor, margin: float) -> Tensor:
    x = torch.nn.functional.normalize(x, dim=-1)
    s = (x @ x.transpose(1, 2)).float()
    return torch.where(s > margin, s - margin, torch.exp(s - margin) - 1).mean(2)


def eager_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)
    s = (a @ b.transpose(1, 2)).float()
    return tuple(s.max(2))  # type: ignore[return-value]


def eager_column_sums(q: Tensor, k: Tensor) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
    return s.softmax(3).sum(2)


def eager_merge(x: Tensor, size: Tensor, group: Tensor, k: int) -> tuple[Tensor, Tensor]:
    wide = x.float() * size[..., None]
    slot = group.where(group >= 0, k)
    index = slot[..., None].expand_as(wide)
    total = wide.new_zeros(len(x), k + 1, x.shape[2]).scatter_add_(1, index, wide)
    new_size = size.new_zeros(len(x), k + 1).scatter_add_(1, slot, size)
    return (total / new_size.clamp(min=1e-12)[..., None]).to(x.dtype)[:, :k], new_size[:, :k]


def eager_compact(tensors: Sequence[Tensor], keep: Tensor) -> list[Tensor]:
    return [
        x.gather(1, keep.view(*keep.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
        for x in tensors
    ]


# ---- cases ---------------------------------------------------------------------------------------


def cases(device: str, dtype: torch.dtype, small: bool = False) -> list[KernelCase]:
    """Encoder and decoder shapes; ``small`` drops what takes seconds on a CPU."""
    g = torch.Generator().manual_seed(0)
    word = torch.finfo(dtype).bits // 8

    def tokens(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=g) + 0.5 * torch.randn(
            *shape[:-2], 1, shape[-1], generator=g
        )
        return x.to(device, dtype)

    out = []
    for b, n, c in ((1, 577, 1024), (8, 577, 64), (8, 1025, 64), (1, 4096, 64), (8, 4096, 64)):
        x = tokens(b, n, c)
        out.append(_energy_case(x, word))
    if not small:  # pragma: no cover (minutes on a CPU)
        out.append(_energy_case(tokens(1, 4096, 1024), word))
    for b, n, c in ((1, 577, 1024), (8, 577, 64), (8, 4096, 64)):
        x = tokens(b, n, c)
        a, y = x[:, 0::2], x[:, 1::2]
        half = a.shape[1]
        out.append(
            KernelCase(
                "best_match",
                f"B={b} A={half} B'={y.shape[1]} C={c}",
                functools.partial(similarity_reduce.best_match, a, y),
                eager_match,
                (a, y),
                b * n * c * word + b * half * 12,
                2.0 * b * half * y.shape[1] * c,
            )
        )
    for b, h, kv, t, d in ((8, 16, 16, 577, 64), (1, 32, 8, 2048, 128)):
        q, k = tokens(b, h, t, d), tokens(b, kv, t, d)
        out.append(
            KernelCase(
                "column_sums",
                f"B={b} H={h}/{kv} T={t} d={d}",
                functools.partial(attention_reduce.column_sums, q, k),
                eager_column_sums,
                (q, k),
                2 * b * (h + kv) * t * d * word + 3 * b * h * t * 4,
                4.0 * b * h * t * t * d,
            )
        )
    for b, n, c in ((8, 577, 1024), (8, 4096, 1024), (8, 4096, 64)):
        x = tokens(b, n, c)
        size = torch.rand(b, n, generator=g).to(device) + 0.5
        slots = n - n // 10
        target = torch.arange(n).repeat(b, 1)
        for row in target:
            folded = torch.randperm(n, generator=g)
            row[folded[: n - slots]] = folded[n - slots : 2 * (n - slots)]
        group = Reduction.from_merge(target, slots).group.to(device)
        out.append(
            KernelCase(
                "merge_tokens",
                f"B={b} N={n} K={slots} C={c}",
                functools.partial(merge_tokens.merge, x, size, group, slots),
                eager_merge,
                (x, size, group, slots),
                b * (n + slots) * c * word + b * n * (8 + 4 * 3) + b * slots * 12,
                2.0 * b * n * c,
            )
        )
    for b, n, c in ((8, 640, 4096), (8, 2304, 4096)):
        tensors = [tokens(b, n, c), torch.arange(n, device=device).repeat(b, 1)]
        tensors += [torch.rand(b, n, generator=g).to(device) > 0.5, tokens(b, n, 128)]
        slots = n // 4
        keep = torch.rand(b, n, generator=g).argsort(1)[:, :slots].sort(1).values.to(device)
        row = sum(math.prod(x.shape[2:]) * x.element_size() for x in tensors)
        out.append(
            KernelCase(
                "compact_tokens",
                f"B={b} N={n} K={slots} C={c}+1+1+128",
                functools.partial(compact_tokens.compact, tensors, keep),
                eager_compact,
                (tensors, keep),
                2.0 * b * slots * row + 8 * b * slots,
                0.0,
            )
        )
    return out


def _energy_case(x: Tensor, word: int) -> KernelCase:
    b, n, c = x.shape
    return KernelCase(
        "energy",
        f"B={b} N={n} C={c}",
        lambda: similarity_reduce.energy(x, 0.45),
        eager_energy,
        (x, 0.45),
        b * n * c * word + b * n * 4,
        2.0 * b * n * n * c,
    )


# ---- verification, time, memory ------------------------------------------------------------------


def _leaves(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def verify(case: KernelCase) -> float:
    """Largest error against the eager formula in fp32, relative to its largest value.

    What the tests allow is far stricter than `WRONG`; here a kernel is caught that is wrong on
    this device.
    """
    widened = [
        [t.float() if t.is_floating_point() else t for t in x]
        if isinstance(x, list)
        else x.float()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in case.inputs
    ]
    ours, plain = _leaves(case.run()), _leaves(case.eager(*widened))
    if case.kernel == "best_match":  # equal similarities may differ in the last bit: compare edges
        ours, plain = ours[:1], plain[:1]
    worst = 0.0
    for a, b in zip(ours, plain):
        b = b.double()
        gap = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-6)
        worst = max(worst, float(gap.nan_to_num(torch.inf)))
    return worst


def median_us(run: Callable[[], Any], device: str, budget_ms: float = 100) -> float:
    """Median microseconds of a call: CUDA events with a cold L2, or the wall clock."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1e3 * do_bench(run, warmup=25, rep=int(budget_ms), return_mode="median")
    run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < budget_ms / 1e3 and len(times) < 50):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def device_us(run: Callable[[], Any]) -> float | None:  # pragma: no cover (a GPU)
    """Microseconds of a call replayed as a CUDA graph: without the time of launching from Python.

    None where a call cannot be recorded.
    """
    from triton.testing import do_bench_cudagraph

    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            return 1e3 * do_bench_cudagraph(run, rep=50, return_mode="median")
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def peak_mb(run: Callable[[], Any], device: str) -> float | None:
    """Megabytes in use at the worst moment of a call, beyond what was in use before.

    On the CPU it is the resident set, whose peak only Linux can reset; None elsewhere.
    """
    if device == "cuda":
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc holds would hide an allocation
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        out = run()
        peak = _resident("VmHWM")
        del out
    except (OSError, AttributeError, StopIteration):  # pragma: no cover (not Linux)
        return None
    return (peak - before) / 1e6


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return str(machine(torch.device(device)).get("cpu") or "cpu")


def roofline(case: KernelCase, name: str) -> tuple[str, float | None]:
    """("compute" or "memory", microseconds) at the peaks of the data sheet; empty if unknown."""
    peaks = next((peak for key, peak in PEAKS.items() if key in name), None)
    if peaks is None:
        return "", None
    compute, memory = 1e6 * case.flops / peaks[0], 1e6 * case.bytes / peaks[1]
    return ("compute" if compute > memory else "memory"), max(compute, memory)


def measure(
    device: str, dtype: torch.dtype, say: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """One row for each case; no times where a kernel is wrong."""
    name = device_name(device)
    gpu = device == "cuda"
    rows = []
    for case in cases(device, dtype, small=not gpu):
        error = verify(case)
        bound, bound_us = roofline(case, name)
        row: dict[str, Any] = {
            "device": name,
            "kernel": case.kernel,
            "shape": case.shape,
            "dtype": str(dtype).removeprefix("torch."),
            "error": error,
            "mbytes": case.bytes / 1e6,
            "gflops": case.flops / 1e9,
            "bound": bound,
            "bound_us": bound_us,
        }
        rows.append(row)
        if error > WRONG:
            say(f"{case.kernel} {case.shape}: off by {error:.2%}, not timed")
            continue
        eager = functools.partial(case.eager, *case.inputs)
        row["us"], row["eager_us"] = median_us(case.run, device), median_us(eager, device)
        row["peak_mb"], row["eager_peak_mb"] = peak_mb(case.run, device), peak_mb(eager, device)
        if gpu:
            torch._dynamo.reset()
            fast = torch.compile(case.eager, dynamic=False)
            compiled = functools.partial(fast, *case.inputs)
            row["compiled_us"] = median_us(compiled, device)
            for name_, call in (("", case.run), ("eager_", eager), ("compiled_", compiled)):
                row[f"{name_}device_us"] = device_us(call)
            row["compiled_peak_mb"] = peak_mb(compiled, device)
        say(f"{case.kernel} {case.shape}: {row['us']:.0f} us, eager {row['eager_us']:.0f} us")
    return rows


# ---- PiToMe's merge step on the CPU --------------------------------------------------------------


def plain_step(
    x: Tensor, hidden: Tensor, size: Tensor, margin: float, r: int
) -> tuple[Tensor, Tensor]:
    """Energy, matching and merge of PiToMe as N x N torch, protected tokens first."""
    x = torch.nn.functional.normalize(x, dim=-1)
    s = x @ x.transpose(1, 2)
    energy = torch.where(s > margin, s - margin, torch.exp(s - margin) - 1).mean(2)
    order = energy.argsort(dim=1, descending=True, stable=True)
    a, b, protect = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
    n, c = s.shape[1], hidden.shape[2]
    scores = s.gather(1, a[..., None].expand(-1, -1, n)).gather(2, b[:, None].expand(-1, r, -1))
    partner = scores.argmax(2)

    def rows(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))

    weighted = torch.cat([hidden * size[..., None], size[..., None]], 2)
    into = partner[..., None].expand(-1, -1, c + 1)
    merged = rows(weighted, b).scatter_add(1, into, rows(weighted, a))
    out = torch.cat([rows(weighted, protect), merged], 1)
    return out[..., :c] / out[..., c:], out[..., c]


def fused_step(
    x: Tensor, hidden: Tensor, size: Tensor, margin: float, r: int
) -> tuple[Tensor, Tensor]:
    """The same as vtc does it; survivors in raster order."""
    energy = similarity_reduce.energy(x, margin)
    reduction = Reduction.from_merge(match_energy(x, energy, r), x.shape[1] - r)
    return reduction.merge(hidden, size)


def merge_step(
    device: str = "cpu",
    sizes: Sequence[int] = (577, 1025, 2305, 4096),
    batch: int = 8,
    width: int = 64,
    hidden_width: int = 1024,
    rounds: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """PiToMe's merge step: plain and fused in turns in one process, medians and peak memory.

    Keys of one head (``width``), hidden states to merge (``hidden_width``), 10 % of the tokens
    folded, fp32 on the CPU.
    """
    out = []
    for n in sizes:
        g = torch.Generator().manual_seed(n)
        x = torch.randn(batch, n, width, generator=g) + 0.5 * torch.randn(
            batch, 1, width, generator=g
        )
        hidden, size = torch.randn(batch, n, hidden_width, generator=g), torch.ones(batch, n)
        args: Any = (*(t.to(device) for t in (x, hidden, size)), 0.45, n // 10)
        merged, sizes_ = fused_step(*args)
        expected, expected_sizes = plain_step(*args)
        for m, w in ((merged, sizes_), (expected, expected_sizes)):  # nothing may get lost
            total = torch.einsum("bnc,bn->bc", m, w)
            torch.testing.assert_close(total, args[1].sum(1), rtol=1e-3, atol=1e-2)
        del merged, expected
        on_device = {}
        if device == "cuda":
            on_device = {
                "plain_device_ms": (device_us(functools.partial(plain_step, *args)) or math.nan)
                / 1e3,
                "fused_device_ms": (device_us(functools.partial(fused_step, *args)) or math.nan)
                / 1e3,
            }
        times: dict[str, list[float]] = {"plain": [], "fused": []}
        steps = {"plain": plain_step, "fused": fused_step}
        for _ in range(rounds):
            for name, step in steps.items():
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                step(*args)
                if device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(1e3 * (time.perf_counter() - start))
        ms = {name: statistics.median(values) for name, values in times.items()}
        peak = {
            name: peak_mb(functools.partial(step, *args), device) for name, step in steps.items()
        }
        row = {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "batch": batch,
            "tokens": n,
            "width": width,
            "hidden_width": hidden_width,
            "plain_ms": ms["plain"],
            "fused_ms": ms["fused"],
            "speedup": ms["plain"] / ms["fused"],
            **on_device,
            "plain_peak_mb": peak["plain"],
            "fused_peak_mb": peak["fused"],
            "memory_ratio": peak["plain"] / max(peak["fused"], 1e-3)
            if peak["plain"] is not None and peak["fused"] is not None
            else None,
        }
        out.append(row)
        say(
            f"merge step B={batch} N={n}: {row['plain_ms']:.0f} -> {row['fused_ms']:.0f} ms "
            f"({row['speedup']:.1f}x), memory ratio {row['memory_ratio'] or math.nan:.1f}"
        )
    return out


def _write(rows: list[dict[str, Any]], path: Path, columns: Iterable[str]) -> None:
    write_whole(path, comma_separated(fill([plain(name) for name in columns], rows)))


def bench_kernels(
    device: str = "auto",
    out: Path | str = Path("results"),
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Verify and time every kernel; CSV files in ``out``, whose paths are returned.

    Args:
        device: "cpu", "cuda" or "auto".

    Raises:
        RuntimeError: a kernel disagrees with its formula.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not has_triton():  # pragma: no cover (a GPU)
        raise RuntimeError("the kernels need triton on a GPU: pip install triton")
    out = Path(out)
    written = [out / f"kernels-{device}.csv", out / f"merge-step-{device}.csv"]
    with torch.no_grad():
        rows = measure(device, torch.bfloat16 if device == "cuda" else torch.float32, say)
        _write(rows, written[0], COLUMNS)
        steps = merge_step(device, rounds=5, say=say)
        _write(steps, written[1], steps[0])
    wrong = [f"{row['kernel']} {row['shape']}" for row in rows if row["error"] > WRONG]
    if wrong:
        raise RuntimeError(f"wrong results on this device: {'; '.join(wrong)}")
    return written
