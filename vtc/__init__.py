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
    "inspect": "inspecting",
    "match": "matching",
    "calibrate": "calibrating",
    "Calibration": "calibrating",
    "overlay": "pictures",
    "chain": "method",
    "register": "method",
    "Method": "method",
    "Scorer": "method",
    "Reduction": "reduction",
    "Report": "report",
    "UnsupportedError": "errors",
    "NotFiniteError": "errors",
}

__all__ = [*_EXPORTS, "methods", "__version__"]

if TYPE_CHECKING:
    from .calibrating import Calibration as Calibration
    from .calibrating import calibrate as calibrate
    from .errors import NotFiniteError as NotFiniteError
    from .errors import UnsupportedError as UnsupportedError
    from .inputs import compress_inputs as compress_inputs
    from .inspecting import inspect as inspect
    from .matching import match as match
    from .method import Method as Method
    from .method import Scorer as Scorer
    from .method import chain as chain
    from .method import known_methods as methods
    from .method import register as register
    from .pictures import overlay as overlay
    from .reduction import Reduction as Reduction
    from .report import Report as Report
    from .wrapping import compressing as compressing
    from .wrapping import observe as observe
    from .wrapping import unwrap as unwrap
    from .wrapping import wrap as wrap


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    if name == "methods":
        return importlib.import_module(f"{__name__}.methods")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
