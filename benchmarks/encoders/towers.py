# SPDX-License-Identifier: Apache-2.0
"""Image encoders behind one small interface: two-tower models and classifiers.

How a model is named:

    embedded                               the tiny retrieval model, on the tower of the tiny LLaVA
    openai/clip-vit-large-patch14          Hugging Face CLIP, SigLIP, SigLIP 2: hub id or folder
    open_clip:ViT-B-32/laion2b_s34b_b79k   open_clip, architecture and tag, or a file of weights
    open_clip:hf-hub:owner/name            the same from the hub; open_clip:local-dir:FOLDER
    timm:vit_small_patch16_224             a classifier; timm:hf-hub:owner/name, timm:local-dir:...

No code of a repository is run. Hugging Face models load from safetensors only; weights in another
format, of open_clip and timm, are read without pickled code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...adapters.locate import locate_vision
from ...errors import UnsupportedError
from ..tiny.models import load_retrieval, pool

EMBEDDED = "embedded"
Images = Sequence[Image.Image]

READS = {
    "cls": "the class token alone",
    "mean": "the mean of the patches",
    "map": "attention to all patches",
    "cls+mean": "the class token and the mean of the patches",
}
"""Parts that a pooled output is made of."""


@dataclass(frozen=True)
class ImageModel:
    """A model of one vector for each image.

    Attributes:
        name: as it was asked for, a folder by its last part.
        vision: what `vtc.wrap` takes.
        reads: what the output is made of, a key of `READS`.
        transform: images (RGB) to pixels (B, 3, H, W), the model's own preprocessing.
        forward: pixels to the output (B, D); of a classifier, to its logits.
    """

    name: str
    vision: nn.Module
    reads: str
    transform: Callable[[Images], Tensor]
    forward: Callable[[Tensor], Tensor]

    @property
    def _weight(self) -> Tensor:
        return next(self.vision.parameters())

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    def pixels(self, images: Images) -> Tensor:
        """Preprocessed images (B, 3, H, W), where the model is."""
        return self.transform(images).to(self.device, self.dtype)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Output (B, D) for preprocessed pixels (B, 3, H, W)."""
        return self.forward(pixels)

    def encode_images(self, images: Images) -> Tensor:
        """Output (B, D) for images."""
        return self.encode(self.pixels(images))

    def describe(self) -> dict[str, Any]:
        """Name, class, parameters (of both towers where they are one module) and dtype."""
        return {
            "name": self.name,
            "class": type(self.vision).__name__,
            "parameters_m": round(sum(p.numel() for p in self.vision.parameters()) / 1e6, 1),
            "dtype": str(self.dtype).removeprefix("torch."),
            "reads": READS[self.reads],
        }


@dataclass(frozen=True)
class Classifier(ImageModel):
    """A model with one logit for each of ``classes``."""

    classes: int


@dataclass(frozen=True)
class TwoTower(ImageModel):
    """A model that puts images and texts into one space; embeddings have unit length.

    Attributes:
        text: texts to text features (B, D).
    """

    text: Callable[[Sequence[str]], Tensor]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of unit length for preprocessed pixels (B, 3, H, W)."""
        return F.normalize(self.forward(pixels), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, D) of unit length for texts."""
        return F.normalize(self.text(texts), dim=-1)


