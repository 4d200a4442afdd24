# SPDX-License-Identifier: Apache-2.0
"""Budgets: layers in proportion."""

from __future__ import annotations

import pytest

import vtc
from vtc.methods.transprune import TransPrune


@pytest.mark.parametrize(
    "name", ["mustdrop", "pyramiddrop", "sparsevlm", "diprune", "tops", "todre", "vscan"]
)
def test_layers_of_a_decoder_twice_as_deep_stand_behind_as_much_of_it(name):
    cls = vtc.methods()[name]
    here, deep = cls().decoder_layers(32), cls().decoder_layers(64)
    assert deep == tuple(2 * (i + 1) - 1 for i in here)
    assert TransPrune().decoder_layers(64) == tuple(range(13, 24))  # all between its first and last
