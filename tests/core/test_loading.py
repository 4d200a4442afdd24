# SPDX-License-Identifier: Apache-2.0
"""Ways of loading a model and wrapping it in others, and training it, with compression on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mini_anyres
import mini_llava as mini
import pytest
import torch
from snapshot import snapshot
from style_cases import CLOSE, METHODS, against_oracle, generated, name, same, wrapped
from torch import Tensor, nn

import vtc
from vtc.methods.pitome import PiToMe
from vtc.methods.zipvl import ZipVL
from vtc.transformers_contract import cache_left, giving

__all__ = ["name"]  # the fixture: every method of test_styles.py

# ---- precision and weights -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Within 4 units in the last place of the largest logit: the sums run in another order.

    Tokens are given, as rounding may change which one is the best.
    """
    model = wrapped(name).to(dtype)
    inputs = mini.prompt([1, 2], pad="left")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])

    def run() -> Tensor:
        out = model(**inputs, use_cache=True)
        logits, mask = [out.logits[:, -1]], inputs["attention_mask"]
        for token in tokens.split(1, 1):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            out = model(
                input_ids=token,
                attention_mask=mask,
                position_ids=mask.cumsum(1)[:, -1:] - 1,
                **giving(model, cache_left(out)),
            )
            logits.append(out.logits[:, -1])
        return torch.stack(logits, 1)

    got, want = against_oracle(name, model, run)
    assert got.dtype == dtype
    scale = want.abs().max().item()
    torch.testing.assert_close(got, want, atol=4 * torch.finfo(dtype).eps * scale, rtol=0)
    vtc.unwrap(model)
    assert (run() - got).abs().max() > 8 * torch.finfo(dtype).eps * scale, "no teeth"


