# SPDX-License-Identifier: Apache-2.0
"""Errors that vtc raises on purpose."""

from __future__ import annotations


class UnsupportedError(ValueError):
    """A method, model and way of calling that do not go together.

    The message names what is missing and the nearest thing that works.
    """
