# SPDX-License-Identifier: Apache-2.0
"""`wrap`, `unwrap`, `compressing`: put compression into a stock model and take it out again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from .adapters.base import Sites
from .adapters.locate import locate
from .errors import UnsupportedError
from .method import Chain, Method, known_methods, resolve
from .report import Record, Report, build_report

M = TypeVar("M", bound=nn.Module)

ATTRIBUTE = "vtc"


class Session:
    """Compression installed on one model; reached as ``model.vtc``."""

    def __init__(self, model: nn.Module, methods: tuple[Method, ...]) -> None:
        self.model = model
        self.methods = methods
        self.sites: Sites = locate(model)
        self.record = Record()
        self.handles: list[Any] = []
        self._check()
        self.vision: Any = None
        self.decoder: Any = None
        llm, vision_stages = self.sites.decoder, {"pixels", "vision", "features"}
        on_vision = any(m.stages & vision_stages for m in methods)
        if on_vision:
            from .vision import VisionEngine

            last = len(self.sites.vision.blocks) - 1
            self.vision = VisionEngine(
                self.sites.vision,
                methods,
                last if llm is None else llm.feature_block,
                None if llm is None else llm.projector,
                self.record.clock,
                packs=llm is not None and (llm.crops is not None or llm.grids is not None),
                grids=None if llm is None else llm.grids,
            )
        if llm is not None:
            from .decoder import DecoderEngine

            self.decoder = DecoderEngine(llm, methods, sentinel=on_vision, record=self.record)
        self.packed: Any = None
        self.videos: Any = None
        if llm is not None and llm.crops is not None:
            from .crops import CropEngine

            self.packed = CropEngine(self.sites, self.vision, self.decoder, self.record)
        if llm is not None and llm.grids is not None:
            from .grids import GridEngine

            self.packed = GridEngine(self.sites, self.vision, self.decoder, self.record)
        if llm is not None and llm.videos is not None:
            from .grids import VideoEngine

            self.videos = VideoEngine(self.sites, self.vision, self.decoder, self.record)

    def _check(self) -> None:
        """Refuse what cannot work, before anything is computed."""
        available = {"pixels", "vision", "features"}
        if self.sites.decoder is not None:
            available |= {"decoder", "bypass", "cache"}
        available -= set(self.sites.missing)
        for method in self.methods:
            method.check(self.sites)
            absent = sorted(method.stages & set(self.sites.missing))
            if absent:
                usable = [n for n, m in known_methods().items() if _stages(m) <= available]
                raise UnsupportedError(
                    f'"{method.name}" has a {" and a ".join(absent)} stage, and in '
                    f"{type(self.model).__name__} {self.sites.missing[absent[0]]}; methods that "
                    f"work here: {', '.join(usable)}"
                )
            missing = method.stages - available
            if missing:
                usable = [n for n, m in known_methods().items() if _stages(m) <= available]
                raise UnsupportedError(
                    f'"{method.name}" acts in the language model '
                    f"({', '.join(sorted(missing))} stage) and {type(self.model).__name__} is an "
                    f"encoder alone; methods for encoders: {', '.join(usable)}"
                )

    def install(self) -> None:
        """Register all hooks."""
        sites, tower = self.sites, self.sites.vision.tower
        first = tower if sites.vision.entry is None else sites.vision.entry
        self.handles.append(first.register_forward_pre_hook(self._encode, with_kwargs=True))
        end = tower if sites.decoder is None else sites.decoder.projector
        if self.vision is not None:
            self.vision.install()
        self.handles.append(end.register_forward_hook(self._encoded))
        for packed in (self.packed, self.videos):
            if packed is not None:
                packed.install()
        if self.decoder is not None:
            self.decoder.install()

    def _encode(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise UnsupportedError(
                "torch.nn.DataParallel runs copies of the model in threads, which would share one "
                "state; use one process for each device (DistributedDataParallel), or spread the "
                'layers (device_map="auto")'
            )
        pixels: Any = args[0] if args else kwargs.get("pixel_values", kwargs.get("x"))
        sites, patch = self.sites, self.sites.vision.patch
        if sites.decoder is None or sites.decoder.grids is None:
            known = patch and pixels is not None and pixels.dim() > 3
            edges = pixels.shape[-2:] if known else (0, 0)  # of encoders that no adapter knows
            self.record.grid = (edges[0] // max(patch, 1), edges[1] // max(patch, 1))
        self.record.clock.reset("vision", "method")
        self.record.clock.start("vision")

    def _encoded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.record.clock.stop("vision")
        if self.packed is not None:
            return  # the features stage is still to come
        if self.decoder is None:
            return
        self.decoder.encoded, self.decoder.left = len(output), None
        if self.vision is not None and self.vision.state:
            state = self.vision.state
            self.decoder.left = None if state.reduction is None else state.reduction.count
            notes = state.scratch
            self.decoder.carried = {"image": (output, notes)} if any(notes) else {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """Copied with the whole model only: hooks on a part would work on a copy of everything."""
        if id(self.model) not in memo:
            raise UnsupportedError(
                "a part of a wrapped model was copied, and its hooks cannot be (PEFT's "
                "modules_to_save does this): change the model first and wrap the result, "
                "vtc.wrap(get_peft_model(model, ...), method)"
            )
        new = memo[id(self)] = object.__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def remove(self) -> None:
        """Remove all hooks; the model is exactly what it was."""
        for engine in (self.decoder, self.videos, self.packed, self.vision):
            if engine is not None:
                engine.remove()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def synchronize(self, on: bool = True) -> None:
        """Wait for the GPU at every time stamp, to make the report's milliseconds exact there."""
        self.record.clock.synchronize = on

    def report(self) -> Report:
        """Tokens, FLOPs, KV bytes and milliseconds of the last forward.

        Raises:
            RuntimeError: the model has not seen an image since it was wrapped.
        """
        state = None if self.vision is None else self.vision.state
        name = " + ".join(map(str, self.methods)) or "uncompressed"
        return build_report(name, self.methods, self.sites, self.record, state)

    def __repr__(self) -> str:
        return f"<vtc: {' + '.join(map(str, self.methods))} on {self.sites.family}>"


