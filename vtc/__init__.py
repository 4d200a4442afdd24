# SPDX-License-Identifier: Apache-2.0
"""vtc: visual token compression for multimodal LLMs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "wrap": "wrapping",
    "unwrap": "wrapping",
    "observe": "wrapping",
    "compress_inputs": "inputs",
    "compressing": "wrapping",
    "chain": "method",
    "register": "method",
    "Method": "method",
    "Scorer": "method",
    "Reduction": "reduction",
    "Report": "report",
    "UnsupportedError": "errors",
}

__all__ = [*_EXPORTS, "methods", "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from .errors import UnsupportedError
    from . import methods
    from .inputs import compress_inputs
    from .method import Method, Scorer, chain, register
    from .reduction import Reduction
    from .report import Report
    from .wrapping import compressing, observe, unwrap, wrap


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    if name == "methods":
        return importlib.import_module(f"{__name__}.methods")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
