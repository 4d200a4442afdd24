# SPDX-License-Identifier: Apache-2.0
"""Arguments that evaluation engines pass: types of the fields, chains, refusals by name,
loading."""

from __future__ import annotations

from dataclasses import fields

import pytest
import safetensors.torch
import torch
import transformers
from chats import qwen_processor

from vtc.benchmarks.harnesses.model_args import LoadOptions, parse
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor
from vtc.methods.cdpruner import CDPruner
from vtc.methods.fastv import FastV
from vtc.methods.pitome import PiToMe
from vtc.methods.sparsevlm import SparseVLM
from vtc.methods.tome import ToMe
from vtc.methods.visionzip import VisionZip
from vtc.methods.zero_tprune import ZeroTPrune
from vtc.registry import known_methods


@pytest.mark.parametrize(
    "given, methods",
    [
        ({}, None),
        ({"method": ""}, None),
        ({"method": "none"}, None),
        ({"method": "visionzip", "keep_ratio": 0.25}, (VisionZip(keep_ratio=0.25),)),
        ({"method": "visionzip", "keep_ratio": 1}, (VisionZip(keep_ratio=1.0),)),
        ({"method": "visionzip", "visionzip.keep_ratio": "0.25"}, (VisionZip(keep_ratio=0.25),)),
        ({"method": "visionzip", "keep_tokens": 64.0}, (VisionZip(keep_tokens=64),)),
        ({"method": "tome", "r": "8"}, (ToMe(r=8),)),
        ({"method": "pitome", "track_size": "False", "ratio": "none"}, (PiToMe(track_size=False),)),
        ({"method": "cdpruner", "relevance": "none"}, (CDPruner(relevance="none"),)),
        ({"method": "zero-tprune", "similar": 0.5}, (ZeroTPrune(similar=0.5),)),
        ({"method": "sparsevlm", "ratios": "[0.5,0.25,0.1]"}, (SparseVLM(ratios=(0.5, 0.25, 0.1)),)),
        (
            {"method": "pitome+fastv", "pitome.keep_ratio": 0.5, "fastv.keep_ratio": 0.2, "fastv.k": 3},
            (PiToMe(keep_ratio=0.5), FastV(keep_ratio=0.2, k=3)),
        ),
    ],
)  # fmt: skip
def test_methods(given, methods):
    loading, chain = parse({"pretrained": "x", **given})
    assert loading == LoadOptions(pretrained="x")
    if methods is None:
        assert chain is None
        return
    assert chain.methods == methods
    for method in chain.methods:  # 64 and 64.0 are equal, and so are False and 0
        for field in fields(method):
            value, wanted = getattr(method, field.name), {type(m): m for m in methods}[type(method)]
            assert type(value) is type(getattr(wanted, field.name)), field.name


@pytest.mark.parametrize(
    "given, said",
    [
        ({"method": "fastv", "keep_ration": 0.5}, ["keep_ration", "did you mean keep_ratio?", "fastv takes keep_ratio"]),
        ({"keep_ratio": 0.5}, ["keep_ratio", "method=none"]),
        ({"method": "fastv", "pitome.keep_ratio": 0.5}, ["pitome.keep_ratio"]),
        ({"max_batch_size": 4}, ["max_batch_size", "the model takes attn_implementation, device"]),
        ({"method": "pitome+fastv", "keep_ratio": 0.5}, ["keep_ratio", "pitome.keep_ratio or fastv.keep_ratio"]),
        ({"method": "pitome+fastv", "k": 3}, ["say whose it is, fastv.k"]),
        ({"method": "fastv+fastv"}, ["names each method once"]),
        ({"method": "fast-v"}, ['unknown method "fast-v"; did you mean fastv']),
        ({"method": "visionzip", "keep_ratio": "much"}, ["keep_ratio=much is not of type float | None"]),
        ({"method": "visionzip", "keep_tokens": 0.5}, ["keep_tokens=0.5 is not of type int | None"]),
        ({"method": "visionzip", "keep_tokens": True}, ["keep_tokens=True"]),
        ({"method": "visionzip", "keep_ratio": True}, ["keep_ratio=True"]),
        ({"method": "visionzip", "keep_ratio": 2}, ["keep_ratio"]),
        ({"method": "visionzip", "keep_ratio": 0.5, "keep_tokens": 8}, ["not both"]),
        ({"method": "pitome", "track_size": "maybe"}, ["track_size=maybe is not of type bool"]),
        ({"method": "transprune", "direction": "up"}, ["direction=up", "'code'"]),
        ({"method": "cdpruner", "text": "a query"}, ["text=a query", "TextQuery"]),
        ({"method": "sparsevlm", "ratios": "0.5"}, ["ratios=0.5"]),
        ({"dtype": "float64"}, ["dtype=float64", "bfloat16"]),
        ({"trust_remote_code": "perhaps"}, ["trust_remote_code=perhaps"]),
    ],
)  # fmt: skip
def test_refusals(given, said):
    with pytest.raises(ValueError) as error:
        parse({"pretrained": "x", **given})
    for words in said:
        assert words in str(error.value)


