# SPDX-License-Identifier: Apache-2.0
"""`inspect`: how vtc sees a model, and which methods work on it, before anything is computed."""

from __future__ import annotations

import importlib
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import locate as adapters
from .adapters.base import Sites
from .engine.refusals import sliding_window
from .errors import UnsupportedError
from .method import Method
from .registry import known_methods
from .session import _install, unwrap


@dataclass
class Inspection:
    """Findings of `inspect`.

    Attributes:
        model: class of the model; family: what the adapter calls it; adapter: the file that knows
            it, in ``adapters/``.
        encoder: class, blocks, width, heads, patch edge in pixels, prefix tokens, whether the first
            of them is a class token, grid (rows, columns) of patches at the configured size, how
            the encoder's own head reads the tokens, whether it takes other image sizes.
        language: projector, decoder, layers, heads, KV heads, widths, placeholder ids and tokens of
            an image (None where images differ) of a multimodal LLM; None for an encoder alone.
        notes: what to know of how the model was understood.
        warnings: what keeps every method from working, or limits them all.
        methods: by name, None where `wrap` takes it at half the tokens, else the reason it gives.
        instead: by name, parameters with which a refused method works.
    """

    model: str
    family: str
    adapter: str
    encoder: dict[str, Any]
    language: dict[str, Any] | None
    notes: list[str]
    warnings: list[str]
    methods: dict[str, str | None]
    instead: dict[str, dict[str, Any]]

    @property
    def working(self) -> list[str]:
        """Names of the methods that work as they are."""
        return [name for name, why in self.methods.items() if why is None]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.family} (adapters/{self.adapter}.py)"]
        for title, part in (("encoder", self.encoder), ("language", self.language)):
            if part is not None:
                shown = ", ".join(f"{k} {_shown(v)}" for k, v in part.items() if v is not None)
                lines.append(f"  {title:9} {shown}")
        lines += [f"  note      {text}" for text in self.notes]
        lines += [f"  warning   {text}" for text in self.warnings]
        lines.append(f"  methods   {', '.join(self.working) or 'none'}")
        lines += [
            f"  refused   {', '.join(names)}: {why}" for why, names in self._refused().items()
        ]
        return "\n".join(lines)

    def _refused(self) -> dict[str, list[str]]:
        """Refused methods by reason, with what gets around it; `methods` has the full words."""
        from .inspection import generic

        reasons: dict[str, list[str]] = {}
        for name, why in self.methods.items():
            if why is not None:
                own = ", ".join(f"{k}={v!r}" for k, v in self.instead.get(name, {}).items())
                shown = f"{name} (but not with {own})" if own else name
                reasons.setdefault(generic(why, name), []).append(shown)
        return reasons


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return " x ".join(map(str, value))
    return str(value)


def from_config(name: str) -> nn.Module:
    """A model without weights, on the "meta" device, from its configuration alone.

    Args:
        name: a hub id, a folder with a config.json, or such a file.

    Raises:
        OSError: there is no such model.
        ValueError: its configuration or class is unknown to this transformers.
    """
    import transformers

    path = Path(name)
    place = path.parent if path.is_file() else name
    config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    cls: Any = None
    for architecture in getattr(config, "architectures", None) or ():
        cls = cls or getattr(transformers, architecture, None)
    if cls is None:
        autos = (transformers.AutoModelForImageTextToText, transformers.AutoModel)
        known = [auto for auto in autos if type(config) in auto._model_mapping]
        if not known:
            raise ValueError(f"transformers knows no model class for {type(config).__name__}")
        with torch.device("meta"):
            return known[0].from_config(config).eval()
    with torch.device("meta"):
        return cls._from_config(config).eval()


def _warnings(sites: Sites, blocker: str | None) -> list[str]:
    """Reasons that keep every method from working, or limit them all."""
    found = [] if blocker is None else [blocker]
    if blocker is None and sites.decoder is not None:
        window = sliding_window(sites.decoder.decoder.config)
        if window is not None:
            found.append(
                f"the language model has layers with a sliding window of {window} tokens: it needs "
                'attn_implementation="sdpa" or "eager"; vtc.compress_inputs takes no longer prompt'
            )
    return found


