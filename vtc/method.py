# SPDX-License-Identifier: Apache-2.0
"""Base of compression methods: a frozen dataclass with one hook for each stage it acts in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from .errors import UnsupportedError
from .hyperparameters import check_choice, check_count, check_range
from .reduction import Reduction

if TYPE_CHECKING:
    from .adapters.base import Sites
    from .cache.codecs import Packing
    from .views.cache import CacheView
    from .views.decoder import DecoderView
    from .views.features import FeaturesView
    from .views.vision import VisionView


StageName = Literal["pixels", "vision", "features", "decoder", "bypass", "cache"]

Answer = Reduction | tuple[Reduction, Tensor] | None
"""Return of a hook: a reduction, or one with the survivors' new hidden states, or nothing."""

STAGE_HOOKS: dict[StageName, str] = {
    "pixels": "on_pixels",
    "vision": "on_vision_layer",
    "features": "on_features",
    "decoder": "on_decoder_layer",
    "bypass": "on_bypass",
    "cache": "on_cache",
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to choose visual tokens. Subclasses add hyper-parameters and override hooks.

    A hook gets a read-only view of one place in the model and returns a `Reduction`, or None to
    leave the tokens alone. A hook that makes its own survivors, other than the mean of a group,
    returns ``(reduction, tokens)`` with the new hidden states (B, K, ...). Methods hold no state:
    what must be remembered between hooks goes into ``view.scratch``.

    Args:
        keep_ratio: fraction in (0, 1] of the original visual tokens that remain at the end.
        keep_tokens: the same as a count per image; per tile on models that are not told which tiles
            are one image (InternVL, Idefics3, SmolVLM). Give one of the two or neither; with
            neither, the method's published default is used.
        positions: "original" keeps the RoPE position of every survivor; "compact" renumbers the
            sequence after each reduction, as some papers do.

    Raises:
        ValueError: both budgets given, or one out of range.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    positions: Literal["original", "compact"] = "original"

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    """One line for the method table: what it does, where, and the paper."""
    default_ratio: ClassVar[float] = 0.25
    """keep_ratio when no budget is given."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Needs beyond the stages.

    Of the model: "cls", a class token in the encoder; "ahead", LLM layers whose queries and keys
    can be computed before they run; "frames", that it takes videos; "ran", that all tokens entered
    the layer whose attention or keys are read; "sublayers", the same for inputs and outputs of its
    attention and MLP. Of the caller: "text", the question in a space that patches can be compared
    in; "routers", weights that were trained with the model.
    """
    without_cls: ClassVar[dict[str, Any]] = {}
    """Parameters with which the method does without the class token it needs, if there are any."""
    outside_encoder: ClassVar[dict[str, Any]] = {}
    """Parameters with which it leaves tokens inside the encoder alone, if it need not act there."""
    alike: ClassVar[dict[str, Any]] = {}
    """Parameters with which it leaves as many tokens of every image, if it otherwise does not."""
    once: ClassVar[dict[str, Any]] = {}
    """Parameters with which it evicts once, after the prompt, if it need not while decoding."""
    merges: ClassVar[bool] = False
    """True when tokens are averaged into survivors rather than dropped."""
    vision_site: ClassVar[Literal["middle", "output"]] = "middle"
    """Place of `on_vision_layer`: between attention and MLP, or on the block's output."""
    proportional_attention: ClassVar[bool] = False
    """Encoder blocks add the log of the token sizes to the attention scores of their keys."""
    track_size: ClassVar[bool] = True
    """Merge by size-weighted mean; else each merge takes the plain mean of its tokens."""
    ragged: ClassVar[bool] = False
    """`on_vision_layer` copes with images that have different numbers of tokens (``v.valid``)."""
    bypass: ClassVar[Literal["attention", "layer"]] = "layer"
    """Part that the tokens left out by `on_bypass` bypass; the MLP still acts in "attention"."""
    packs: ClassVar[bool] = False
    """`on_cache` packs slots rather than evicting them."""
    joint: ClassVar[bool] = False
    """`on_features` gets all crops of an image, or all frames of a video, in one view instead of a
    view for each."""
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {}
    """Published settings: (model, tokens) -> hyper-parameters."""

    def __post_init__(self) -> None:
        if self.keep_ratio is not None and self.keep_tokens is not None:
            raise ValueError("give keep_ratio or keep_tokens, not both")
        check_range(self, "keep_ratio", "the fraction of tokens kept", "(]", optional=True)
        check_count(self, "keep_tokens", "a count of tokens per image", least=1, optional=True)
        check_choice(self, "positions", ("original", "compact"))

    # ---- hooks, one for each stage -------------------------------------------------------------

    def on_pixels(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Before the encoder: the patch grid (rows, columns) to resize the image to, or None."""
        return None

    def on_vision_layer(self, v: VisionView) -> Answer:
        """Inside the vision encoder, once for each block."""
        return None

    def on_features(self, v: FeaturesView) -> Answer:
        """After the encoder, before the LLM."""
        return None

    def on_decoder_layer(self, v: DecoderView) -> Answer:
        """Between LLM layers at prefill; ``v.layer`` is the layer that has just run."""
        return None

    def on_bypass(self, v: DecoderView) -> Reduction | None:
        """Visual tokens that take part in layer ``v.layer + 1``; the others bypass it and stay.

        Over its attention only, or over all of it, as `bypass` says; they get no KV there.
        """
        return None

    def note_cache(self, v: CacheView) -> None:
        """Right after a layer has run: what `on_cache` will need of its attention, into scratch."""

    def on_cache(self, v: CacheView) -> Reduction | Packing | None:
        """On each layer of the KV cache in turn, once a prefill is complete (`while_decoding`).

        The slots that stay, or how to pack them (`vtc.cache.codecs.Packing`), which drops none.
        """
        return None

    # ---- budget --------------------------------------------------------------------------------

    def budget(self, n: int, grid: tuple[int, int] | None = None) -> int:
        """Tokens to keep of the n visual tokens of one image."""
        if self.keep_tokens is not None:
            return min(self.keep_tokens, n)
        ratio = self.default_ratio if self.keep_ratio is None else self.keep_ratio
        return max(1, min(n, round(n * ratio)))

    @property
    def budget_given(self) -> bool:
        """True when a number of tokens was asked for, not left to the default."""
        return self.keep_ratio is not None or self.keep_tokens is not None

    @property
    def has_budget(self) -> bool:
        """False when hyper-parameters of the method decide the final count, not a budget."""
        return True

    @property
    def compiles(self) -> bool:
        """False when the data decides how many tokens are left or which way a hook goes: then
        `torch.compile` has no one graph (``fullgraph=True``)."""
        return True

    @property
    def while_decoding(self) -> bool:
        """Whether `note_cache` and `on_cache` are called behind every decoded token, too."""
        return False

    @classmethod
    def paper(cls, model: str, tokens: int) -> Method:
        """The published setting for a model, such as ``VisionZip.paper("llava-1.5", tokens=192)``.

        Raises:
            UnsupportedError: nothing was published for that pair; the message lists what was.
        """
        if (model, tokens) not in cls.presets:
            known = ", ".join(f'("{m}", tokens={t})' for m, t in cls.presets) or "none"
            raise UnsupportedError(
                f'{cls.name}: no published setting for "{model}" at {tokens} tokens; known: {known}'
            )
        return cls(**cls.presets[model, tokens])

    # ---- facts the engine reads ----------------------------------------------------------------

    def check_frames(self, frames: list[int] | None) -> None:
        """Refuse an image or video, before it is encoded; only where a model takes both.

        Args:
            frames: tokens of each frame of a video, None for an image.

        Raises:
            UnsupportedError: the method cannot do with it; the message says what works.
        """

    def check(self, sites: Sites) -> None:
        """Refuse a model, at wrap, before anything is computed.

        Raises:
            UnsupportedError: the method lacks something; the message says what, and what works.
        """

    @property
    def stages(self) -> frozenset[StageName]:
        """The stages whose hook this class overrides."""
        return frozenset(
            stage
            for stage, hook in STAGE_HOOKS.items()
            if getattr(type(self), hook) is not getattr(Method, hook)
        )

    def captures(self, depth: int) -> tuple[int, ...]:
        """Encoder blocks whose queries and keys `on_features` reads, of ``depth`` blocks."""
        return ()

    def decoder_layers(self, depth: int) -> Iterable[int]:
        """LLM layers, of ``depth``, after which `on_decoder_layer` is called; -1 is before all."""
        return range(-1, depth)

    def bypass_layers(self, depth: int) -> Iterable[int]:
        """LLM layers, of ``depth``, that `on_bypass` is asked about."""
        return range(depth)

    def __str__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(shown)})"


@dataclass(frozen=True, kw_only=True)
class Scorer(Method):
    """A method that is one function: `score` ranks the tokens, the best of them stay.

    ``stage`` says where: "features" ranks (B, N) image features, "decoder" ranks the visual tokens
    of the LLM sequence after layer ``after_layer``.
    """

    stage: ClassVar[StageName] = "features"

    def score(self, v: Any) -> Tensor:
        """Importance (B, N) of each visual token, higher is better."""
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    @property
    def after_layer(self) -> int:
        """The 0-based LLM layer after which a "decoder" scorer prunes."""
        raise NotImplementedError(f"{type(self).__name__} must define after_layer")

    @property
    def stages(self) -> frozenset[StageName]:
        return frozenset({self.stage})

    def decoder_layers(self, depth: int) -> Iterable[int]:
        return (self.after_layer,)

    def on_features(self, v: FeaturesView) -> Reduction | None:
        k = v.budget(self)
        return None if k == v.count else Reduction.from_scores(self.score(v), k)

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        if v.within_budget(self):
            return None
        return Reduction.from_scores(self.score(v), v.budget(self), v.valid)


@dataclass(frozen=True)
class Chain:
    """Several methods on one model, applied in order at every stage."""

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        if len({m.positions for m in self.methods}) > 1:
            raise ValueError('chained methods must agree on positions ("original" or "compact")')

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods))


def split_answer(answer: Answer) -> tuple[Reduction | None, Tensor | None]:
    """Split a hook's answer into (reduction, survivors made by the method), either may be None."""
    return answer if isinstance(answer, tuple) else (answer, None)


PLACES = {
    "pixels": "before the encoder",
    "vision": "in the encoder",
    "features": "before the LLM",
    "decoder": "in the LLM",
    "bypass": "around LLM layers",
    "cache": "in the KV cache",
}
