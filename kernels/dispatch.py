# SPDX-License-Identifier: Apache-2.0
"""Choice of an operator's implementation: Triton on CUDA tensors, plain torch everywhere else."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def has_triton() -> bool:
    """True where triton is installed; it is imported only when a kernel is about to run."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _load(op: str, implementation: str) -> ModuleType:
    return importlib.import_module(f"vtc.kernels.{op}.{implementation}")


def unseen(*tensors: Tensor | None) -> bool:
    """Whether nothing looks into a call on these tensors: no tracing, no autograd, no subclass.

    Then the implementation can be called without its registered operator, whose way through
    torch.library takes longer than launching a small kernel.
    """
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    plain = (Tensor, nn.Parameter)
    return all(x is None or (type(x) in plain and not (grad and x.requires_grad)) for x in tensors)


def implementation(op: str, x: Tensor) -> Any:
    """The module ``vtc.kernels.<op>.{triton,reference}`` that handles tensors like x."""
    return _load(op, "triton" if x.is_cuda and has_triton() else "reference")
