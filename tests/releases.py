# SPDX-License-Identifier: Apache-2.0
"""What older transformers releases lack: the one list of tests that must not pass there.

Each entry is expected to fail with the named error, which for `UnsupportedError` is the refusal that
the README documents; nothing is skipped, and any other error is a failure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import transformers

import vtc


def release() -> tuple[int, int]:
    """(major, minor) of the installed transformers."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class Gap:
    """Tests whose id matches ``tests`` raise ``error`` on releases before ``until``."""

    until: tuple[int, int]
    tests: str
    error: type[BaseException] | tuple[type[BaseException], ...]
    reason: str


REFUSED = vtc.UnsupportedError
GAPS = [
    Gap(
        (5, 18),
        r"test_matrix.py::test_cells|test_docs.py::test_support_matrix",
        (REFUSED, AssertionError),
        "the matrices of the README are those of the newest release",
    ),
    Gap(
        (5, 18),
        r"test_inputs.py::test_same_as_wrapped|test_anyres.py::test_compress_inputs"
        r"|test_inputs.py::test_refusals|test_styles.py::test_chunked_prefill"
        r"|test_styles.py::test_quantized_cache",
        (REFUSED, AssertionError),
        "compress_inputs hands over encoded images (mm_encoder_outputs), which 5.18 introduced",
    ),
    Gap(
        (5, 18),
        r"(test_encoders|test_llava).py::\w+\[(pitome|tome|True)-(hf-)?(dinov2|vit)"
        r"|test_mustdrop.py::test_ragged_images\w*\[(hf-)?(dinov2|vit)"
        r"|test_vision_engine.py::test_(ragged_images|half_precision)\w+\[hf-(dinov2|vit)"
        r"|test_vision_engine.py::test_merged_token\w+\[True-hf-(dinov2|vit)",
        REFUSED,
        "attention of HF DINOv2 and ViT takes no mask: proportional attention is refused",
    ),
    Gap(
        (5, 6),
        r"test_anyres.py::test_beams|test_calling.py::test_generate\[.*beams"
        r"|test_styles.py::test_generate\[.*beam",
        (REFUSED, AssertionError),
        "5.5 itself hands the images of one prompt to another's beams",
    ),
    Gap(
        (5, 6),
        r"test_calling.py::test_generate\[.*prompt-lookup|test_styles.py::test_assisted",
        TypeError,
        "assisted decoding of 5.5 needs an eos_token_id, and the mini models have none",
    ),
    Gap(
        (5, 6),
        r"test_runner.py::test_sharing_the_encoder|test_globalcom2.py::test_as_the_loops_do",
        AttributeError,
        "these tests read CLIP's blocks where 5.6 and newer keep them",
    ),
    Gap(
        (5, 18),
        r"test_vision_engine.py::test_(equals_explicit_blocks|dropping_is_masking)"
        r"\[.*hf-(dinov2|vit)",
        TypeError,
        "these tests mask the attention of HF DINOv2 and ViT, which takes no mask before 5.18",
    ),
]


def expect(items: list[pytest.Item]) -> None:
    """Mark the collected tests that this release cannot pass."""
    for gap in GAPS:
        if release() < gap.until:
            mark = pytest.mark.xfail(reason=gap.reason, raises=gap.error, strict=False)
            for item in items:
                if re.search(gap.tests, item.nodeid):
                    item.add_marker(mark)
