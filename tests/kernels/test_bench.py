# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark: checks before it times, and leaves GPU columns empty without a GPU."""

import csv
import functools

import pytest
import torch

from vtc.benchmarks import kernels as bench
from vtc.kernels import similarity_reduce


def case(run):
    x = torch.randn(2, 40, 16)
    return bench.Case(
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


def test_the_roofline_names_what_binds():
    heavy = case(similarity_reduce.energy)
    assert bench.roofline(heavy, "NVIDIA H100 80GB HBM3")[0] == "compute"
    heavy.flops = 1.0
    assert bench.roofline(heavy, "NVIDIA A100-SXM4-80GB") == (
        "memory",
        pytest.approx(1e9 / 1.94e12),
    )
    assert bench.roofline(heavy, "some CPU") == ("", None)
