# SPDX-License-Identifier: Apache-2.0
"""The registry: names, and what is said of unknown ones."""

from __future__ import annotations

from dataclasses import replace

import vtc
from vtc.registry import known_methods, resolve


def test_registry():
    mine = {"tome", "pitome", "fastv", "visionzip", "fastervlm", "divprune"}
    mine |= {"random", "uniform", "pool", "downsample"}
    known = vtc.methods()
    assert known == known_methods()
    assert mine <= set(known)
    assert all(cls.name == name and cls.summary and cls.__doc__ for name, cls in known.items())
    for name in mine:
        (method,) = resolve(name, keep_ratio=0.5)
        assert type(method) is known[name] and method.keep_ratio == 0.5
        assert hash(method) == hash(replace(method))
        assert str(method) == f"{name}(keep_ratio=0.5)"
        assert method.stages <= {"pixels", "vision", "features", "decoder"}
