# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark: checks before it times, and leaves GPU columns empty without a GPU."""

import csv
import functools

import pytest
import torch

from vtc.benchmarks.speed import kernels as bench
from vtc.kernels import attention_reduce, compact_tokens, merge_tokens, similarity_reduce


def case(run):
    x = torch.randn(2, 40, 16)
    return bench.KernelCase(
        "energy",
        "B=2 N=40 C=16",
        functools.partial(run, x, 0.45),
        bench.eager_energy,
        (x, 0.45),
        1e3,
        1e6,
    )


@pytest.fixture
def few(monkeypatch):
    """Replaces the cases and shortens the merge step; gives a setter."""
    step = functools.partial(bench.merge_step, sizes=(65,), batch=2, hidden_width=32, rounds=1)
    monkeypatch.setattr(bench, "merge_step", step)

    def use(*cases):
        monkeypatch.setattr(bench, "cases", lambda *args, **kwargs: list(cases))

    return use


def test_csv_files_name_the_device_and_hold_no_gpu_numbers(few, tmp_path):
    few(case(similarity_reduce.energy))
    kernels, steps = bench.bench_kernels("cpu", tmp_path, say=lambda text: None)
    (row,) = csv.DictReader(kernels.open())
    assert tuple(row) == bench.COLUMNS and row["device"]
    assert float(row["us"]) > 0 and float(row["eager_us"]) > 0
    assert row["compiled_us"] == row["bound_us"] == row["bound"] == ""
    assert float(row["gflops"]) == 1e-3 and float(row["mbytes"]) == 1e-3
    (row,) = csv.DictReader(steps.open())
    assert row["tokens"] == "65" and float(row["speedup"]) > 0


def test_a_wrong_kernel_is_not_timed(few, tmp_path):
    few(case(lambda x, margin: similarity_reduce.energy(x, margin + 0.5)))
    with pytest.raises(RuntimeError, match="wrong results"):
        bench.bench_kernels("cpu", tmp_path, say=lambda text: None)
    (row,) = csv.DictReader((tmp_path / "kernels-cpu.csv").open())
    assert float(row["error"]) > bench.WRONG and row["us"] == ""


@pytest.mark.parametrize("kind", ["energy", "best_match", "column_sums", "merge", "compact"])
def test_eager_formulas_are_those_of_the_kernels(kind):
    """Formulas that kernels are timed against compute the same, in the cases of the benchmark."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, 16, generator=g), torch.randn(2, 7, 16, generator=g)
    q, k = torch.randn(2, 4, 9, 8, generator=g), torch.randn(2, 2, 9, 8, generator=g)
    group = torch.arange(40).repeat(2, 1).clamp(max=29)
    group[0, 3] = -1
    size, keep = torch.rand(2, 40, generator=g) + 0.5, torch.arange(0, 40, 3).repeat(2, 1)
    run, eager, inputs = {
        "energy": (similarity_reduce.energy, bench.eager_energy, (x, 0.45)),
        "best_match": (similarity_reduce.best_match, bench.eager_match, (x, y)),
        "column_sums": (
            functools.partial(attention_reduce.column_sums, causal=False),
            bench.eager_column_sums,
            (q, k),
        ),
        "merge": (merge_tokens.merge, bench.eager_merge, (x, size, group, 30)),
        "compact": (compact_tokens.compact, bench.eager_compact, ([x, size, group], keep)),
    }[kind]
    right = bench.KernelCase(kind, "", functools.partial(run, *inputs), eager, inputs, 1, 1)
    assert bench.verify(right) < 1e-5
    if kind != "compact":
        wrong = functools.partial(run, *(inputs[0].flip(1), *inputs[1:]))
        assert bench.verify(bench.KernelCase(kind, "", wrong, eager, inputs, 1, 1)) > bench.WRONG


def test_the_roofline_names_what_binds():
    heavy = case(similarity_reduce.energy)
    assert bench.roofline(heavy, "NVIDIA H100 80GB HBM3")[0] == "compute"
    heavy.flops = 1.0
    assert bench.roofline(heavy, "NVIDIA A100-SXM4-80GB") == (
        "memory",
        pytest.approx(1e9 / 1.94e12),
    )
    assert bench.roofline(heavy, "some CPU") == ("", None)
