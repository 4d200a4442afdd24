# SPDX-License-Identifier: Apache-2.0
"""Events in the life of a wrapped model: it goes on right, or says what is wrong."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mini as encoders
import mini_llava as mini
import pytest
import torch
from fault_cases import METHODS, answers, equal
from leaks import counting, dead, resident
from snapshot import snapshot
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.benchmarks.support import mini_families

__all__ = ["counting"]  # a fixture

INPUTS = mini.prompt([1, 2], pad="left")


def some(*names: str) -> list[Any]:
    """All families, all but these in soak runs alone."""
    return [
        n if n in names else pytest.param(n, marks=pytest.mark.soak)
        for n in sorted(mini_families.EVERY)
    ]


def wrapped(name: str = "chain") -> Any:
    return vtc.wrap(mini.build(), METHODS[name])


def family(name: str) -> tuple[Any, dict]:
    """A mini model and a prompt of two images."""
    one, two, _ = mini_families.EVERY[name].sizes
    return mini_families.build(name), mini_families.prompt(name, [[one, two]])


def different(a: list, b: list) -> bool:
    return (a[1] - b[1]).abs().max().item() > 1e-3


# ---- wrap and unwrap, over and over --------------------------------------------------------------


def cycles(times: int, run: bool) -> None:
    """Wrap and unwrap; nothing may grow after the first few."""
    model, names = mini.build(), list(METHODS)
    stock = answers(model, INPUTS)
    before = snapshot(model)

    def cycle(n: int) -> None:
        vtc.wrap(model, METHODS[names[n % len(names)]])
        if run:
            model(**mini.prompt(1, batch=1))
        vtc.unwrap(model)

    def counts() -> tuple[int, int, int]:
        gc.collect()
        return len(gc.get_objects()), len(ALL_ATTENTION_FUNCTIONS), resident()

    for n in range(3 * len(names)):
        cycle(n)
    objects, functions, memory = counts()
    for n in range(times):
        cycle(n)
    after = counts()
    assert after[0] <= objects + 50  # of pytest and the interpreter; one a cycle would be more
    assert after[1] == functions
    assert after[2] <= memory + (16 << 20)
    assert snapshot(model) == before
    assert equal(answers(model, INPUTS), stock)


@pytest.mark.usefixtures("counting")
@torch.no_grad()
def test_a_thousand_wraps() -> None:
    cycles(1000, run=False)


@pytest.mark.parametrize("times", [40, pytest.param(5000, marks=pytest.mark.soak)])
@pytest.mark.usefixtures("counting")
@torch.no_grad()
def test_wraps_with_a_forward(times: int) -> None:
    cycles(times, run=True)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("counting")
@torch.no_grad()
def test_a_wrapped_model_can_be_collected(name: str) -> None:
    model = wrapped(name)
    answers(model, INPUTS)
    held = [weakref.ref(x) for x in (model, model.vtc, model.lm_head.weight, model.vtc.record)]
    del model
    assert dead(*held)


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some("Aya Vision", "Gemma 3", "LLaVA-OneVision", "Qwen2.5-VL"))
@pytest.mark.usefixtures("counting")
@torch.no_grad()
def test_a_copy_reads_its_own_weights(name: str) -> None:
    """Copies used the original's projector, newline and merger, where adapters had closures."""
    model, inputs = family(name)
    # Merging among features: survivors are projected once more, by the adapter's function.
    vtc.wrap(model, "pool", keep_ratio=0.5)
    want = answers(model, inputs)
    twin = copy.deepcopy(model)
    for weight in model.parameters():
        weight.fill_(torch.nan)
    assert equal(answers(twin, inputs), want)
    vtc.unwrap(model)
    assert equal(answers(twin, inputs), want)
    held = weakref.ref(model)
    del model, weight
    assert dead(held), "the copy holds the original"
    vtc.unwrap(twin)
    assert different(answers(twin, inputs), want)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_copies_stand_alone(name: str) -> None:
    """Unwrapped in any order; of the last forward a copy has the report, but not the state."""
    model = wrapped(name)
    want = answers(model, INPUTS)
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    vtc.unwrap(one)
    stock = answers(one, INPUTS)
    assert different(stock, want)
    assert equal(answers(model, INPUTS), want)
    vtc.unwrap(model)
    assert equal(answers(model, INPUTS), stock) and equal(answers(two, INPUTS), want)
    vtc.wrap(one, METHODS[name])
    assert equal(answers(one, INPUTS), want)


