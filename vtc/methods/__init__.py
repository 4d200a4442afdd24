# SPDX-License-Identifier: Apache-2.0
"""One file per method. Calling the package, ``vtc.methods()``, gives them all by name.

What several of them share is in the modules with an underscore.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..method import Method


class _Methods(types.ModuleType):
    """The package is its own listing, because importing it must not hide ``vtc.methods()``."""

    def __call__(self) -> dict[str, type[Method]]:
        from ..registry import known_methods

        return known_methods()


sys.modules[__name__].__class__ = _Methods
