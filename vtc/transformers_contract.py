# SPDX-License-Identifier: Apache-2.0
"""The contract with transformers: the names that vtc reads of it, and what happens when one moves.

Nothing here asks for a version. A name is looked for where it must stand (a signature, a class, an
object of it) under every name that a tested release gives it; `check` does so for one model before
anything is computed, and the refusal says what moved, where, who reads it and which releases work.
A release that only renames an argument costs one word in this file.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from .errors import UnsupportedError

OLDEST, NEWEST = "5.5", "5.24"
"""The releases of transformers that the suite has passed with; pyproject.toml says the same."""

RELEASES = f"{OLDEST} - {NEWEST}"


def release() -> str:
    """The installed transformers, for messages."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def way_out() -> str:
    """The releases that work, and the command that installs one."""
    major, minor = NEWEST.split(".")
    bound = f"{major}.{int(minor) + 1}"
    return (
        f"vtc is tested with transformers {RELEASES}, {release()} is installed: "
        f'pip install "transformers>={OLDEST},<{bound}"'
    )


def moved(where: str, missing: str, reader: str, there: str = "") -> UnsupportedError:
    """The refusal of a release that moved something.

    Args:
        where: what has it no longer, such as "LlamaDecoderLayer.forward".
        missing: what that is, such as "no argument cache or past_key_values (the KV cache)".
        reader: the file of vtc that reads it.
        there: what is found there instead.
    """
    there = f"; it has {there}" if there else ""
    return UnsupportedError(
        f"{where} has {missing}, read by {reader}{there}. "
        f"This release of transformers moved it; {way_out()}"
    )


# ---- names ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """One argument, attribute, field or method under the names of all tested releases.

    Attributes:
        names: the newest first.
        what: it is, in words.
    """

    names: tuple[str, ...]
    what: str

    def of(self, given: Mapping[str, Any]) -> Any:
        """Its value among named arguments or fields, None without."""
        for name in self.names:
            value = given.get(name)
            if value is not None:
                return value
        return None

    def among(self, known: Any) -> str | None:
        """The name under which it is known there, None if it is not."""
        for name in self.names:
            if name in known:
                return name
        return None

    def take(self, kwargs: dict[str, Any]) -> Any:
        """Its value, no longer among named arguments; None without."""
        name = self.among(kwargs)
        return None if name is None else kwargs.pop(name)

    def put(self, kwargs: dict[str, Any], value: Any) -> None:
        """Replace it among named arguments."""
        kwargs[self.among(kwargs) or self.names[0]] = value

    def replace(self, output: Any, value: Any) -> None:
        """Replace it in an output, which need not list all that it holds among its keys."""
        for name in self.names:
            if getattr(output, name, None) is not None:
                setattr(output, name, value)
                return
        raise moved(type(output).__name__, self.absent("field"), ENGINE)

    def absent(self, kind: str) -> str:
        """That it is not there, in words."""
        return f"no {kind} {' or '.join(self.names)} ({self.what})"


IDS = Name(("input_ids",), "the prompt")
EMBEDS = Name(("inputs_embeds",), "the embedded prompt")
MASK = Name(("attention_mask",), "the mask of attention")
POSITIONS = Name(("position_ids",), "the positions of the tokens")
TABLES = Name(("position_embeddings",), "the rotary tables")
HIDDEN = Name(("hidden_states",), "the tokens")
CACHE = Name(("cache", "past_key_values"), "the KV cache")
PIXELS = Name(("pixel_values",), "the images")
VIDEOS = Name(("pixel_values_videos",), "the videos")
ENCODED = Name(("mm_encoder_outputs",), "images encoded beforehand")
DEEPSTACK = Name(("deepstack_visual_embeds",), "image features for several layers")
DEEPSTACK_MASK = Name(("visual_pos_masks",), "where those image features stand")
LAST = Name(("last_hidden_state",), "the tokens behind the last layer")
FEATURES = Name(("pooler_output",), "image features in the space of the language model")
LAYERS = Name(("layers",), "its layers")
CONFIG = Name(("config",), "its configuration")
ATTENTION = Name(("self_attn",), "its attention")
EMBEDDINGS = Name(("get_input_embeddings",), "the table of embeddings")
KEYS = Name(("keys",), "keys (B, H, T, d)")
VALUES = Name(("values",), "values (B, H, T, d)")
HOLDS = Name(("is_initialized",), "whether it holds anything")
SEEN = Name(("get_seq_length",), "the tokens that it has seen")
UPDATE = Name(("update",), "what takes new keys and values")
MASK_SIZES = Name(("get_mask_sizes",), "what masks are sized by")
REORDER = Name(("reorder_cache",), "what beams change places by")
REPEAT = Name(("batch_repeat_interleave",), "what makes several rows of one")
SELECT = Name(("batch_select_indices",), "what takes some of the rows")
CROP = Name(("crop",), "what takes the last tokens away")
RESET = Name(("reset",), "what empties it")
GROWS = Name(("layer_class_to_replicate",), "the layers that it makes as it grows")
WINDOW = Name(("sliding_window",), "the tokens in its window")
EVER_SEEN = Name(("cumulative_length",), "tokens seen, with those that left the window")
EAGER = Name(("eager_attention_forward",), "attention without a kernel")
REGISTER = Name(("register",), "what adds an implementation of attention")


# Who reads them.
ENGINE = "vtc/engine/llm/engine.py"
TABLES_AND_MASKS = "vtc/engine/llm/layer_arguments.py"
FEATURES_STAGE = "vtc/engine/vision/image_features.py"
CACHE_LAYERS = "vtc/cache/pruned.py"
ATTENTION_PATCH = "vtc/hooks/attention_patch.py"


def required(module: str, name: str, reader: str) -> Any:
    """A class or object of transformers.

    Raises:
        UnsupportedError: this release does not have it there.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        pass
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("transformers."):
            raise  # transformers itself, or what it needs
    raise moved(module, f"no {name}", reader)