@torch.no_grad()
def test_shallow_copies() -> None:
    """They share modules, so the compression is the original's; unwrapping one left a false
    trace."""
    model = wrapped()
    want, shallow = answers(model, INPUTS), copy.copy(model)
    assert equal(answers(shallow, INPUTS), want)
    with pytest.raises(ValueError, match=r"shallow copy.*unwrap\(model\.vtc\.model\)"):
        vtc.unwrap(shallow)
    assert equal(answers(model, INPUTS), want)
    vtc.unwrap(shallow.vtc.model)
    stock = answers(model, INPUTS)
    assert different(stock, want)
    with pytest.raises(ValueError, match="not wrapped"):
        vtc.unwrap(shallow)
    assert equal(answers(vtc.unwrap(vtc.wrap(shallow, "fastv")), INPUTS), stock)


@pytest.mark.parametrize("name", some("LLaVA, CLIP", "LLaVA-NeXT", "Idefics3", "Qwen2.5-VL"))
@torch.no_grad()
def test_pickled(name: str) -> None:
    """Before its first forward: behind it Hugging Face's own hooks keep any model from it."""
    (model, inputs), file = family(name), io.BytesIO()
    vtc.wrap(model, "fastv", keep_ratio=0.5)
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    want = answers(model, inputs)
    vtc.unwrap(model)
    assert equal(answers(twin, inputs), want)
    assert equal(answers(vtc.unwrap(twin), inputs), answers(model, inputs))
    assert different(answers(model, inputs), want)


@pytest.mark.parametrize("name", ["timm-eva-gqa", "open-clip", "hf-clip", "hf-blip", "hf-blip2"])
@torch.no_grad()
def test_a_pickled_encoder(name: str) -> None:
    made, pixels = encoders.ENCODERS[name], encoders.images()
    model = vtc.wrap(made(), "tome", keep_ratio=0.5)
    twin = pickle.loads(pickle.dumps(model))
    want, stock = list(made.run(model, pixels).values()), list(made.run(made(), pixels).values())
    vtc.unwrap(model)
    assert equal(list(made.run(twin, pixels).values()), want)
    assert equal(list(made.run(vtc.unwrap(twin), pixels).values()), stock)
    assert not equal([x.flatten()[:5] for x in want], [x.flatten()[:5] for x in stock])


# ---- saved and loaded ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_saved_while_wrapped(name: str, tmp_path: Path) -> None:
    """Files hold the stock model, which loads as one."""
    plain = mini.build()
    stock = answers(plain, INPUTS)
    model = wrapped(name)
    want = answers(model, INPUTS)
    model.save_pretrained(tmp_path / "wrapped")
    plain.save_pretrained(tmp_path / "plain")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (
            tmp_path / "plain" / file
        ).read_bytes()
    assert list(model.state_dict()) == list(plain.state_dict())
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "wrapped").eval()
    loaded.generation_config = plain.generation_config
    assert equal(answers(loaded, INPUTS), stock)
    assert "vtc" not in vars(loaded)
    assert equal(answers(vtc.wrap(loaded, METHODS[name]), INPUTS), want)
    assert equal(answers(model, INPUTS), want)
    model.load_state_dict({k: v + 0.01 for k, v in plain.state_dict().items()})
    assert different(answers(model, INPUTS), want)
    model.load_state_dict(plain.state_dict(), assign=True)
    assert equal(answers(model, INPUTS), want)


# ---- changed while wrapped -----------------------------------------------------------------------


def moved(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def there_and_back(model: Any) -> None:
        change(model)
        model.float()

    return there_and_back


def new_parameters(model: Any) -> None:
    for module in list(model.modules()):
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                setattr(module, name, nn.Parameter(weight.clone()))


def train_and_back(model: Any) -> None:
    model.train()
    model(**mini.prompt(1))
    model.eval()


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "double and back": moved(lambda m: m.double()),
    "to the same device": lambda m: m.to("cpu"),
    "shared memory": lambda m: m.share_memory(),
    "train and eval": train_and_back,
    "new parameters": new_parameters,
    "no gradients": lambda m: m.requires_grad_(False),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "weights tied": lambda m: m.tie_weights(),
    "resized embeddings": lambda m: m.resize_token_embeddings(m.config.text_config.vocab_size),
}


