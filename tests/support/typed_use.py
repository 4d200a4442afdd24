# SPDX-License-Identifier: Apache-2.0
"""Uses of the public API with their types; checked by mypy (make lint), never run."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor, nn
from typing_extensions import assert_type

import vtc


class Model(nn.Module):
    """A user's own class, which must stay itself."""

    def answer(self) -> str:
        return ""


def uses(model: Model, inputs: dict[str, Any], x: Tensor) -> None:
    wrapped = vtc.wrap(model, "mustdrop", keep_ratio=0.25)
    assert_type(wrapped, Model)
    assert_type(wrapped.answer(), str)
    assert_type(vtc.unwrap(wrapped), Model)
    with vtc.compressing(model, vtc.chain("pitome", "fastv")) as session:
        report = session.report()
        assert_type(report, vtc.Report)
        assert_type(vtc.overlay(report, Image.new("RGB", (8, 8))), Image.Image)
    with vtc.observe(model) as session:
        assert_type(session.report(), vtc.Report)
    assert_type(vtc.compress_inputs(model, inputs, "visionzip"), dict[str, Any])
    assert_type(vtc.calibrate(model, [inputs], "fastv", 0.1), vtc.Calibration)
    assert_type(vtc.methods(), dict[str, type[vtc.Method]])
    matched = vtc.match(["fastv", "pitome"], 0.5, model=model, inputs=inputs)
    vtc.wrap(model, matched["fastv"])

    reduction = vtc.Reduction.from_scores(x, 4)
    assert_type(reduction.then(vtc.Reduction.identity(1, 4)), vtc.Reduction)
    assert_type(reduction.merge(x), tuple[Tensor, Tensor])
    assert_type(reduction.expand(reduction.select(x)), Tensor)

    vtc.wrap(model, 3)  # type: ignore[arg-type]  # a wrong type is noticed