Cache: Any = required("transformers.cache_utils", "Cache", CACHE_LAYERS)
DynamicCache: Any = required("transformers.cache_utils", "DynamicCache", CACHE_LAYERS)
DynamicLayer: Any = required("transformers.cache_utils", "DynamicLayer", CACHE_LAYERS)
DynamicSlidingWindowLayer: Any = required(
    "transformers.cache_utils", "DynamicSlidingWindowLayer", CACHE_LAYERS
)
ModelOutput: Any = required("transformers.utils", "ModelOutput", ENGINE)
LanguageModelOutput: Any = required(
    "transformers.modeling_outputs", "BaseModelOutputWithPast", ENGINE
)
EncodedImages: Any = required(
    "transformers.modeling_outputs", "BaseModelOutputWithPooling", "vtc/precompute.py"
)
AttentionInterface: Any = required("transformers", "AttentionInterface", ATTENTION_PATCH)
ATTENTION_FUNCTIONS: Any = required(
    "transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", ATTENTION_PATCH
)


# ---- seams ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seam:
    """A place where vtc reads a name of transformers.

    Attributes:
        place: a key of `PLACES`.
        kind: "argument" of the forward there, "attribute" of the object, or "field" of the class.
        reader: files of vtc, separated by commas.
    """

    place: str
    kind: str
    reader: str
    name: Name

    @property
    def title(self) -> str:
        """Name for people: "decoder layer: argument cache, past_key_values"."""
        return f"{self.place}: {self.kind} {', '.join(self.name.names)}"

    def check(self, there: Any) -> None:
        """Look for it in a module, a function, an object or a class.

        Raises:
            UnsupportedError: it is not there; the message says so.
        """
        if self.kind == "attribute":
            found = [getattr(there, name, None) for name in self.name.names if hasattr(there, name)]
            if all(getattr(x, "__isabstractmethod__", False) for x in found):
                raise self.moved(getattr(there, "__name__", type(there).__name__))
            return
        if self.kind == "field":
            where, known = there.__name__, [f.name for f in fields(there)]
        else:
            forward = getattr(there, "forward", there)
            where, known = _title(forward), _arguments(forward)
        if known and self.name.among(known) is None:
            raise self.moved(where, ", ".join(known))

    def moved(self, where: str, there: str = "") -> UnsupportedError:
        """The refusal of a release in which it is not there any more."""
        return moved(where, self.name.absent(self.kind), self.reader, there)


def _at(place: str, kind: str, reader: str, *names: Name) -> list[Seam]:
    return [Seam(place, kind, reader, name) for name in names]