def test_routers_are_read_from_a_file(tmp_path):
    safetensors.torch.save_file({"3": torch.ones(8)}, tmp_path / "routers.safetensors")
    _, method = parse(
        {"pretrained": "x", "method": "mod", "routers": str(tmp_path / "routers.safetensors")}
    )
    assert str(method) == "mod(routers=<routers of layers 3>)"


def test_a_model_is_needed():
    with pytest.raises(ValueError, match="pretrained is missing: a folder, a hub id or tiny-llava"):
        parse({"method": "fastv"})


def test_no_parameter_of_a_method_has_the_name_of_an_argument_of_the_model():
    own = {field.name for field in fields(LoadOptions)} | {"method", "max_new_tokens"}
    for name, cls in known_methods().items():
        assert not own & {field.name for field in fields(cls)}, name


def test_every_default_of_a_method_may_be_written_out():
    """The types that fields have are types that text can be converted to."""
    for name, cls in known_methods().items():
        for field in fields(cls):
            if (name, field.name) in (("mod", "routers"), ("cdpruner", "text")):
                continue
            text = str(list(field.default) if isinstance(field.default, tuple) else field.default)
            _, chain = parse({"pretrained": "x", "method": name, field.name: text})
            assert getattr(chain.methods[0], field.name) == field.default, (name, field.name)


def test_a_folder_loads_as_asked(tmp_path):
    model = mini_llava()
    model.save_pretrained(tmp_path)
    mini_processor(model).save_pretrained(tmp_path)
    given = {"pretrained": str(tmp_path), "attn_implementation": "eager", "dtype": "float16"}
    net, processor = parse(given)[0].load(torch.device("cpu"))
    assert net.config._attn_implementation == "eager" and net.dtype is torch.float16
    assert not net.training and processor.image_token == "<image>"
    assert parse({"pretrained": str(tmp_path)})[0].load(torch.device("cpu"))[0].dtype is model.dtype
    with pytest.raises(ValueError, match=r"CLIPImageProcessor.* takes no max_pixels"):
        parse({**given, "max_pixels": 1000})[0].load(torch.device("cpu"))


def test_embedded_models_load_by_name():
    loading, _ = parse({"pretrained": "tiny-llava", "attn_implementation": "eager"})
    model, _ = loading.load(torch.device("cpu"))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.config._attn_implementation == "eager" and model.dtype is torch.float32
    with pytest.raises(ValueError, match="tiny-llava takes no device_map"):
        parse({"pretrained": "tiny-llava", "device_map": "auto"})[0].load(torch.device("cpu"))


def test_pixels_reach_a_processor_that_takes_them(tmp_path, monkeypatch):
    """Qwen-VL's; the model itself is not looked at."""
    qwen_processor().save_pretrained(tmp_path)
    auto = transformers.AutoModelForImageTextToText
    monkeypatch.setattr(auto, "from_pretrained", lambda *args, **kwargs: mini_llava())
    given = {"pretrained": str(tmp_path), "min_pixels": 3136, "max_pixels": "50176"}
    _, processor = parse(given)[0].load(torch.device("cpu"))
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (3136, 50176)
