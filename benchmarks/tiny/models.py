# SPDX-License-Identifier: Apache-2.0
"""Build and load the embedded tiny models: a LLaVA, a LLaVA-NeXT and a text tower, all on the same
vision tower."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Dinov2Model,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import vtc

from ..tasks import scenes
from .extract import resize_positions, tower_config

ASSETS = Path(vtc.__file__).parent / "assets"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(5)
VIEW = 112
"""Side in pixels of the thumbnail and of each crop of the LLaVA-NeXT: 8 x 8 patches."""
PINPOINTS = [[224, 336], [336, 224], [224, 224], [112, 336], [336, 112], [112, 224], [224, 112]]
"""(height, width) in pixels into which the LLaVA-NeXT fits an image: two to six crops."""
PROMPT = "USER: <image>\n{question} ASSISTANT:"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{{ '\\n' }}"
    "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} "
    "{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Words of easy-VQA's and our own question templates, and a few spare ones.
EXTRA_WORDS = [
    "user",
    "assistant",
    ":",
    "?",
    ".",
    ",",
    "!",
    "'",
    "-",
    "the",
    "a",
    "an",
    "is",
    "are",
    "there",
    "what",
    "which",
    "how",
    "many",
    "of",
    "on",
    "in",
    "at",
    "or",
    "and",
    "not",
    "no",
    "yes",
    "does",
    "do",
    "image",
    "picture",
    "contain",
    "present",
    "shape",
    "shapes",
    "color",
    "colors",
    "object",
    "objects",
    "digit",
    "digits",
    "number",
    "with",
    "show",
    "shows",
    "size",
    "small",
    "large",
    "left",
    "right",
    "top",
    "bottom",
    "above",
    "below",
    "position",
    "where",
    "background",
    "rectangle",
    "rectangles",
    "teal",
    "gray",
    "brown",
    "pink",
    "olive",
    "it",
    "this",
    "that",
    "its",
    "to",
    "from",
    "than",
    "any",
    "all",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "zero",
    "none",
    "nothing",
    "both",
    "more",
    "less",
    "same",
    "different",
    "blank",
    "describe",
    "answer",
    "question",
    "word",
    "single",
    "using",
    "please",
    "side",
    "big",
    "tiny",
    "corner",
    "middle",
    "center",
    "largest",
    "smallest",
    "between",
    "near",
    "next",
]


def vocabulary() -> list[str]:
    """Return the words of the tokenizer, special tokens first."""
    words = [*SPECIAL, *(str(d) for d in range(10)), *scenes.COLORS, *scenes.SHAPES]
    words += [scenes.PLURALS.get(s, s + "s") for s in scenes.SHAPES]
    words += [*scenes.BACKGROUNDS, *EXTRA_WORDS]
    return list(dict.fromkeys(words))


def make_tokenizer(end: bool = False) -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: lower case, punctuation apart, <s> first (and </s> last
    if `end`)."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel

    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary())}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A",
        pair="<s> $A $B </s>" if end else "<s> $A $B",
        special_tokens=[("<s>", BOS), ("</s>", EOS)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right" if end else "left",
        model_max_length=96 if end else 2048,
        clean_up_tokenization_spaces=False,
        **({} if end else {"extra_special_tokens": {"image_token": "<image>"}}),
    )
    if not end:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(image_size: int) -> dict[str, Any]:
    """Return what both LLaVAs have: DINOv2-S/14 and a Llama of 6.5 M parameters."""
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        intermediate_size=704,
        max_position_embeddings=2048,
        initializer_range=0.04,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    return {
        "vision_config": tower_config(image_size),
        "text_config": text,
        "image_token_index": IMAGE,
        "image_seq_length": (image_size // 14) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": True,
    }


def llava_config(image_size: int = 336) -> LlavaConfig:
    """Return the configuration of the tiny LLaVA."""
    return LlavaConfig(**_config(image_size))


def llava_next_config() -> LlavaNextConfig:
    """Return the configuration of the tiny LLaVA-NeXT: a thumbnail and two to six crops."""
    return LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **_config(VIEW))


def text_config() -> CLIPTextConfig:
    """Return the configuration of the text tower for retrieval."""
    return CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=128,
        max_position_embeddings=96,
        hidden_act="gelu",
        pad_token_id=PAD,
        bos_token_id=BOS,
        # Not 2: CLIPTextModel takes 2 for a legacy setting and pools at the largest id instead.
        eos_token_id=EOS,
    )


class ImageProjection(nn.Module):
    """Map [class token ; mean patch token] of the tower, (B, 768), to the text space, (B, 128)."""

    def __init__(self, width: int = 768, hidden: int = 256, dim: int = 128):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.norm(pooled))))


def pool(last_hidden_state: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
    """Return [class token ; mean of patch tokens weighted by `size` (B, N)], (B, 2 D) from (B,
    1 + N, D)."""
    cls, patches = last_hidden_state[:, 0], last_hidden_state[:, 1:]
    if size is None:
        mean = patches.mean(1)
    else:
        weight = size.to(patches.dtype).unsqueeze(-1)
        mean = (patches * weight).sum(1) / weight.sum(1)
    return torch.cat([cls, mean], dim=-1)


class Retrieval(NamedTuple):
    """Parts of image-text retrieval; image embedding = projection(pool(tower(...)))."""

    vision: Dinov2Model
    text: CLIPTextModelWithProjection
    projection: ImageProjection
    tokenizer: PreTrainedTokenizerFast
    image_processor: Any


def _folder(assets: Path, name: str) -> Path:
    """A folder of weights; one that comes with vtc only with the contents it was published with.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a file of the package differs from its pinned hash, or has none.
    """
    folder = Path(assets) / name
    if not folder.exists():
        raise FileNotFoundError(f"{folder} is missing; see benchmarks/tiny/README.md to make it")
    if Path(assets) == ASSETS:
        _verify(name)
    return folder


def digests(assets: Path, name: str = "tiny-*") -> dict[str, str]:
    """SHA-256 of every file of the models, by its path within the assets."""
    return {
        path.relative_to(assets).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(assets.glob(f"{name}/**/*"))
        if path.is_file()
    }


@functools.cache
def _verify(name: str) -> None:
    lines = (ASSETS / "SHA256SUMS").read_text("utf-8").splitlines()
    pinned = {path: digest for digest, path in (line.split("  ") for line in lines)}
    for path, digest in digests(ASSETS, name).items():
        if digest != pinned.get(path):
            raise ValueError(
                f"{ASSETS / path} is not the file that this vtc was published with (SHA256SUMS "
                "beside it); install vtc again, or pass a folder of your own as assets="
            )


def load_llava(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, assets: Path = ASSETS
):
    """Return (model, processor) of the embedded tiny LLaVA."""
    folder = _folder(assets, "tiny-llava")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def load_llava_next(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, assets: Path = ASSETS
):
    """Return (model, processor) of the embedded tiny LLaVA-NeXT.

    Its folder holds no vision tower: that of tiny-llava is taken, positions resized to 8 x 8.
    """
    folder = _folder(assets, "tiny-llava-next")
    state = load_file(_folder(assets, "tiny-llava") / "model.safetensors")
    state = {name: value for name, value in state.items() if "vision_tower" in name}
    for name in [n for n in state if n.endswith("position_embeddings")]:
        state[name] = resize_positions(state[name], VIEW // 14)
    state.update(load_file(folder / "model.safetensors"))
    model = LlavaNextForConditionalGeneration.from_pretrained(
        None, config=LlavaNextConfig.from_pretrained(folder), state_dict=state, dtype=dtype
    )
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def load_retrieval(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, assets: Path = ASSETS
) -> Retrieval:
    """Return the vision tower of the tiny LLaVA with the text tower trained on its features."""
    model, processor = load_llava(device, dtype, assets)
    folder = _folder(assets, "tiny-text")
    text = CLIPTextModelWithProjection.from_pretrained(folder, dtype=dtype).to(device).eval()
    projection = ImageProjection()
    projection.load_state_dict(load_file(folder / "visual_projection.safetensors"))
    return Retrieval(
        model.model.vision_tower,
        text,
        projection.to(device, dtype).eval(),
        PreTrainedTokenizerFast.from_pretrained(folder),
        processor.image_processor,
    )