SEAMS: tuple[Seam, ...] = (
    *_at("base model", "argument", ENGINE, IDS, EMBEDS, MASK, CACHE),
    *_at("base model", "attribute", ENGINE, EMBEDDINGS),
    *_at("image features", "argument", FEATURES_STAGE, PIXELS),
    *_at("encoded images", "field", FEATURES_STAGE, FEATURES),
    *_at("encoder", "argument", "vtc/engine/vision/boundary.py", PIXELS),
    *_at("encoder attention", "argument", "adapters/*.py", HIDDEN),
    *_at("language model", "argument", ENGINE, EMBEDS, MASK, CACHE),
    *_at("language model", "argument", TABLES_AND_MASKS, POSITIONS),
    *_at("language model", "attribute", ENGINE, LAYERS, CONFIG),
    *_at("language model with DeepStack", "argument", ENGINE, DEEPSTACK, DEEPSTACK_MASK),
    *_at("decoder layer", "argument", ENGINE, HIDDEN, CACHE),
    *_at("decoder layer", "argument", TABLES_AND_MASKS, MASK, TABLES),
    *_at("decoder layer", "attribute", ENGINE, ATTENTION),
    *_at("file of the attention", "attribute", ATTENTION_PATCH, EAGER),
    *_at("output of the language model", "field", ENGINE, LAST, CACHE),
    *_at("KV cache", "attribute", CACHE_LAYERS, LAYERS, SEEN, GROWS),
    *_at("layer of a KV cache", "attribute", CACHE_LAYERS, KEYS, VALUES, HOLDS, SEEN, UPDATE),
    *_at("layer of a KV cache", "attribute", CACHE_LAYERS, MASK_SIZES, REORDER, REPEAT, SELECT),
    *_at("layer of a KV cache", "attribute", CACHE_LAYERS, CROP, RESET),
    *_at("sliding layer of a KV cache", "attribute", CACHE_LAYERS, KEYS, WINDOW, EVER_SEEN),
    *_at("attention interface", "attribute", ATTENTION_PATCH, REGISTER),
)
"""All that a wrapped model is read by. What the adapters read of one family is theirs: `reading`
turns an attribute that is missing there into the same refusal."""


LAYER_ARGUMENTS = {
    *HIDDEN.names,
    *MASK.names,
    *POSITIONS.names,
    *TABLES.names,
    *CACHE.names,
    *("use_cache", "output_attentions", "output_router_logits", "cache_position"),
}
"""Arguments of a decoder layer as in Llama, in any tested release."""