def load(
    model: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TwoTower | Classifier:
    """Load a model by name (see the module docstring); None is the embedded one.

    Raises:
        UnsupportedError: not a model whose encoder vtc can compress, or no dual encoder.
        ValueError, OSError: unknown, or not to be had.
        ImportError: its library is missing.
    """
    if model in (None, EMBEDDED):
        return _embedded(device, dtype)
    kind, _, rest = str(model).partition(":")
    place = {"device": device, "dtype": dtype}
    if kind == "open_clip":
        return _open_clip(rest, place)
    if kind == "timm":
        return _timm(rest, place)
    return _hugging_face(str(model), place)


def _short(name: str) -> str:
    """A file or folder by its last part: results name no paths of the machine."""
    return Path(name).name if Path(name).exists() else name


def _reads(vision: nn.Module) -> str:
    """How the encoder pools, which must be known; what vtc cannot compress is refused here."""
    pool = locate_vision(vision).pool
    if pool not in READS:
        raise UnsupportedError(
            f"{type(vision).__name__} pools no embedding of an image; use a checkpoint with a "
            "pooling head"
        )
    return pool


def _embedded(device: str | torch.device, dtype: torch.dtype) -> TwoTower:
    parts = load_retrieval(device, dtype)

    def forward(pixels: Tensor) -> Tensor:
        hidden = parts.vision(pixels).last_hidden_state
        session = getattr(parts.vision, "vtc", None)
        state: Any = getattr(getattr(session, "vision", None), "state", None)
        left = None if state is None else state.reduction
        if left is None:
            return parts.projection(pool(hidden))
        # A merged token counts as many times as it holds patches, a padding slot not at all.
        size = state.size if left.valid is None else state.size * left.valid
        return parts.projection(pool(hidden, size))

    def text(texts: Sequence[str]) -> Tensor:
        ids = parts.tokenizer(list(texts), padding=True, return_tensors="pt").to(device)
        return parts.text(input_ids=ids.input_ids, attention_mask=ids.attention_mask).text_embeds

    def transform(images: Images) -> Tensor:
        return parts.image_processor(list(images), return_tensors="pt").pixel_values

    return TwoTower(EMBEDDED, parts.vision, "cls+mean", transform, forward, text)


def _features(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.pooler_output


def _hugging_face(name: str, place: dict[str, Any]) -> TwoTower:
    from transformers import AutoModel, AutoProcessor

    options: dict[str, Any] = {"trust_remote_code": False}
    model: Any = AutoModel.from_pretrained(name, use_safetensors=True, **options)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise UnsupportedError(
            f"{type(model).__name__} has no image and text embeddings in one space; retrieval "
            "needs a dual encoder, such as CLIP, SigLIP or SigLIP 2"
        )
    reads = _reads(model)
    processor = AutoProcessor.from_pretrained(name, **options)
    model.to(**place).eval()
    # SigLIP was trained on texts padded to the full length, and attends to the padding.
    siglip = model.config.model_type.startswith("siglip")
    names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
    padding: dict[str, Any] = {
        "padding": "max_length",
        "truncation": True,
        "max_length": model.config.text_config.max_position_embeddings,
        "return_tensors": "pt",
    }

    def text(texts: Sequence[str]) -> Tensor:
        ids = processor.tokenizer(list(texts), **padding).to(model.device)
        return _features(model.get_text_features(**{k: ids[k] for k in names}))

    return TwoTower(
        _short(name),
        model,
        reads,
        lambda images: processor.image_processor(list(images), return_tensors="pt").pixel_values,
        lambda pixels: _features(model.get_image_features(pixel_values=pixels)),
        text,
    )


def _open_clip(name: str, place: dict[str, Any]) -> TwoTower:
    import open_clip

    architecture, weights, shown = name, None, _short(name.removeprefix("local-dir:"))
    if not name.startswith(("hf-hub:", "local-dir:")):
        architecture, _, weights = name.partition("/")
        if not weights:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
            raise ValueError(
                f"open_clip:{architecture} needs weights: open_clip:{architecture}/TAG or "
                f"open_clip:{architecture}/FILE; known tags: {tags}"
            )
        shown = f"{architecture}/{_short(weights)}"
    try:
        model, transform = open_clip.create_model_from_pretrained(architecture, weights)
        tokenizer = open_clip.get_tokenizer(architecture)
    except RuntimeError as error:  # its word for whatever cannot be had
        raise ValueError(str(error)) from error
    reads = _reads(model)
    model.to(**place).eval()
    return TwoTower(
        f"open_clip:{shown}",
        model,
        reads,
        lambda images: torch.stack([transform(image) for image in images]),
        model.encode_image,
        lambda texts: model.encode_text(tokenizer(list(texts)).to(place["device"])),
    )


def _timm(name: str, place: dict[str, Any]) -> Classifier:
    import timm

    try:
        try:  # lets methods change the size of the image
            model = timm.create_model(name, pretrained=True, dynamic_img_size=True)
        except TypeError:  # no ViT; if it can be compressed, then at its own size
            model = timm.create_model(name, pretrained=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    reads = _reads(model)
    if not model.num_classes:
        raise UnsupportedError(f"timm:{name} has no classes; use a checkpoint with a classifier")
    model.to(**place).eval()
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model), is_training=False
    )
    return Classifier(
        "timm:" + _short(name.removeprefix("local-dir:")),
        model,
        reads,
        lambda images: torch.stack([transform(image) for image in images]),
        model,
        model.num_classes,
    )
