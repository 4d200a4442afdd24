# SPDX-License-Identifier: Apache-2.0
"""The method table and the support matrix, generated from the registry.

python -m vtc.benchmarks.catalogue README.md    writes them between their markers
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from ..method import known_methods
from ..wrapping import compressing
from .mini import mini_crops, mini_qwen, mini_video
from .mini_families import FAMILIES as JOINED
from .mini_families import mini_joined

PLACES = {
    "pixels": "before the encoder",
    "vision": "in the encoder",
    "features": "before the LLM",
    "decoder": "in the LLM",
    "bypass": "around LLM layers",
    "cache": "in the KV cache",
}


def method_rows() -> list[dict[str, str]]:
    """Name, place, needs, default budget and summary of every registered method."""
    rows = []
    for name, cls in known_methods().items():
        stages = cls().stages
        rows.append(
            {
                "name": name,
                "acts": ", ".join(text for stage, text in PLACES.items() if stage in stages),
                "kind": "merges" if cls.merges else "keeps",
                "needs": ", ".join(sorted(cls.needs)),
                "default": f"{100 * cls.default_ratio:g} %",
                "summary": cls.summary,
            }
        )
    return rows


def method_table() -> str:
    """The method table in Markdown."""
    lines = ["| method | acts | what it does |", "|---|---|---|"]
    lines += [f"| `{r['name']}` | {r['acts']} | {r['summary']} |" for r in method_rows()]
    return "\n".join(lines)


# ---- support matrix ----------------------------------------------------------------------------


def _pixels(edge: int) -> Any:
    import torch

    return torch.randn(1, 3, edge, edge, generator=torch.Generator().manual_seed(0))


def _llava(tower: str) -> tuple[Any, dict[str, Any]]:
    import torch

    from .mini import mini_llava

    model = mini_llava(tower)
    ids = torch.tensor([[1, *[3] * 16, 5, 6, 7]])
    return model, {"input_ids": ids, "pixel_values": _pixels(56)}


def _encoder(kind: str) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    from .mini import mini_tower_config

    names = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "dinov2": "Dinov2Model"}
    torch.manual_seed(0)
    model = getattr(transformers, names.get(kind, "ViTModel"))(mini_tower_config(kind))
    return model.eval(), {"pixel_values": _pixels(56)}


def _timm(name: str) -> tuple[Any, dict[str, Any]]:
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model(name, img_size=112, depth=4, embed_dim=48, num_heads=4)
    return model.eval(), {"x": _pixels(112)}


def _open_clip() -> tuple[Any, dict[str, Any]]:
    import torch
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=4, width=32, head_width=8, patch_size=14, image_size=56)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=4, layers=2)
    return CLIP(32, vision, text).eval(), {"image": _pixels(56)}


def _retrieval(version: str) -> tuple[Any, dict[str, Any]]:
    import torch

    from .mini import mini_retrieval

    ids = torch.tensor([[5, 6, 2]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return mini_retrieval(version), {"pixel_values": _pixels(56), **text}


FAMILIES: dict[str, Any] = {
    "LLaVA, CLIP": lambda: _llava("clip"),
    "LLaVA, SigLIP": lambda: _llava("siglip"),
    "LLaVA, DINOv2": lambda: _llava("dinov2"),
    "LLaVA-NeXT": lambda: mini_crops("next"),
    "LLaVA-NeXT-Video": lambda: mini_crops("next-video"),
    "LLaVA-OneVision": lambda: mini_crops("onevision"),
    "Qwen2-VL": lambda: mini_qwen("Qwen2VL"),
    "Qwen2.5-VL": lambda: mini_qwen("Qwen2_5_VL"),
    "Qwen3-VL": lambda: mini_qwen("Qwen3VL"),
    **{name: partial(mini_joined, name) for name in JOINED},
    "LLaVA-NeXT-Video, video": lambda: mini_video("next-video"),
    "LLaVA-OneVision, video": lambda: mini_video("onevision"),
    "Qwen2-VL, video": lambda: mini_video("Qwen2VL"),
    "Qwen2.5-VL, video": lambda: mini_video("Qwen2_5_VL"),
    "Qwen3-VL, video": lambda: mini_video("Qwen3VL"),
    "HF CLIP": lambda: _encoder("clip"),
    "HF SigLIP": lambda: _encoder("siglip"),
    "HF DINOv2": lambda: _encoder("dinov2"),
    "HF ViT": lambda: _encoder("vit"),
    "HF BLIP": lambda: _retrieval("Blip"),
    "HF BLIP-2": lambda: _retrieval("Blip2"),
    "timm ViT": lambda: _timm("vit_small_patch14_dinov2"),
    "timm DeiT": lambda: _timm("deit_tiny_distilled_patch16_224"),
    "timm EVA": lambda: _timm("eva02_tiny_patch14_224"),
    "timm SigLIP": lambda: _timm("vit_base_patch16_siglip_224"),
    "open_clip": _open_clip,
}
"""Columns of the support matrix, each a mini random model and its inputs."""


def refusal(method: str, model: Any, inputs: dict[str, Any], **parameters: Any) -> str | None:
    """Why a method at half the tokens does not run on a model: its `UnsupportedError`, or None."""
    import torch

    from .runner import seeded

    try:
        made = seeded(method, Fraction(1, 2), 0)
    except ValueError:  # takes no budget
        made = seeded(method, None, 0)
    made = replace(made, **parameters)
    try:
        with torch.no_grad(), compressing(model, made):
            model(**inputs)
    except UnsupportedError as error:
        return str(error)
    return None


def support_matrix() -> str:
    """Method x model in Markdown, found by running each pair; why where one does not run."""
    built = {name: make() for name, make in FAMILIES.items()}
    reasons: dict[str, int] = {}
    lines = ["| method | " + " | ".join(built) + " |", "|---|" + ":-:|" * len(built)]
    for method, cls in known_methods().items():
        marks = []
        for model, inputs in built.values():
            mark, why = "yes", refusal(method, model, inputs)
            if why is not None:
                mark = f"{reasons.setdefault(generic(why, method), len(reasons) + 1)}"
                ways = (cls.without_cls, cls.outside_encoder, cls.without_cls | cls.outside_encoder)
                for own in filter(None, ways):
                    if refusal(method, model, inputs, **own) is None:
                        mark += ", " + ", ".join(f"`{k}={v}`" for k, v in own.items())
                        break
            marks.append(mark)
        lines.append(f"| `{method}` | " + " | ".join(marks) + " |")
    return "\n".join([*lines, "", *(f"{n}. {why}" for why, n in reasons.items())])


def generic(message: str, method: str) -> str:
    """An error message without the names of the pair it is about, and without its way out."""
    for name in (f'"{method}"', method):
        message = re.sub(rf"(?<![\w\"]){re.escape(name)}(?![\w\"])", "the method", message)
    message = re.sub(r"\w+(?= (is an encoder|has none|takes one))", "the encoder", message)
    return re.sub(r" \([^)]*stage\)", "", message).split(";")[0]


# ---- blocks of a Markdown file -----------------------------------------------------------------


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)


def read_block(path: Path, name: str) -> str:
    """The text between the markers of a block.

    Raises:
        ValueError: the file has no such block.
    """
    found = _pattern(name).search(path.read_text("utf-8"))
    if found is None:
        raise ValueError(f"{path} has no block <!-- {name}:begin --> ... <!-- {name}:end -->")
    return found[0].split("-->\n", 1)[1].rsplit("<!--", 1)[0].strip()


def fill_block(path: Path, name: str, text: str) -> None:
    """Replace the text between the markers of a block.

    Raises:
        ValueError: the file has no such block.
    """
    read_block(path, name)
    before = path.read_text("utf-8")
    after = _pattern(name).sub(lambda m: f"{m[1]}{text.strip()}\n{m[2]}", before, count=1)
    path.write_text(after, "utf-8")


if __name__ == "__main__":
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    fill_block(readme, "methods", method_table())
    fill_block(readme, "support", support_matrix())
