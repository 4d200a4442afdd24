# SPDX-License-Identifier: Apache-2.0
"""Compression before `generate()`: shorter inputs for a stock model."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .engine.refusals import sliding_window
from .errors import UnsupportedError
from .method import Chain, Method
from .registry import resolve
from .session import compressing
from .transformers_contract import ENCODED, IDS, PIXELS, VIDEOS, EncodedImages, features_of


@torch.no_grad()
def compress_inputs(
    model: Any, inputs: dict[str, Any], method: str | Method | Chain, **parameters: Any
) -> dict[str, Any]:
    """Encode the images now and give inputs with only the visual tokens that are left.

    The model is not changed, and nothing runs inside it afterwards: the result works with static
    caches, chunked prefill, `torch.compile` and serving loops, where `wrap` cannot. Prompts become
    short, with padding on the left; survivors keep their positions, so decode with the cache on.

    Args:
        model: a supported multimodal LLM that is not wrapped.
        inputs: what its processor gave: ``input_ids`` (B, L), ``pixel_values`` and so on.
        method: as in `wrap`; only methods that act before the LLM.
        parameters: as in `wrap`.

    Returns:
        New inputs for ``model.generate(**inputs)``; the images are in ``mm_encoder_outputs``. Make
        fresh ones for every call: beam search changes them in place.

    Raises:
        UnsupportedError: the method acts inside the LLM, the prompt is longer than a sliding window
            of the LLM or ends in a token that is dropped, or this transformers cannot take encoded
            images.
        ValueError: inputs without ids or images.
    """
    methods = resolve(method, **parameters)
    if VIDEOS.of(inputs) is not None:
        raise UnsupportedError(
            "compress_inputs takes images only; use vtc.wrap, which compresses videos as well"
        )
    for m in methods:
        inside = m.stages & {"decoder", "bypass", "cache"}
        if inside:
            raise UnsupportedError(
                f"{m.name} chooses tokens inside the language model; use vtc.wrap for it, or a "
                "method that acts on the encoder or its features"
            )
    taken = ENCODED.among(inspect.signature(model.forward).parameters)
    if taken is None:
        raise UnsupportedError(
            f"{type(model).__name__} of this transformers cannot take encoded images "
            "(mm_encoder_outputs, 5.18 and newer); use vtc.wrap"
        )
    if IDS.of(inputs) is None or PIXELS.of(inputs) is None:
        raise ValueError(
            "compress_inputs needs input_ids and pixel_values, as the processor gives them"
        )
    out = dict(inputs)
    ids = IDS.take(out)
    # The outer model may hand some arguments through without naming them.
    owners = (model, getattr(model, "model", model))
    names = {n for m in owners for n in inspect.signature(m.get_image_features).parameters}
    images = {name: out.pop(name) for name in names if name in inputs}
    mask = out.pop("attention_mask", None)
    mask = torch.ones_like(ids) if mask is None else mask
    window = sliding_window(model.config.get_text_config())
    if window is not None and ids.shape[1] > window:
        raise UnsupportedError(
            f"the prompt of {ids.shape[1]} tokens is longer than the language model's sliding "
            f"window of {window}, which would count kept tokens instead of positions in a stock "
            "model; use vtc.wrap, which counts positions"
        )
    with compressing(model, Chain(methods)) as session:
        llm: Any = session.sites.decoder
        token_ids = llm.token_ids
        encoded = model.get_image_features(**images)
    features = features_of(encoded, model)
    alive_features = [~f[:, 0].isnan() for f in features]

    visual = torch.isin(ids, torch.tensor(token_ids, device=ids.device))
    alive = torch.cat(alive_features).to(ids.device)
    needed = mask.bool()
    needed = needed & ~visual
    needed[visual] = alive
    length = int(needed.sum(1).max())
    # The tokens that are left, in order, at the right end of every row.
    index = needed.long().argsort(dim=1, stable=True)[:, -length:]
    keep = needed.gather(1, index)
    pad = model.generation_config.pad_token_id
    out["input_ids"] = ids.gather(1, index).where(keep, 0 if pad is None else pad)
    out["attention_mask"] = keep.to(mask.dtype)
    if methods[0].positions == "original":
        if bool((mask.bool() & ~needed)[:, -1].any()):
            raise UnsupportedError(
                "a prompt ends in an image token that was dropped, and generate() would count "
                "positions on from the last one left; put text behind the image, or use "
                'positions="compact", or vtc.wrap'
            )
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        if llm.mrope:
            axes = _axes(llm.base, ids, mask, inputs).gather(2, index.expand(3, -1, -1))
            # In front, what tells sequences in one row apart, which must have no gaps.
            positions = torch.cat([(keep.long().cumsum(1) - 1).clamp(min=0)[None], axes])
        else:
            positions = positions.gather(1, index)
        out["position_ids"] = positions.where(keep, 0)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if out.get(name) is not None:
            out[name] = out[name].gather(1, index).where(keep, 0)
    left: Any = [f[a] for f, a in zip(features, alive_features, strict=True)]
    if isinstance(features, torch.Tensor):
        if len({len(f) for f in left}) > 1:
            raise UnsupportedError(
                f"{type(model).__name__} takes the features of all images as one tensor, and they "
                "have different numbers of tokens left; use a method that keeps as many of each, "
                "or vtc.wrap"
            )
        left = torch.stack(left)
    image: Any = EncodedImages(pooler_output=left)
    if getattr(encoded, "deepstack_features", None) is not None:
        image = type(encoded)(pooler_output=left)
        image.deepstack_features = [
            [f[a] for f, a in zip(rows, alive_features, strict=True)]
            for rows in encoded.deepstack_features
        ]
    out[taken] = {"image": image}
    return out


def _axes(base: Any, ids: torch.Tensor, mask: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """(3, B, L) positions of time, height and width, as the model gives them to the full prompt."""
    names = ("mm_token_type_ids", "image_grid_thw")
    missing = [name for name in names if inputs.get(name) is None]
    if missing:
        raise ValueError(f"this model needs {missing[0]}, as its processor gives it")
    given = {name: inputs[name] for name in names}
    return base.get_rope_index(ids, attention_mask=mask, **given)[0]