BASE_ARGUMENTS = {
    *(n for name in (IDS, EMBEDS, MASK, POSITIONS, CACHE, PIXELS, VIDEOS) for n in name.names),
    *("pixel_attention_mask", "image_hidden_states", "image_sizes", "image_sizes_videos"),
    *("batch_num_images", "vision_feature_layer", "vision_feature_select_strategy"),
    *("vision_aspect_ratio", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"),
    *("rope_deltas", "token_type_ids", "mm_token_type_ids", "labels", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict", "cache_position"),
    *("logits_to_keep", "video_hidden_states"),
}
"""Arguments of a multimodal model in any tested release, images encoded beforehand left out: 5.17
and older do not take those."""


def _is_stock(module: Any) -> bool:
    return type(module).__module__.startswith("transformers.")


def _encoder(model: Any, sites: Any) -> list[Any]:
    """The module that takes the pixels of whole images, where it is one of transformers."""
    flat = sites.decoder is not None and sites.decoder.grids is not None
    entry = sites.vision.entry or sites.vision.tower
    return [entry] if _is_stock(entry) and sites.vision.blocks and not flat else []


def _language_model(model: Any, sites: Any) -> list[Any]:
    return [] if sites.decoder is None else [sites.decoder.decoder]


def _deepstack(model: Any, sites: Any) -> list[Any]:
    vision = getattr(model.config, "vision_config", None) if sites.decoder else None
    return [sites.decoder.decoder] if getattr(vision, "deepstack_visual_indexes", ()) else []


def _layers(model: Any, sites: Any) -> list[Any]:
    """One layer for each forward among them."""
    layers = [] if sites.decoder is None else sites.decoder.decoder.layers
    return list({getattr(x.forward, "__func__", x.forward): x for x in layers}.values())


def _files(model: Any, sites: Any) -> list[Any]:
    """Modules that define the attention of the LLM, where "eager" takes its function from."""
    layers = [] if sites.decoder is None else sites.decoder.decoder.layers
    eager = [x.self_attn for x in layers if x.self_attn.config._attn_implementation == "eager"]
    return [sys.modules[name] for name in {type(x).__module__ for x in eager}]


def _image_features(model: Any, sites: Any) -> list[Any]:
    inside = sites.decoder is None or "features" in sites.missing
    return [] if inside else [sites.decoder.base.get_image_features]


def _always(made: Callable[[], Any]) -> Callable[[Any, Any], list[Any]]:
    return lambda model, sites: [] if sites.decoder is None else [made()]


PLACES: dict[str, Callable[[Any, Any], list[Any]]] = {
    "base model": lambda model, sites: [] if sites.decoder is None else [sites.decoder.base],
    "image features": _image_features,
    "encoded images": _always(lambda: EncodedImages),
    "encoder": _encoder,
    "encoder attention": lambda model, sites: [
        b.attn for b in sites.vision.blocks[:1] if _is_stock(b.attn)
    ],
    "language model": _language_model,
    "language model with DeepStack": _deepstack,
    "decoder layer": _layers,
    "file of the attention": _files,
    "output of the language model": _always(lambda: LanguageModelOutput),
    "KV cache": _always(lambda: DynamicCache()),
    "layer of a KV cache": _always(lambda: DynamicLayer()),
    "sliding layer of a KV cache": _always(lambda: DynamicSlidingWindowLayer(8)),
    "attention interface": _always(lambda: AttentionInterface),
}
"""Places of seams: (model, its `Sites`) -> modules, functions, objects or classes."""


def check(model: Any, sites: Any) -> None:
    """Look for every seam of a model, before anything is computed.

    Args:
        sites: its `Sites`.

    Raises:
        UnsupportedError: the installed transformers moved one; the message says what and where.
    """
    for seam in SEAMS:
        try:
            places = PLACES[seam.place](model, sites)
        except (AttributeError, TypeError) as error:  # a cache that is made otherwise
            raise moved(f"the {seam.place}", f"another form ({error})", seam.reader) from error
        for there in places:
            seam.check(there)
    if sites.decoder is not None:
        _check_masks()
        for layer in _layers(model, sites):
            _check_others(layer.forward, POSITIONS, LAYER_ARGUMENTS, TABLES_AND_MASKS)
        if sites.decoder.crops is not None or sites.decoder.grids is not None:
            _check_others(sites.decoder.base.forward, ENCODED, BASE_ARGUMENTS, ENGINE)


def _check_others(forward: Any, name: Name, known: set[str], reader: str) -> None:
    """Refuse a forward that does not take a name, and takes one that nobody knows instead."""
    there = _arguments(forward)
    if name.among(there) is None and not known.issuperset(there):
        raise moved(_title(forward), name.absent("argument"), reader, ", ".join(there))


def _check_masks() -> None:
    """A layer that holds fewer tokens than it has seen gets masks for those that it has seen."""

    class Longer(DynamicLayer):
        def get_seq_length(self) -> int:
            return 7

    size = Longer().get_mask_sizes(1)[0]
    if size != 8:
        raise moved(
            "DynamicLayer.get_mask_sizes",
            "other lengths than get_seq_length's",
            CACHE_LAYERS,
        )


@contextmanager
def reading(model: Any, reader: str) -> Iterator[None]:
    """Turn an attribute that an adapter does not find in a model into the refusal of its release.

    Args:
        reader: the adapter's file.
    """
    try:
        yield
    except AttributeError as error:
        owner = getattr(error, "obj", None)
        where = type(owner).__name__ if owner is not None else type(model).__name__
        library = type(owner if owner is not None else model).__module__.split(".")[0]
        if error.name is None or library not in ("transformers", "torch"):
            raise
        raise moved(where, f"no attribute {error.name}", reader) from error


# ---- while a forward runs ------------------------------------------------------------------------


def cache_given(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a language model or one of its layers, None without.

    Raises:
        UnsupportedError: it comes under a name, or at a place, that vtc does not know.
    """
    known = CACHE.of(kwargs)
    if known is None:
        for name, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, Cache):
                place = f"argument {name}"
                raise moved(
                    f"{type(module).__name__}.forward",
                    f"the KV cache in its {place}, not in {' or '.join(CACHE.names)}",
                    ENGINE,
                )
    return known


def cache_left(output: Any) -> Any:
    """The KV cache that a forward gives back, None without.

    Raises:
        UnsupportedError: it has one under a name that vtc does not know.
    """
    if not isinstance(output, ModelOutput):
        return None
    known = CACHE.of(output)
    if known is None:
        for name, value in output.items():
            if isinstance(value, Cache):
                raise moved(
                    type(output).__name__,
                    f"the KV cache in its field {name}, not in {' or '.join(CACHE.names)}",
                    ENGINE,
                )
    return known


def giving(model: Any, cache: Any) -> dict[str, Any]:
    """The named argument that hands a KV cache to a model, or to its ``generate``."""
    inside = getattr(model, "_orig_mod", model)
    inside = inside.get_base_model() if hasattr(inside, "get_base_model") else inside
    return {CACHE.among(_arguments(inside.forward)) or CACHE.names[0]: cache}


def check_filled(module: Any, left: Any, seen: Any) -> None:
    """Refuse to go on behind a forward that filled another KV cache than its layers were given.

    Args:
        left: the cache that the forward gives back; seen: what the first layer was called with.

    Raises:
        UnsupportedError: vtc never saw the one that was filled.
    """
    if left is None or left is seen:
        return
    raise moved(
        type(module).__name__,
        "layers that fill a KV cache without being given it, so nothing in it was compressed",
        ENGINE,
    )


def encoded_images(module: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Images and videos encoded before the prompt, by modality; empty without.

    Raises:
        UnsupportedError: they come under a name that vtc does not know.
    """
    known = ENCODED.of(kwargs)
    if known is not None:
        return known
    for name, value in kwargs.items():
        if isinstance(value, dict) and any(isinstance(v, ModelOutput) for v in value.values()):
            raise moved(
                f"{type(module).__name__}.forward",
                f"encoded images in its argument {name}, not in {' or '.join(ENCODED.names)}",
                ENGINE,
            )
    return {}


def check_call(module: Any, kwargs: Mapping[str, Any], length: int) -> None:
    """Refuse a call of a decoder layer with tensors for each token that vtc would not shorten.

    Args:
        length: of the whole prompt.

    Raises:
        UnsupportedError: there are some under names that nobody knows, or no rotary tables.
    """
    title = f"{type(module).__name__}.forward"
    if TABLES.of(kwargs) is None:
        raise moved(title, TABLES.absent("argument"), TABLES_AND_MASKS, ", ".join(kwargs))
    for name, value in kwargs.items():
        tensors = value if isinstance(value, tuple) else (value,)
        shapes = [getattr(x, "shape", ()) for x in tensors]
        if name not in LAYER_ARGUMENTS and any(length in shape for shape in shapes):
            raise moved(title, f"an argument {name} with a row for each token", TABLES_AND_MASKS)


def check_tap(module: Any, query: Any) -> None:
    """Refuse to read the attention of a layer that has run without its attention being seen.

    Raises:
        UnsupportedError: it was called by another way than the interface of its configuration.
    """
    if query is None:
        raise moved(
            type(module).__name__,
            "no call of the function that its configuration names (_attn_implementation)",
            ATTENTION_PATCH,
        )


def features_of(output: Any, module: Any) -> Any:
    """The features of a call that encodes images, one (N, D) for each or all of them (B, N, D).

    Raises:
        UnsupportedError: they are not where they were.
    """
    for name in FEATURES.names:
        features = getattr(output, name, None)
        if features is not None:
            return features
    raise moved(
        f"{type(output).__name__} of {type(module).__name__}",
        FEATURES.absent("field"),
        FEATURES_STAGE,
    )


# ---- words of messages ---------------------------------------------------------------------------


def _arguments(forward: Any) -> list[str]:
    """Names of the arguments; none of a wrapper, whose signature says nothing."""
    known = inspect.signature(forward).parameters.values()
    return [p.name for p in known if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _title(forward: Any) -> str:
    owner = getattr(forward, "__self__", None)
    name = getattr(forward, "__name__", "forward")
    return f"{type(owner).__name__}.{name}" if owner is not None else name
