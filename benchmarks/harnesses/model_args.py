# SPDX-License-Identifier: Apache-2.0
"""Arguments for models of evaluation engines: ``pretrained=...,method=...,keep_ratio=0.25``.

lmms-eval and VLMEvalKit know names with values only. The names are those of `LoadOptions`,
``method``, and the fields of the method. ``method=pitome+fastv`` chains methods; each parameter
then says whose it is: ``pitome.keep_ratio=0.5,fastv.keep_ratio=0.2``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from ...method import Chain
from ...registry import chain, resolve
from ..tiny import models as tiny

EMBEDDED = {"tiny-llava": tiny.load_llava, "tiny-llava-next": tiny.load_llava_next}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """A model to load, and how.

    Attributes:
        pretrained: folder or hub id of a Hugging Face model, or the name of an embedded one:
            "tiny-llava", "tiny-llava-next".
        device: such as "cuda:1"; None leaves it to the engine. device_map: as in `from_pretrained`.
        dtype: "auto" is that of the checkpoint; the embedded models are float32.
        attn_implementation: attention kernel, the same with a method as without.
        min_pixels, max_pixels: of an image, where the processor takes them (Qwen-VL).
        trust_remote_code: whether code that comes with the model may run.
    """

    pretrained: str
    device: str | None = None
    device_map: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    trust_remote_code: bool = False

    def load(self, device: torch.device) -> tuple[Any, Any]:
        """Return (model, processor), the model in eval mode on ``device`` or as device_map says.

        Raises:
            ValueError: an argument that this model or its processor has no use for.
        """
        pixels = {k: v for k in ("min_pixels", "max_pixels") if (v := getattr(self, k)) is not None}
        if self.pretrained in EMBEDDED:
            if self.device_map is not None:
                raise ValueError(f"{self.pretrained} takes no device_map; give device")
            dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
            model, processor = EMBEDDED[self.pretrained](device, dtype)
            if self.attn_implementation is not None:
                model.set_attn_implementation(self.attn_implementation)
        else:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            code = {"trust_remote_code": self.trust_remote_code}
            model = AutoModelForImageTextToText.from_pretrained(
                self.pretrained,
                dtype=self.dtype,
                device_map=self.device_map,
                attn_implementation=self.attn_implementation,
                use_safetensors=True,
                **code,
            ).eval()
            if self.device_map is None:
                model = model.to(device)
            processor = AutoProcessor.from_pretrained(self.pretrained, **code, **pixels)
        images = processor.image_processor
        taken = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
        for name in pixels:
            if name not in taken:
                raise ValueError(f"{type(images).__name__} of {self.pretrained} takes no {name}")
        return model, processor


def parse(arguments: Mapping[str, Any]) -> tuple[LoadOptions, Chain | None]:
    """The model and the method that the arguments name; values may be text.

    Raises:
        ValueError: an argument that nothing takes (named), or a value of the wrong type.
    """
    given = dict(arguments)
    text = str(given.pop("method", None) or "none")
    names = [] if text.lower() == "none" else [name.strip() for name in text.split("+")]
    if len(set(names)) < len(names):
        raise ValueError(f"method={text}: a chain names each method once")
    classes = {name: type(resolve(name)[0]) for name in names}
    hints = {name: get_type_hints(cls) for name, cls in classes.items()}
    taken = {name: [f.name for f in fields(cls)] for name, cls in classes.items()}
    own = {f.name for f in fields(LoadOptions)}
    loading: dict[str, Any] = {}
    parameters: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in given.items():
        owner, dot, field = key.rpartition(".")
        if not dot and len(names) == 1 and key not in own:
            owner = names[0]
        if owner in taken and field in taken[owner]:
            parameters[owner][field] = _typed(key, value, hints[owner][field])
        elif key in own:
            loading[key] = _typed(key, value, get_type_hints(LoadOptions)[key])
        else:
            raise ValueError(_unknown(key, text, sorted(own | {"method"}), taken))
    if "pretrained" not in loading:
        raise ValueError("pretrained is missing: a folder, a hub id or " + " or ".join(EMBEDDED))
    methods = [resolve(name, **parameters[name])[0] for name in names]
    return LoadOptions(**loading), chain(*methods) if methods else None


def _unknown(key: str, text: str, own: list[str], taken: dict[str, list[str]]) -> str:
    """Message on an argument that nothing takes."""
    whose = [name for name in taken if key in taken[name]]
    if whose:  # of a chain
        return f"{key}: say whose it is, {' or '.join(f'{name}.{key}' for name in whose)}"
    known = [*own, *(p for names in taken.values() for p in names)]
    near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    takes = [f"{name} takes {', '.join(names)}" for name, names in taken.items()]
    return f'unknown argument "{key}" (method={text}){hint}' + "".join(
        f"; {line}" for line in [*takes, f"the model takes {', '.join(own)}"]
    )


def _typed(key: str, value: Any, hint: Any) -> Any:
    """The value as the field's type wants it.

    Raises:
        ValueError: it is of another type.
    """
    try:
        return _convert(value, hint)
    except (TypeError, ValueError, OverflowError, RecursionError):
        name = getattr(hint, "__name__", None) if get_origin(hint) is None else None
        raise ValueError(f"{key}={value} is not of type {name or hint}") from None


def _convert(value: Any, hint: Any) -> Any:
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        for option in sorted(inner, key=lambda t: t is not NoneType):  # "none" before any text
            try:
                return _convert(value, option)
            except (TypeError, ValueError):
                continue
        raise ValueError
    if kind is Literal:
        return inner[[str(i) for i in inner].index(str(value))]
    if kind is tuple:
        listed = json.loads(value) if isinstance(value, str) else value
        return tuple(_convert(v, inner[0]) for v in listed)
    if hint is NoneType:
        if str(value).lower() != "none":
            raise ValueError
        return None
    if hint is bool:
        return ("false", "true").index(str(value).lower()) == 1
    if hint is int:
        number = float(value)
        if isinstance(value, bool) or not number.is_integer():
            raise ValueError
        return int(number)
    if hint is float and not isinstance(value, bool):
        return float(value)
    if hint is str:
        return str(value)
    if hint is Any:
        return value
    raise TypeError  # an object, which cannot be written as text
