# SPDX-License-Identifier: Apache-2.0
"""Gaps of older transformers releases: the one list of tests that must not pass there.

Each entry is expected to fail with the named error, which for `UnsupportedError` is the refusal
that docs/limits.md documents; nothing is skipped, and any other error is a failure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
import transformers

import vtc


def release() -> tuple[int, int]:
    """(major, minor) of the installed transformers."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class Gap:
    """Tests whose id matches ``tests`` raise ``error`` from ``since`` on and before ``until``."""

    until: tuple[int, int]
    tests: str
    error: type[BaseException] | tuple[type[BaseException], ...]
    reason: str
    since: tuple[int, int] = (5, 5)


OLDEST = (5, 5)
REFUSED = vtc.UnsupportedError
CLASSES = {
    f"{name}ForConditionalGeneration"
    for name in (
        "Cosmos3Edge",
        "Exaone4_5_",
        "GraniteDocling",
        "HyperCLOVAXVisionV2",
        "Kimi_K25",
        "MiniMaxM3Sparse",
        "Molmo2",
        "MuseSpark",
        "QianfanOCR",
    )
}
"""Models of test_generic.py that came after the oldest release, before 5.23."""
GAPS = [
    Gap(
        (5, 18),
        r"test_matrix.py::test_cells|test_docs.py::test_support_matrix",
        (REFUSED, AssertionError),
        "the matrices of the documentation are those of the newest release",
    ),
    Gap(
        (5, 18),
        r"test_precompute.py::test_(same_as_wrapped|images_of_different|refusals)"
        r"|test_anyres.py::test_compress_inputs"
        r"|test_styles.py::test_(chunked_prefill|quantized_cache)\[(pitome|visionzip|divprune)\b"
        r"|test_families.py::test_(compressed_inputs|compact_positions)"
        r"|test_docs.py::test_the_quick_start",
        (REFUSED, AssertionError),
        "compress_inputs hands over encoded images (mm_encoder_outputs), which 5.18 introduced",
    ),
    Gap(
        (5, 18),
        r"test_generic.py::test_dropped_is_masked\[(LlavaNextVideo|Janus|DeepseekVLHybrid"
        r"|PerceptionLM|VideoLlava|FastVlm|Lfm2Vl|LightOnOcr|Idefics2|VideoLlama3|Glm4v|Glm4vMoe"
        r"|PaddleOCRVL|GlmOcr|QianfanOCR|Exaone4_5_|MiniMaxM3Sparse)For",
        ValueError,
        "these tests hand over encoded images (mm_encoder_outputs), which 5.18 introduced",
    ),
    Gap(
        (5, 18),
        r"test_trace.py::test_images_encoded_once",
        AssertionError,
        "this test hands over encoded images (mm_encoder_outputs), which 5.18 introduced",
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
        (5, 18),
        r"test_vision_engine.py::test_(equals_explicit_blocks|dropping_is_masking)"
        r"\[.*hf-(dinov2|vit)",
        TypeError,
        "these tests mask the attention of HF DINOv2 and ViT, which takes no mask before 5.18",
    ),
    Gap(
        (5, 18),
        r"test_docs.py::test_support_matrix_is_what_runs",
        AssertionError,
        "the table in docs/models.md is that of 5.18 and newer: merging works in HF DINOv2 and ViT",
    ),
    Gap(
        (5, 20),
        r"test_anyres.py::test_beams|test_calling.py::test_generate\[.*beams"
        r"|test_styles.py::test_generate\[(?!vidkv).*beam|test_precompute.py::\w+\[beams-left"
        r"|test_families.py::test_beams\[\w+-(?!Idefics3|SmolVLM)",
        (REFUSED, AssertionError),
        "transformers itself hands the images of one prompt to another's beams",
    ),
    Gap(
        (5, 20),
        r"test_families.py::test_beams\[\w+-(Idefics3|SmolVLM)",
        AssertionError,
        "5.18 itself hands the images of one prompt to another's beams, here too",
        since=(5, 18),
    ),
    Gap(
        (5, 23),
        r"test_precompute.py::\w+\[chunked-prefill"
        r"|test_styles.py::test_chunked_prefill\[(pitome|visionzip|divprune)\]"
        r"|test_anyres.py::test_other_refusals",
        (AssertionError, pytest.fail.Exception),
        "transformers itself drops the images in chunked prefill, and vtc sees none",
    ),
    Gap(
        (5, 18),
        r"test_calling.py::test_generate\[.*prompt-lookup|test_styles.py::test_assisted",
        TypeError,
        "assisted decoding before 5.18 needs an eos_token_id, and the mini models have none",
    ),
    Gap(
        (5, 6),
        r"test_runner.py::test_sharing_the_encoder_between_methods"
        r"|test_globalcom2.py::test_as_the_loops_do",
        AttributeError,
        "these tests read CLIP's blocks where 5.6 and newer keep them",
    ),
    Gap(
        (5, 6),
        r"test_inspection.py::test_what_is_known_of_a_llava",
        AssertionError,
        "CLIP's tower is called CLIPVisionTransformer in 5.5",
    ),
    Gap(
        (5, 12),
        r"test_compile.py::test_(one_graph|decoding_in_a_graph|through_autograd)",
        torch._dynamo.exc.Unsupported,
        "LLaVA of 5.5 is no graph for torch.compile, wrapped or not (torch._check with a message)",
    ),
]


def expect(items: list[pytest.Item]) -> None:
    """Mark the collected tests that this release cannot pass.

    On the oldest release each of them must fail, so that nothing stays in the list for too long.
    """
    for item in items:
        gaps = [g for g in GAPS if g.since <= release() < g.until and _named(g, item)]
        gaps += [
            Gap((5, 23), "", AttributeError, f"{name} came with a later transformers")
            for name in CLASSES
            if f"test_generic.py::{item.name}" in item.nodeid
            and f"[{name}]" in item.name
            and release() < (5, 23)
            and not hasattr(transformers, name)
        ]
        if gaps:
            errors = tuple(e for g in gaps for e in _errors(g))
            reason = "; ".join(g.reason for g in gaps)
            strict = release() == OLDEST
            item.add_marker(pytest.mark.xfail(reason=reason, raises=errors, strict=strict))


def _named(gap: Gap, item: pytest.Item) -> bool:
    return re.search(gap.tests, item.nodeid) is not None


def _errors(gap: Gap) -> tuple[type[BaseException], ...]:
    return gap.error if isinstance(gap.error, tuple) else (gap.error,)
