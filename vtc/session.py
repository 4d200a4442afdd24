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

from . import transformers_contract
from .adapters.base import Sites
from .adapters.locate import locate
from .engine.record import Recording, Records
from .engine.refusals import check_parts, check_shared, edges
from .errors import UnsupportedError
from .hooks.per_thread import Threaded
from .method import Chain, Method
from .registry import known_methods, resolve
from .report.build import build_report
from .report.report import Report
from .transformers_contract import PIXELS

M = TypeVar("M", bound=nn.Module)

ATTRIBUTE = "vtc"


class Session(Recording):
    """Compression installed on one model; reached as ``model.vtc``."""

    def __init__(self, model: nn.Module, methods: tuple[Method, ...]) -> None:
        self.model = model
        self.methods = methods
        self.sites: Sites = locate(model)
        self.records = Records()
        self.handles: list[Any] = []
        self._check()
        self.edges = edges(model, self.sites)
        self.vision: Any = None
        self.decoder: Any = None
        llm, vision_stages = self.sites.decoder, {"pixels", "vision", "features"}
        on_vision = any(m.stages & vision_stages for m in methods)
        if on_vision:
            from .engine.vision.engine import VisionEngine

            last = len(self.sites.vision.blocks) - 1
            self.vision = VisionEngine(
                self.sites.vision,
                methods,
                last if llm is None else llm.feature_block,
                None if llm is None else llm.projector,
                self.records,
                packs=llm is not None and (llm.crops is not None or llm.grids is not None),
                grids=None if llm is None else llm.grids,
            )
        if llm is not None:
            from .engine.llm.engine import DecoderEngine

            self.decoder = DecoderEngine(llm, methods, sentinel=on_vision, records=self.records)
        self.packed: Any = None
        self.videos: Any = None
        if llm is not None and llm.crops is not None:
            from .engine.vision.crops import CropEngine

            self.packed = CropEngine(self.sites, self.vision, self.decoder, self.records)
        if llm is not None and llm.grids is not None:
            from .engine.vision.grids import GridEngine

            self.packed = GridEngine(self.sites, self.vision, self.decoder, self.records)
        if llm is not None and llm.videos is not None:
            from .engine.vision.grids import VideoEngine

            self.videos = VideoEngine(self.sites, self.vision, self.decoder, self.records)

    def _check(self) -> None:
        """Refuse what cannot work, before anything is computed."""
        transformers_contract.check(self.model, self.sites)
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

    def _check_parts(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            check_parts(self.model, self.edges)

    def install(self) -> None:
        """Register all hooks."""
        sites, tower = self.sites, self.sites.vision.tower
        entry = tower if sites.vision.entry is None else sites.vision.entry
        first = entry if sites.decoder is None else sites.decoder.base
        self.handles.append(first.register_forward_pre_hook(self._check_parts))
        self.handles.append(entry.register_forward_pre_hook(self._encode, with_kwargs=True))
        self.handles.append(tower.register_forward_hook(self._failed, always_call=True))
        end = tower if sites.decoder is None else sites.decoder.projector
        if self.vision is not None:
            self.vision.install()
        if sites.decoder is None:  # all that timm's forward_features runs of the tower
            blocks_end = sites.vision.blocks[-1].module
            self.handles.append(blocks_end.register_forward_hook(self._through_blocks))
        self.handles.append(end.register_forward_hook(self._encoded))
        self.handles.append(end.register_forward_hook(self._failed, always_call=True))
        for packed in (self.packed, self.videos):
            if packed is not None:
                packed.install()
        if self.decoder is not None:
            self.decoder.install()

    def _encode(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise UnsupportedError(
                "torch.nn.DataParallel runs copies of the model, and compression would read the "
                "weights of the original; use one process for each device "
                '(DistributedDataParallel), or spread the layers (device_map="auto")'
            )
        pixels: Any = args[0] if args else PIXELS.of(kwargs)
        pixels = kwargs.get("x") if pixels is None else pixels
        sites, patch = self.sites, self.sites.vision.patch
        if sites.decoder is None or sites.decoder.grids is None:
            known = patch and pixels is not None and pixels.dim() > 3
            edges = pixels.shape[-2:] if known else (0, 0)  # of encoders that no adapter knows
            self.record.grid = (edges[0] // max(patch, 1), edges[1] // max(patch, 1))
        self.records.last = self.record
        self.record.encoded = False
        self.record.clock.reset("vision", "method")
        self.record.clock.start("vision")

    def _failed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let go of the tensors of an encoder that did not get through."""
        if output is None and self.vision is not None:
            self.vision.state = None

    def _through_blocks(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.record.encoded = True

    def _encoded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.record.clock.stop("vision")
        self.record.encoded = True
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
        self.records.synchronize = on

    def report(self) -> Report:
        """Tokens, FLOPs, KV bytes and milliseconds of this thread's last forward.

        In a thread that has run none, of the last in any thread.

        Raises:
            RuntimeError: the model has not seen an image since it was wrapped.
        """
        name = " + ".join(map(str, self.methods)) or "uncompressed"
        return build_report(name, self.methods, self.sites, self.records.shown)

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
            + (", on one device" if kind == "DataParallel" else "")
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


def _installed(model: Any) -> Session | None:
    """The session of a model, None without; and of a shallow copy as long as the model has it."""
    session = model.__dict__.get(ATTRIBUTE)
    return session if session and session.model.__dict__.get(ATTRIBUTE) is session else None


def _install(model: Any, methods: tuple[Method, ...]) -> Session:
    model = _inside(model)
    if _installed(model) is not None:
        raise ValueError(
            f"the model is already wrapped ({model.vtc!r}); call vtc.unwrap(model) first, or "
            "combine methods with vtc.chain(...)"
        )
    check_shared(model, (Session, Threaded))
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
        inside = _inside(inside)
        session = _installed(inside)
    if session is None:
        raise ValueError("the model is not wrapped")
    if session.model is not inside:
        raise ValueError(
            "this is a shallow copy of the model that was wrapped, and shares its modules: call "
            "vtc.unwrap(model.vtc.model), or copy with copy.deepcopy"
        )
    del inside.__dict__[ATTRIBUTE]
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
