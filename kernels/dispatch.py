# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operator runs: Triton on CUDA tensors, plain torch everywhere else."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """True where triton is installed; it is imported only when a kernel is about to run."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _load(op: str, implementation: str) -> ModuleType:
    return importlib.import_module(f"vtc.kernels.{op}.{implementation}")


def implementation(op: str, x: Tensor) -> Any:
    """The module ``vtc.kernels.<op>.{triton,reference}`` that handles tensors like x."""
    return _load(op, "triton" if x.is_cuda and has_triton() else "reference")
