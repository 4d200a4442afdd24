# SPDX-License-Identifier: Apache-2.0
"""The contract with transformers: every seam, moved in turn, is refused in one sentence.

Look here first when many other tests fail at once: a new release that moves a seam fails in the
first part with a message that says what moved and who reads it.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import make_dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mini_llava as mini
import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

import vtc
from vtc import transformers_contract as contract
from vtc.adapters.locate import locate, locate_vision
from vtc.benchmarks.shared.markdown import read_block
from vtc.benchmarks.support import mini_families as families
from vtc.benchmarks.support.tables import seam_table
from vtc.hooks.attention_patch import Around
from vtc.hooks.attention_rows import Ahead
from vtc.transformers_contract import CACHE, PLACES, SEAMS, Seam, cache_left

ROOT = Path(__file__).parents[2]
FIRST = "LLaVA, CLIP"
QWEN3 = "Qwen3-VL"


def need(there: object, what: str, reader: str) -> None:
    """Fail with the name of the seam."""
    assert there, f"transformers {contract.release()} moved a seam: {what} (read by {reader})"


# ---- the installed release -----------------------------------------------------------------------


@pytest.mark.parametrize("family", families.EVERY)
def test_every_family_has_every_seam(family: str) -> None:
    model = families.build(family)
    contract.check(model, locate(model))


@torch.no_grad()
def test_calls_of_layers() -> None:
    """Arguments of a decoder layer: the one place where tokens leave."""
    model, inputs, seen = mini.build(), mini.prompt([1, 2], pad="left"), {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            seen[name] = args, kwargs

        return hook

    decoder = model.model.language_model
    for name, module in (("layer", decoder.layers[1]), ("lm", decoder), ("base", model.model)):
        module.register_forward_pre_hook(note(name), with_kwargs=True)
    out = model(**inputs, use_cache=True)
    length = inputs["input_ids"].shape[1]
    args, kwargs = seen["layer"]
    hidden = args[0] if args else contract.HIDDEN.of(kwargs)
    need(
        isinstance(hidden, torch.Tensor),
        "hidden_states of a decoder layer",
        "vtc/engine/llm/engine.py",
    )
    for name in (contract.MASK, contract.POSITIONS, contract.TABLES, CACHE):
        need(
            name.of(kwargs) is not None, f"decoder layer keyword {name}", "vtc/engine/llm/engine.py"
        )
    mask, tables = contract.MASK.of(kwargs), contract.TABLES.of(kwargs)
    need(
        tuple(mask.shape) == (2, 1, length, length),
        f"mask {mask.shape}",
        "vtc/engine/llm/layer_arguments.py",
    )
    need(len(tables) == 2 and tables[0].shape[-2] == length, "cos and sin (.., L, d)", "take_rows")
    need(contract.EMBEDS.of(seen["lm"][1]) is not None, "inputs_embeds of the LM", "_lm_pre")
    need(CACHE.among(seen["lm"][1]), "the KV cache of the LM", "vtc/engine/llm/engine.py")
    need(contract.IDS.of(seen["base"][1]) is not None, "input_ids as a keyword", "_base_pre")
    need(cache_left(out) is not None and out.logits is not None, "the output", "_lm_post")


@torch.no_grad()
def test_image_features() -> None:
    """Features in the LLM's space are `pooler_output`; generate() may encode before prefill."""
    model, inputs, seen = mini.build(), mini.prompt(1, batch=2), []
    features = contract.features_of(model.get_image_features(inputs["pixel_values"]), model)
    need([tuple(f.shape) for f in features] == [(16, 48)] * 2, "one (N, D) an image", "crops.py")

    def base_pre(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    model.model.register_forward_pre_hook(base_pre, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    given, pixels = (name.of(seen[0]) for name in (contract.ENCODED, contract.PIXELS))
    need(
        given or pixels is not None,
        "pixels or encoded images at prefill",
        "vtc/engine/llm/engine.py",
    )
    if contract.ENCODED.among(inspect.signature(model.forward).parameters):
        need(contract.features_of(given["image"], model) is not None, "the image", "_base_pre")
    need(contract.PIXELS.of(seen[1]) is None, "steps", "_base_pre")


def test_attention_interface() -> None:
    reader = "vtc/hooks/attention_patch.py"
    need("sdpa" in contract.ATTENTION_FUNCTIONS, "the attention function of sdpa", reader)
    decoder = mini.build(attention="eager").model.language_model
    module = inspect.getmodule(type(decoder.layers[0].self_attn))
    need(hasattr(module, "eager_attention_forward"), "eager_attention_forward", reader)
    need(Ahead.fits(decoder.layers[0]), "parts of a Llama layer", "vtc/hooks/attention_rows.py")
    calls: list[tuple] = []

    def around(stock: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return stock(*args, **kwargs)

    handle = Around([layer.self_attn for layer in decoder.layers], "vtc_seam_", around)
    decoder(inputs_embeds=torch.zeros(1, 3, 48))
    need(len(calls) == len(decoder.layers), "attention named by the module's config", reader)
    need(len(calls[0]) == 5, "attention called with module, q, k, v, mask", reader)
    handle.remove()


@pytest.mark.parametrize("tower", mini.TOWERS)
def test_vision_blocks(tower: str) -> None:
    """Names that changed before: DINOv2's and ViT's attention (5.18), the CLIP wrapper (5.6)."""
    sites = locate_vision(mini.build(tower).model.vision_tower)
    need(len(sites.blocks) == 4, "the blocks of the encoder", "adapters/hf_vision.py")
    need(all(b.key_source is not None for b in sites.blocks), "k_proj", "adapters/hf_vision.py")
    need(sites.patch == 8 and sites.width == 32, "the configuration", "adapters/hf_vision.py")


@torch.no_grad()
def test_checkpointing_wraps_forward() -> None:
    """Hooks of a checkpointed layer run once: `GradientCheckpointingLayer` calls them outside."""
    model, ran = mini.build().train(), []
    model.gradient_checkpointing_enable()
    layer = model.model.language_model.layers[0]
    need(
        hasattr(layer, "gradient_checkpointing"),
        "layer.gradient_checkpointing",
        "vtc/engine/llm/engine.py",
    )
    layer.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.enable_grad():
        model(**mini.prompt(1)).logits.sum().backward()
    if type(layer).__call__ is nn.Module.__call__:
        need(
            len(ran) == 1,
            "hooks outside the recomputed part of a layer",
            "vtc/engine/llm/engine.py",
        )
    else:  # vtc refuses it there
        need(len(ran) == 2, "GradientCheckpointingLayer.__call__", "check_recomputing")


# ---- a release that moves one --------------------------------------------------------------------

ELSEWHERE = "moved_elsewhere"


def renamed(forward: Any, names: tuple[str, ...]) -> Any:
    """The function with another name for an argument."""
    signature = inspect.signature(forward)
    parameters = [
        p.replace(name=ELSEWHERE) if p.name in names else p for p in signature.parameters.values()
    ]
    assert ELSEWHERE in [p.name for p in parameters], f"{forward} takes none of {names}"

    @wraps(forward)
    def other(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("something was computed")

    other.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return other


class Gone:
    """An attribute of a class whose objects do not have it any more."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")

    def __set__(self, instance: Any, value: Any) -> None:
        pass


def move(seam: Seam, model: Any, monkeypatch: Any) -> None:
    """Take a seam away, as a release that renames it would."""
    for there in PLACES[seam.place](model, locate(model)):
        if seam.kind == "argument":
            owner = getattr(there, "__self__", there)
            name = "forward" if owner is there else there.__name__
            other = renamed(getattr(type(owner), name), seam.name.names)
            monkeypatch.setattr(type(owner), name, other)
        elif seam.kind == "field":
            fields = set(there.__dataclass_fields__) - set(seam.name.names)
            other = make_dataclass(there.__name__, sorted(fields | {ELSEWHERE}))
            known = next(n for n, x in vars(contract).items() if x is there)
            monkeypatch.setattr(contract, known, other)
        elif isinstance(there, ModuleType):
            monkeypatch.delattr(there, seam.name.names[0])
        elif isinstance(there, nn.Module) and seam.name.names[0] in there._modules:
            there._modules[ELSEWHERE] = there._modules.pop(seam.name.names[0])
        else:
            kind = there if isinstance(there, type) else type(there)
            for name in seam.name.names:
                monkeypatch.setattr(kind, name, Gone(name), raising=False)


def refused(model: Any, method: str = "fastv") -> str:
    """Refusal of `vtc.wrap`; the model is as it was."""
    with pytest.raises(vtc.UnsupportedError) as caught:
        vtc.wrap(model, method, keep_ratio=0.5)
    assert "vtc" not in vars(model) and not model._forward_pre_hooks
    text = str(caught.value)
    assert contract.RELEASES in text and "pip install" in text, text
    return text


def holds(seam: Seam, model: Any) -> bool:
    return bool(PLACES[seam.place](model, locate(model)))


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.title)
def test_a_moved_seam_is_refused(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build(QWEN3 if "DeepStack" in seam.place else FIRST)
    if "file" in seam.place:
        model = mini.build(attention="eager")
    assert holds(seam, model)
    move(seam, model, monkeypatch)
    text = refused(model)
    assert all(name in text for name in seam.name.names[:1]), text
    assert "vtc/" in text or "adapters/" in text
    print(text)


@pytest.mark.parametrize("family", families.EVERY)
def test_a_moved_argument_is_refused_in_every_family(family: str) -> None:
    model = families.build(family)
    for seam in (s for s in SEAMS if s.kind == "argument" and holds(s, model)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            move(seam, model, monkeypatch)
            assert seam.name.names[0] in refused(model, "prefixkv"), seam.title
    contract.check(model, locate(model))


@pytest.mark.parametrize("tower", [t for t in mini.TOWERS if "clip" in t or "siglip" in t])
def test_encoders_alone_are_checked(tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seam in (s for s in SEAMS if s.place.startswith("encoder")):
        encoder = mini.build(tower).model.vision_tower
        with pytest.MonkeyPatch.context() as patched:
            move(seam, encoder, patched)
            assert seam.name.names[0] in refused(encoder, "tome")


def test_masks_sized_by_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks follow get_seq_length, which is all that a pruned layer overrides."""
    monkeypatch.setattr(contract.DynamicLayer, "get_mask_sizes", lambda self, n: (n, 0))
    assert "get_mask_sizes" in refused(mini.build())


@pytest.mark.parametrize("part", ["language_model", "vision_tower", "multi_modal_projector"])
def test_a_part_that_an_adapter_does_not_find(part: str) -> None:
    model = mini.build()
    model.model._modules[ELSEWHERE] = model.model._modules.pop(part)
    text = refused(model)
    assert part in text and "adapters/llava.py" in text


def test_classes_that_are_gone() -> None:
    with pytest.raises(vtc.UnsupportedError, match=re.escape(contract.RELEASES)) as caught:
        contract.required("transformers.cache_utils", "LayerOfOld", "vtc/cache/pruned.py")
    assert "LayerOfOld" in str(caught.value)
    with pytest.raises(vtc.UnsupportedError, match=r"transformers\.old_utils has no Cache"):
        contract.required("transformers.old_utils", "Cache", "vtc/cache/pruned.py")
    with pytest.raises(ModuleNotFoundError):  # not a seam: it is not installed
        contract.required("transformerz", "Cache", "vtc/cache/pruned.py")


def test_a_class_that_is_gone_when_vtc_is_imported() -> None:
    code = (
        "import transformers.cache_utils as c; del c.DynamicSlidingWindowLayer\n"
        "import vtc\n"
        "try:\n    vtc.wrap\nexcept vtc.UnsupportedError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "DynamicSlidingWindowLayer" in done.stdout and contract.RELEASES in done.stdout, done


# ---- what only a forward shows -------------------------------------------------------------------


def through(decoder: Any, monkeypatch: Any, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let a change act on the named arguments of every layer's call, and be undone inside."""
    cls = type(decoder.layers[0])
    call, forward = cls.__call__, cls.forward
    stash: dict[str, Any] = {}

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        stash["cache"] = CACHE.of(kwargs)
        change(kwargs)
        return call(self, *args, **kwargs)

    def back(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("kv", None)
        CACHE.put(kwargs, stash["cache"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(cls, "__call__", changed)
    monkeypatch.setattr(cls, "forward", back)  # its signature says nothing


def to_kv(kwargs: dict[str, Any]) -> None:
    kwargs["kv"] = CACHE.take(kwargs)


@pytest.mark.parametrize("method", ["divprune", "fastv", "prefixkv", "tome"])
@pytest.mark.parametrize("change, where", [(to_kv, "kv"), (CACHE.take, "without being given it")])
@torch.no_grad()
def test_a_cache_that_vtc_never_saw(
    method: str, change: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that get it under another name, or not at all: an error, never another answer."""
    model = mini.build()
    through(model.model.language_model, monkeypatch, change)
    vtc.wrap(model, method, keep_ratio=0.5)
    with pytest.raises(vtc.UnsupportedError, match=re.escape(contract.RELEASES)) as caught:
        model.generate(**mini.prompt(1), max_new_tokens=2)
    assert where in str(caught.value)


@torch.no_grad()
def test_an_output_with_its_cache_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mini.build()
    cls = type(model.model.language_model)
    forward = cls.forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        return ModelOutput(last_hidden_state=out[0], kv=cache_left(out))

    monkeypatch.setattr(cls, "forward", other)
    vtc.wrap(model, "fastv", keep_ratio=0.5)
    with pytest.raises(vtc.UnsupportedError, match="field kv"):
        model(**mini.prompt(1), use_cache=True)


@torch.no_grad()
def test_an_output_without_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache that the layers were given is the one that methods evict from."""
    model, inputs = mini.build(), mini.prompt(1)
    vtc.wrap(model, "prefixkv", keep_ratio=0.5)
    want, got = DynamicCache(), DynamicCache()
    model(**inputs, **contract.giving(model, want), use_cache=True)
    cls = type(model.model.language_model)
    forward = cls.forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ModelOutput(last_hidden_state=forward(self, *args, **kwargs)[0])

    monkeypatch.setattr(cls, "forward", other)
    with contextlib.suppress(AttributeError):  # the model itself misses it
        model(**inputs, **contract.giving(model, got), use_cache=True)
    lengths = [[layer.keys.shape[2] for layer in cache.layers] for cache in (want, got)]
    assert lengths[0] == lengths[1] and min(lengths[0]) < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", [contract.TABLES, contract.MASK], ids=lambda name: name.names[0])
@pytest.mark.parametrize("method", ["fastv", "divprune"])
@torch.no_grad()
def test_layers_that_are_called_otherwise(
    method: str, name: contract.Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a signature does not say: a renamed argument reaches layers that pass all on."""
    model, inputs = mini.build(), mini.prompt([1, 1], pad="left")
    cls = type(model.model.language_model.layers[0])
    call, forward = cls.__call__, cls.forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs[ELSEWHERE] = name.take(kwargs)
        return call(self, *args, **kwargs)

    def back(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs[name.names[0]] = kwargs.pop(ELSEWHERE)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(cls, "__call__", changed)
    monkeypatch.setattr(cls, "forward", back)
    vtc.wrap(model, method, keep_ratio=0.5)
    with pytest.raises(vtc.UnsupportedError, match=re.escape(contract.RELEASES)):
        model(**inputs)


@torch.no_grad()
def test_attention_that_is_called_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the implementation that is read elsewhere: nothing is seen, and that is said."""
    model = mini.build()
    stock = property(lambda self: self.stock._attn_implementation)
    monkeypatch.setattr("vtc.hooks.attention_patch._Config._attn_implementation", stock)
    for method in ("fastv", "prefixkv"):
        with (
            vtc.compressing(model, method, keep_ratio=0.5),
            pytest.raises(vtc.UnsupportedError, match="_attn_implementation"),
        ):
            model(**mini.prompt(1), use_cache=True)


def test_norms_under_another_name() -> None:
    """A norm that is not found must not be left out."""
    for family, method, part in (("Qwen3-VL", "zipvl", "decoder"), ("InternVL", "tome", "vision")):
        model = families.build(family)
        sites = locate(model)
        blocks = [b.attn for b in sites.vision.blocks]
        layers = [layer.self_attn for layer in sites.decoder.decoder.layers]
        for attn in layers if part == "decoder" else blocks:
            attn._modules["key_norm"] = attn._modules.pop("k_norm")
        refused(model, method)


def test_names_that_stand_for_others() -> None:
    """An argument nobody knows in place of one that not every release has."""
    for family, place, name, known in (
        (FIRST, "decoder layer", contract.POSITIONS, contract.LAYER_ARGUMENTS),
        ("LLaVA-NeXT", "base model", contract.ENCODED, contract.BASE_ARGUMENTS),
    ):
        model = families.build(family)
        for there in PLACES[place](model, locate(model)):
            if name.among(inspect.signature(there.forward).parameters) is None:
                continue  # 5.17 and older encode no images beforehand
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(type(there), "forward", renamed(type(there).forward, name.names))
                assert name.names[0] in refused(model)
        assert not known & {ELSEWHERE}


@pytest.mark.parametrize("part", ["encoder", "embeddings"])
def test_a_tower_without_its_parts(part: str) -> None:
    tower = mini.build("clip").model.vision_tower
    inside = getattr(tower, "vision_model", tower)
    inside._modules[ELSEWHERE] = inside._modules.pop(part)
    assert "adapters/hf_vision.py" in refused(tower, "tome")


def test_names_that_only_a_call_shows() -> None:
    """The same sentence wherever a cache, encoded images or features come under another name."""
    cache, module, features = DynamicCache(), nn.Identity(), ModelOutput(other=torch.ones(1))
    cases = {
        "argument kv": lambda: contract.cache_given(module, (), {"kv": cache}),
        "argument 1": lambda: contract.cache_given(module, (torch.ones(1), cache), {}),
        "argument early": lambda: contract.encoded_images(module, {"early": {"image": features}}),
        "pooler_output": lambda: contract.features_of(features, module),
    }
    for what, call in cases.items():
        with pytest.raises(vtc.UnsupportedError, match=re.escape(contract.RELEASES)) as caught:
            call()
        assert what in str(caught.value)
    for name in CACHE.names:
        assert contract.cache_given(module, (), {name: cache}) is cache
    assert contract.cache_given(module, (torch.ones(1),), {"kv": None}) is None
    assert contract.encoded_images(module, {"text": {"a": 1}}) == {}


# ---- the contract itself -------------------------------------------------------------------------


def sources() -> list[Path]:
    """All modules but the contract and what trains the embedded models."""
    folders = [ROOT / name for name in ("vtc", "benchmarks", "demos")]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    links = [ROOT / "vtc" / name for name in ("adapters", "benchmarks", "demos", "kernels")]
    known = {path for path in paths if not any(link in path.parents for link in links)}
    return sorted(
        p for p in known if p.name != "transformers_contract.py" and "tiny" not in p.parts
    )


def test_only_the_contract_names_them() -> None:
    """No other module of the engine spells a name of the contract: it would be read unchecked."""
    spelled = {n for x in vars(contract).values() if isinstance(x, contract.Name) for n in x.names}
    common = {"layers", "keys", "values", "update", "reset", "crop", "config", "register"}
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                key = node.slice
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "pop"):
                key = node.args[0] if node.args else None
            else:
                continue
            read = isinstance(key, ast.Constant) and key.value in spelled - common
            if read and re.search("kwargs|output", owner := ast.unparse(node)):
                found.append(f"{path.name}:{node.lineno} {owner}")
    assert not found
    text = "\n".join(path.read_text() for path in sources())
    assert "past_key_values" not in text and "mm_encoder_outputs=" not in text


def test_the_page_of_releases_lists_every_seam() -> None:
    page = ROOT / "docs" / "releases.md"
    assert read_block(page, "seams") == seam_table()
    readers = {path for seam in SEAMS for path in seam.reader.split(", ")}
    assert all(list(ROOT.glob(path)) for path in readers)
    assert contract.RELEASES in page.read_text()


def test_the_tested_range_is_the_one_that_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    oldest, below = re.search(r'"transformers>=([\d.]+),<([\d.]+)"', text).groups()  # type: ignore
    major, minor = contract.NEWEST.split(".")
    assert (oldest, below) == (contract.OLDEST, f"{major}.{int(minor) + 1}")
    assert re.search(r"OLDEST := ([\d.]+)", (ROOT / "Makefile").read_text())[1] == oldest
    pinned = re.findall(r"^transformers==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert max(pinned, key=lambda x: tuple(map(int, x.split(".")))).startswith(contract.NEWEST)


def test_handing_a_cache_over() -> None:
    """`giving` finds the name through whatever is around a model."""
    model = mini.build()
    (name,) = contract.giving(model, 1)
    assert name in inspect.signature(model.forward).parameters
    compiled = torch.compile(model)
    around = SimpleNamespace(get_base_model=lambda: model)
    assert contract.giving(compiled, 1) == contract.giving(around, 1) == {name: 1}
