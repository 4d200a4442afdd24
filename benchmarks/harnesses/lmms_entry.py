# SPDX-License-Identifier: Apache-2.0
"""The entry point of lmms-eval (group ``lmms_eval.models``): ``lmms-eval --model vtc``.

lmms-eval calls it whenever it lists its models, so nothing heavy is imported here; the model is in
`lmms_model`. See docs/engines.md.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of ``vtc``: a chat model, and a simple one for ``--force_simple``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = f"{__package__}.lmms_model"
    return ModelManifest(
        model_id="vtc",
        chat_class_path=f"{module}.VTC",
        simple_class_path=f"{module}.SimpleVTC",
    )