@torch.no_grad()
def test_int8_weights(name: str) -> None:
    """torchao's int8 weights, quantized before wrapping, in tower and decoder."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is a dev dependency")
    model, inputs = mini.build(), mini.prompt([1, 2], pad="left")
    full = generated(model, inputs)[1]
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    stock = generated(model, inputs)[1]
    assert (stock - full).abs().max() > 1e-4, "not quantized"
    vtc.wrap(model, METHODS[name])
    got, want = against_oracle(name, model, lambda: generated(model, inputs))
    same(got, want)
    assert (got[1] - stock).abs().max() > 1e-3, "no teeth"


@pytest.mark.parametrize(
    "how, first", [("cpu", "wrap"), ("disk", "dispatch"), ("device_map", "dispatch")]
)
@torch.no_grad()
def test_offloaded(name: str, how: str, first: str, tmp_path: Path) -> None:
    """accelerate moves weights in from the CPU or a disk for each call; meta devices in between."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is a dev dependency")
    inputs = mini.prompt([1, 2], pad="left")
    want = generated(wrapped(name), inputs)
    model = wrapped(name) if first == "wrap" else mini.build()
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        # Half of the decoder stays, the rest comes from the disk: layers on two "devices".
        places = {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(5)}
        for part in ("embed_tokens", "norm", "rotary_emb"):
            places[f"model.language_model.{part}"] = "cpu"
        places |= {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu"}
        accelerate.dispatch_model(
            model,
            {**places, "lm_head": "disk"},
            main_device="cpu",
            offload_dir=str(tmp_path),
            force_hooks=True,
        )
    assert next(model.model.vision_tower.parameters()).device.type == "meta"
    generated(model, inputs)  # Hugging Face adds its own hooks in the first forward
    before = snapshot(model)
    if first != "wrap":
        vtc.wrap(model, METHODS[name])
    same(generated(model, inputs), want)
    vtc.unwrap(model)
    if first != "wrap":
        assert snapshot(model) == before


# ---- wrappers ------------------------------------------------------------------------------------


def lora(model: Any, **more: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is a dev dependency")
    torch.manual_seed(7)
    targets = ["q_proj", "k_proj", "v_proj"]  # of the tower and of the decoder
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=targets, **more)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.normal_(0, 0.2)
    return model.eval()


@torch.no_grad()
def test_peft(name: str) -> None:
    """An adapter on every query and key, put on before or after: scores read it all the same."""
    inputs = mini.prompt([1, 2], pad="left")
    bare = generated(wrapped(name), inputs)[1]
    model = lora(mini.build())
    stock, before = generated(model, inputs)[1], snapshot(model)
    assert vtc.wrap(model, METHODS[name]) is model
    assert model.vtc is model.get_base_model().vtc
    with pytest.raises(ValueError, match="already wrapped"):
        vtc.wrap(model.get_base_model(), "fastv")
    got, want = against_oracle(name, model, lambda: generated(model, inputs))
    same(got, want)
    same(generated(lora(wrapped(name)), inputs), got)
    assert min((got[1] - other).abs().max() for other in (stock, bare)) > 1e-3, "no teeth"
    vtc.unwrap(model)
    assert snapshot(model) == before
    torch.testing.assert_close(generated(model, inputs)[1], stock, **CLOSE)


@torch.no_grad()
def test_part_of_a_wrapped_model_is_not_copied() -> None:
    """modules_to_save would copy the projector with its hooks; a copy of the whole model is
    fine."""
    with pytest.raises(vtc.UnsupportedError, match=r"modules_to_save.*wrap the result"):
        lora(wrapped("chain"), modules_to_save=["multi_modal_projector"])
    inputs = mini.prompt([1, 2], pad="left")
    model = vtc.wrap(
        lora(mini.build(), modules_to_save=["multi_modal_projector"]), METHODS["chain"]
    )
    want = generated(model, inputs)
    twin = copy.deepcopy(model)
    assert twin.vtc is not model.vtc and twin.vtc.decoder.sites.base is twin.get_base_model().model
    vtc.unwrap(model)
    same(generated(twin, inputs), want)
    vtc.unwrap(twin)
    same(generated(twin, inputs), generated(model, inputs))


def test_a_copy_of_a_model_with_crops_stands_alone() -> None:
    model = mini_anyres.build("next")
    inputs = mini_anyres.prompt([[mini_anyres.WIDE]], "next")
    vtc.wrap(model, "globalcom2", keep_ratio=0.5)
    with torch.no_grad():
        want = model(**inputs).logits
        twin = copy.deepcopy(model)
        vtc.unwrap(model)
        torch.testing.assert_close(twin(**inputs).logits, want)
        assert twin.vtc.report().final_tokens < twin.vtc.report().visual_tokens
        vtc.unwrap(twin)
        assert "get_image_features" not in vars(twin.model)
        torch.testing.assert_close(twin(**inputs).logits, model(**inputs).logits)


def test_other_wrappers() -> None:
    model = mini.build()
    compiled = torch.compile(model, backend="eager")
    before = snapshot(model)
    with pytest.raises(vtc.UnsupportedError, match="wrap first, then compile"):
        vtc.wrap(compiled, "fastv")
    with pytest.raises(vtc.UnsupportedError, match=r"vtc\.wrap\(model\.module"):
        vtc.wrap(nn.DataParallel(model), "fastv")
    assert snapshot(model) == before
    vtc.wrap(model, "fastv")
    replica = model.vtc.sites.vision.tower._replicate_for_data_parallel()
    with pytest.raises(vtc.UnsupportedError, match="DistributedDataParallel"):
        replica(pixel_values=torch.zeros(1, 3, mini.SIZE, mini.SIZE))


# ---- training ------------------------------------------------------------------------------------


def training(model: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step; images have no labels, nor what an image token predicts."""
    inputs = mini.prompt([1, 2], pad="right")
    image = inputs["input_ids"] == mini.IMAGE
    hidden = image | image.roll(1, 1) | (inputs["attention_mask"] == 0)
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"].masked_fill(hidden, -100)).loss
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def test_gradients_reach_the_tower(name: str) -> None:
    """Those of the masked oracle, down to the patch embedding; a step lowers the loss."""
    model = wrapped(name).train()
    (loss, grads), (want_loss, want) = against_oracle(name, model, lambda: training(model))
    assert loss == pytest.approx(want_loss, abs=1e-5)
    for key, g in grads.items():
        assert torch.isfinite(g).all(), key
        torch.testing.assert_close(g, want[key], atol=1e-5, rtol=1e-4, msg=key)
    for part in ("embeddings.patch", "multi_modal_projector.linear_1", "layers.0"):
        assert any(g.abs().max() > 1e-6 for key, g in grads.items() if part in key), part
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        last, _ = training(model)
        optimizer.step()
    assert training(model)[0] < last < loss + 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """The same loss and gradients; in front of a tower that is shortened inside it is refused."""
    model = part = wrapped(name).train()
    loss, grads = training(model)
    how = {"use_reentrant": reentrant}
    if name in ("pitome", "chain"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        with pytest.raises(vtc.UnsupportedError, match=r"get_decoder\(\)"):
            training(model)
        model.gradient_checkpointing_disable()
        part = model.get_decoder()
    part.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if type(model.get_decoder().layers[0]).__call__ is not nn.Module.__call__:
        with pytest.raises(vtc.UnsupportedError, match=r"newer transformers"):
            training(model)  # 5.5 runs the hooks again
        return
    assert all(layer.gradient_checkpointing for layer in model.get_decoder().layers)
    got, again = training(model)
    assert got == pytest.approx(loss, abs=1e-6)
    assert grads.keys() == again.keys()
    for key, g in grads.items():
        torch.testing.assert_close(again[key], g, atol=1e-6, rtol=1e-5, msg=key)


def test_checkpointing_around_attention_is_refused() -> None:
    model = vtc.wrap(mini.build(), ZipVL()).train()
    training(model)
    model.gradient_checkpointing_enable()
    with pytest.raises(vtc.UnsupportedError, match=r"backward pass"):
        training(model)
    with torch.no_grad():
        model(**mini.prompt(1))
    encoder = vtc.wrap(mini.build().model.vision_tower, PiToMe(keep_tokens=9)).train()
    encoder.gradient_checkpointing_enable()
    with pytest.raises(vtc.UnsupportedError, match="pitome has removed tokens"):
        encoder(torch.zeros(1, 3, mini.SIZE, mini.SIZE))