def _stages(cls: type[Method]) -> frozenset[str]:
    return cls().stages


def _inside(model: Any) -> nn.Module:
    """The model that hooks go to: the one inside a PEFT model.

    Raises:
        ValueError: not a module.
        UnsupportedError: a wrapper that must come after `wrap`.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, got {type(model).__name__}")
    kind = type(model).__name__
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise UnsupportedError(
            "the model is compiled already, and hooks added now would be ignored: wrap first, then "
            "compile; vtc.wrap(model._orig_mod, method), then torch.compile again"
        )
    if kind in ("DataParallel", "DistributedDataParallel"):
        raise UnsupportedError(
            f"{kind} only passes calls on: wrap what is inside, vtc.wrap(model.module, method)"
            + (
                ", on one device; its threads would share one state"
                if kind == "DataParallel"
                else ""
            )
        )
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


def _forget_graphs(model: nn.Module) -> None:
    """Make code that was compiled from the model be compiled anew: Dynamo does not see hooks come
    and go."""
    if "torch._dynamo" not in sys.modules:
        return
    for module in model.modules():
        compiled = "_is_torch_compile" in module.__dict__ or "_orig_mod" in module._modules
        if compiled or getattr(module, "_compiled_call_impl", None) is not None:
            torch.compiler.reset()
            return


def _install(model: Any, methods: tuple[Method, ...]) -> Session:
    model = _inside(model)
    if ATTRIBUTE in model.__dict__:
        raise ValueError(
            f"the model is already wrapped ({model.vtc!r}); call vtc.unwrap(model) first, or "
            "combine methods with vtc.chain(...)"
        )
    session = Session(model, methods)
    try:
        session.install()
    except BaseException:
        session.remove()
        raise
    model.__dict__[ATTRIBUTE] = session
    _forget_graphs(model)
    return session


def wrap(model: M, method: str | Method | Chain, **parameters: Any) -> M:
    """Compress the visual tokens of a stock model, in place.

    Args:
        model: a supported Hugging Face, timm or open_clip model, or a PEFT model of one.
        method: a registered name, a `Method`, or `vtc.chain(...)`.
        parameters: hyper-parameters of a method given by name, such as ``keep_ratio=0.25``.

    Returns:
        The same model object; ``model.vtc.report()`` tells what ran.

    Raises:
        ValueError: unknown method or parameter, or a model that is wrapped already.
        UnsupportedError: this method cannot work on this model; the message says what is missing.
    """
    _install(model, resolve(method, **parameters))
    return model


def unwrap(model: M) -> M:
    """Remove compression: the model is exactly what it was before `wrap`.

    Raises:
        ValueError: the model is not wrapped.
    """
    inside = getattr(model, "_orig_mod", model)  # what was compiled after `wrap`
    session = None
    if isinstance(inside, nn.Module):
        session = _inside(inside).__dict__.pop(ATTRIBUTE, None)
    if session is None:
        raise ValueError("the model is not wrapped")
    session.remove()
    _forget_graphs(session.model)
    return model


@contextmanager
def compressing(
    model: nn.Module, method: str | Method | Chain, **parameters: Any
) -> Iterator[Session]:
    """`wrap` for the length of a ``with`` block; gives the session, which has ``report()``."""
    session = _install(model, resolve(method, **parameters))
    try:
        yield session
    finally:
        unwrap(model)


@contextmanager
def observe(model: nn.Module) -> Iterator[Session]:
    """Report on the stock model, uncompressed: the baseline of every comparison."""
    session = _install(model, ())
    try:
        yield session
    finally:
        unwrap(model)
