# SPDX-License-Identifier: Apache-2.0
"""vtc: visual token compression for multimodal LLMs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "wrap": "session",
    "unwrap": "session",
    "observe": "session",
    "compress_inputs": "precompute",
    "compressing": "session",
    "inspect": "inspection",
    "match": "tuning.match",
    "calibrate": "tuning.calibrate",
    "Calibration": "tuning.calibrate",
    "overlay": "report.overlay",
    "chain": "registry",
    "register": "registry",
    "Method": "method",
    "Scorer": "method",
    "Reduction": "reduction",
    "Report": "report.report",
    "UnsupportedError": "errors",
    "NotFiniteError": "errors",
}

__all__ = [*_EXPORTS, "methods", "__version__"]

if TYPE_CHECKING:
    from .errors import NotFiniteError as NotFiniteError
    from .errors import UnsupportedError as UnsupportedError
    from .inspection import inspect as inspect
    from .method import Method as Method
    from .method import Scorer as Scorer
    from .precompute import compress_inputs as compress_inputs
    from .reduction import Reduction as Reduction
    from .registry import chain as chain
    from .registry import known_methods as methods
    from .registry import register as register
    from .report.overlay import overlay as overlay
    from .report.report import Report as Report
    from .session import compressing as compressing
    from .session import observe as observe
    from .session import unwrap as unwrap
    from .session import wrap as wrap
    from .tuning.calibrate import Calibration as Calibration
    from .tuning.calibrate import calibrate as calibrate
    from .tuning.match import match as match


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    if name == "methods":
        return importlib.import_module(f"{__name__}.methods")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