def inspect(model: str | nn.Module) -> Inspection:
    """How vtc sees a model, and which methods work on it, without running it.

    Methods are installed and taken out again, so their refusals are those of `vtc.wrap`; what shows
    only on inputs, such as images that cannot be cut up the way a method needs, is not seen.

    Args:
        model: a model, or a hub id, a folder or a config.json: then only the configuration is read,
            and no weights are loaded.

    Raises:
        UnsupportedError: vtc cannot compress this model; the message says why.
        ValueError: the model is wrapped, or its configuration is unknown.
        OSError: there is no model of that name.
    """
    if isinstance(model, str):
        model = from_config(model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model or its name, got {type(model).__name__}")
    if "vtc" in model.__dict__:
        raise ValueError("the model is wrapped; call vtc.unwrap(model) first")
    sites = adapters.locate(model)
    blocker = _refusal(model, ())
    methods: dict[str, str | None] = {}
    instead: dict[str, dict[str, Any]] = {}
    for name, cls in known_methods().items():
        made = _made(cls)
        methods[name] = _refusal(model, (made,))
        if methods[name] is None or not cls.without_cls:
            continue
        if _refusal(model, (replace(made, **cls.without_cls),)) is None:
            instead[name] = dict(cls.without_cls)
    return Inspection(
        model=type(model).__name__,
        family=sites.family,
        adapter=_adapter(model),
        encoder=_encoder(sites),
        language=None if sites.decoder is None else _language(sites),
        notes=list(sites.notes),
        warnings=_warnings(sites, blocker),
        methods=methods,
        instead=instead,
    )


def _made(cls: type[Method]) -> Method:
    """The method at half the tokens, or as it is where it takes no budget."""
    try:
        return cls(keep_ratio=0.5)
    except ValueError:
        return cls()


def _refusal(model: nn.Module, methods: tuple[Method, ...]) -> str | None:
    """Why `wrap` refuses, or None."""
    try:
        _install(model, methods)
    except UnsupportedError as error:
        return str(error)
    unwrap(model)
    return None


def _adapter(model: nn.Module) -> str:
    names = (*adapters.LANGUAGE_MODELS, adapters.GENERIC, *adapters.ENCODERS)
    modules = {n: importlib.import_module(f"{adapters.__package__}.{n}") for n in names}
    return next(name for name, module in modules.items() if module.locate(model) is not None)


def _grid(tower: Any, patch: int) -> tuple[int, int] | None:
    """Rows and columns of patches at the configured image size, None where that is open."""
    for holder in (getattr(tower, "patch_embed", None), tower):  # timm, open_clip
        known = getattr(holder, "grid_size", None)
        if isinstance(known, tuple):
            return int(known[0]), int(known[1])
    size = getattr(getattr(tower, "config", None), "image_size", None)
    if size is None or not patch:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height // patch, width // patch


def _encoder(sites: Sites) -> dict[str, Any]:
    vision = sites.vision
    known: dict[str, Any] = {"class": type(vision.tower).__name__}
    if not vision.blocks:  # no adapter knows it
        return known
    return known | {
        "blocks": len(vision.blocks),
        "width": vision.width,
        "heads": vision.blocks[0].heads,
        "patch": vision.patch,
        "grid": _grid(vision.tower, vision.patch),
        "prefix": vision.prefix,
        "cls": vision.has_cls,
        "pool": vision.pool,
        "other sizes": vision.resize is not None,
    }


def _language(sites: Sites) -> dict[str, Any]:
    llm: Any = sites.decoder
    return {
        "projector": type(llm.projector).__name__,
        "decoder": type(llm.decoder).__name__,
        "layers": len(llm.decoder.layers),
        "hidden": llm.hidden,
        "mlp": llm.mlp_width,
        "heads": llm.heads,
        "kv heads": llm.kv_heads,
        "head dim": llm.head_dim,
        "image tokens": llm.tokens_per_image,
        "crops": None if llm.crops is None else list(llm.crops.side),
        "token ids": list(llm.token_ids),
        "attention": llm.decoder.config._attn_implementation,
    }


def generic(message: str, method: str) -> str:
    """An error message without the names of the pair it is about, and without its way out."""
    for name in (f'"{method}"', method):
        message = re.sub(rf"(?<![\w\"]){re.escape(name)}(?![\w\"])", "the method", message)
    message = re.sub(r"\w+(?= (is an encoder|has none|takes one))", "the encoder", message)
    message = re.sub(r"^the method has an? .*? stages?, and in \w+ ", "", message)
    return re.sub(r" \([^)]*stage\)", "", message).split(";")[0]