@pytest.mark.parametrize("change", HARMLESS)
@torch.no_grad()
def test_harmless_changes(change: str) -> None:
    model = wrapped()
    want = answers(model, INPUTS)
    HARMLESS[change](model)
    assert equal(answers(model, INPUTS), want)
    vtc.unwrap(model)
    plain = mini.build()
    answers(plain, INPUTS)
    assert equal(answers(model, INPUTS), answers(plain, INPUTS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_cast_while_wrapped(dtype: torch.dtype) -> None:
    """As when it is wrapped afterwards."""
    inputs = {**INPUTS, "pixel_values": INPUTS["pixel_values"].to(dtype)}
    model = wrapped()
    answers(model, INPUTS)
    want = answers(vtc.wrap(mini.build().to(dtype), METHODS["chain"]), inputs)
    assert equal(answers(model.to(dtype), inputs), want)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_attention_changed_while_wrapped(name: str) -> None:
    """The new implementation is tapped, too, and stays when the model is unwrapped."""
    model = wrapped(name)
    answers(model, INPUTS)
    model.set_attn_implementation("eager")
    assert equal(
        answers(model, INPUTS),
        answers(vtc.wrap(mini.build(attention="eager"), METHODS[name]), INPUTS),
    )
    vtc.unwrap(model)
    for module in model.modules():
        config = getattr(module, "config", None)
        assert config is None or config._attn_implementation == "eager"
    assert equal(answers(model, INPUTS), answers(mini.build(attention="eager"), INPUTS))


def replace_layer(model: Any) -> None:
    model.model.language_model.layers[2] = copy.deepcopy(
        mini.build().model.language_model.layers[2]
    )


def cut_layers(model: Any) -> None:
    model.model.language_model.layers = model.model.language_model.layers[:4]


def replace(part: str) -> Callable[[Any], None]:
    return lambda model: setattr(model.model, part, getattr(mini.build().model, part))


BREAKING: dict[str, Callable[[Any], None]] = {
    "a layer": replace_layer,
    "fewer layers": cut_layers,
    "the language model": replace("language_model"),
    "the tower": replace("vision_tower"),
    "the projector": replace("multi_modal_projector"),
}


@pytest.mark.parametrize("part", BREAKING)
@pytest.mark.parametrize("name", ["divprune", "fastv", "chain"])
@torch.no_grad()
def test_parts_replaced_while_wrapped(name: str, part: str) -> None:
    """Hooks went with the old part, and the method silently did nothing, or half of its work."""
    model = wrapped(name)
    answers(model, INPUTS)
    BREAKING[part](model)
    with pytest.raises(vtc.UnsupportedError, match=r"gone or has been replaced.*vtc\.unwrap"):
        model(**INPUTS)
    vtc.unwrap(model)
    plain = mini.build()
    BREAKING[part](plain)
    if "layers" not in part:
        assert equal(answers(model, INPUTS), answers(plain, INPUTS))
        want = answers(vtc.wrap(plain, METHODS[name]), INPUTS)
        assert equal(answers(vtc.wrap(model, METHODS[name]), INPUTS), want)


@torch.no_grad()
def test_parts_put_into_wrappers() -> None:
    """They are still there, and so are their hooks."""

    class Inside(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = wrapped()
    want = answers(model, INPUTS)
    model.model.multi_modal_projector = Inside(model.model.multi_modal_projector)
    assert equal(answers(model, INPUTS), want)


@torch.no_grad()
def test_parts_shared_with_a_wrapped_model() -> None:
    """Two sets of hooks on one module took each other's turn."""
    for part in ("language_model", "vision_tower"):
        one, two = wrapped(), mini.build()
        want = answers(one, INPUTS)
        setattr(two.model, part, getattr(one.model, part))
        before = snapshot(two)
        with pytest.raises(ValueError, match=rf"\(model\.{part}\) is compressed already"):
            vtc.wrap(two, "divprune")
        assert snapshot(two) == before
        assert equal(answers(one, INPUTS), want)
    model = mini.build()
    vtc.wrap(model.model.vision_tower, "tome", keep_ratio=0.5)
    with pytest.raises(ValueError, match="compressed already, by itself"):
        vtc.wrap(model, "fastv")
    model = wrapped()
    with pytest.raises(ValueError, match="as a part of another model"):
        vtc.wrap(model.model.vision_tower, "tome", keep_ratio=0.5)


# ---- other processes -----------------------------------------------------------------------------


def _answer_in(pipe: Any, model: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        pipe.send([x.tolist() for x in answers(model, INPUTS)])


@torch.no_grad()
def test_forked_while_wrapped() -> None:
    """As a worker of a DataLoader is; the child compresses, and the parent goes on."""
    model = wrapped()
    want = answers(model, INPUTS)
    here, there = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_answer_in, args=(there, model))
    child.start()
    assert here.poll(120), "the child has not answered"
    assert here.recv() == [x.tolist() for x in want]
    child.join(60)
    assert child.exitcode == 0
    assert equal(answers(model, INPUTS), want)
