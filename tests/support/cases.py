# SPDX-License-Identifier: Apache-2.0
"""How many examples a property test tries."""

from __future__ import annotations

from hypothesis import settings


def few(n: int) -> settings:
    """A decorator for a costly property: n examples, and in a soak run as many times more as
    all."""
    usual = settings.get_profile("vtc").max_examples
    return settings(max_examples=max(1, settings.default.max_examples * n // usual))
