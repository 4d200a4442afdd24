# SPDX-License-Identifier: Apache-2.0
"""`wrap`, `unwrap`, `compressing`: put compression into a stock model and take it out again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from . import transformers_contract
from .adapters.base import Sites
from .adapters.locate import locate
from .engine.handoff import Handoff
from .engine.llm.engine import DecoderEngine
from .engine.parts import OfModel, Parts
from .engine.record import Recording, Records
from .engine.refusals import check_shared, check_stages
from .engine.vision.boundary import EncoderBoundary
from .engine.vision.crops import CropEngine
from .engine.vision.engine import VisionEngine
from .engine.vision.grids import GridEngine, VideoEngine
from .engine.vision.image_features import PackedEngine
from .errors import UnsupportedError
from .hooks.per_thread import Threaded
from .method import Chain, Method
from .registry import resolve
from .report.build import build_report
from .report.report import Report

M = TypeVar("M", bound=nn.Module)

ATTRIBUTE = "vtc"


class Session(Recording, OfModel):
    """Compression installed on one model; reached as ``model.vtc``."""

    def __init__(self, model: nn.Module, methods: tuple[Method, ...]) -> None:
        self.model = model
        self.methods = methods
        self.sites: Sites = locate(model)
        self.records = Records()
        self.handoff = Handoff()
        transformers_contract.check(model, self.sites)
        check_stages(model, self.sites, methods)
        self.vision = self._vision_engine()
        self.decoder = self._decoder_engine()
        behind = self._features_engines()
        hands_over = self.decoder is not None and "image" not in {e.modality for e in behind}
        boundary = EncoderBoundary(
            model, self.sites, self.vision, hands_over, self.handoff, self.records
        )
        llm = [] if self.decoder is None else [self.decoder]
        self.engines: list[Any] = [Parts(model, self.sites), boundary, *behind, *llm]
        """In the order in which their hooks run."""

    def _vision_engine(self) -> VisionEngine | None:
        """The engine inside the encoder, if a method acts on the encoder side."""
        llm, stages = self.sites.decoder, {"pixels", "vision", "features"}
        if not any(m.stages & stages for m in self.methods):
            return None
        return VisionEngine(
            self.sites.vision,
            self.methods,
            len(self.sites.vision.blocks) - 1 if llm is None else llm.feature_block,
            None if llm is None else llm.projector,
            self.records,
            packs=llm is not None and (llm.crops is not None or llm.grids is not None),
            grids=None if llm is None else llm.grids,
        )

    def _decoder_engine(self) -> DecoderEngine | None:
        llm = self.sites.decoder
        if llm is None:
            return None
        sentinel = self.vision is not None
        return DecoderEngine(llm, self.methods, sentinel, self.handoff, self.records)

    def _features_engines(self) -> list[PackedEngine]:
        """The features stage where images are no plain grids of patches, and that of videos."""
        llm = self.sites.decoder
        if llm is None:
            return []
        kinds: list[tuple[type[PackedEngine], Any]] = [
            (CropEngine, llm.crops),
            (GridEngine, llm.grids),
            (VideoEngine, llm.videos),
        ]
        given = self.sites, self.vision, self.methods, self.handoff, self.records
        return [kind(*given) for kind, there in kinds if there is not None]

    def install(self) -> None:
        """Register all hooks."""
        for engine in self.engines:
            engine.install()

    def remove(self) -> None:
        """Remove all hooks; the model is exactly what it was."""
        for engine in reversed(self.engines):
            engine.remove()

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
