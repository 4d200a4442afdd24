# SPDX-License-Identifier: Apache-2.0
"""`vtc.inspect` and ``vtc inspect``: from a configuration alone, or a model that stays as it
was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mini
import mini_generic
import mini_llava
import pytest
import torch
import transformers as hf
from snapshot import snapshot
from typer.testing import CliRunner

import vtc
from vtc import cli
from vtc.inspection import _encoder, _grid, from_config


def saved(config: Any, folder: Path, architecture: str | None = None) -> str:
    if architecture is not None:
        config.architectures = [architecture]
    config.save_pretrained(folder)
    return str(folder)


def wrap_says(model: Any, name: str) -> str | None:
    cls = vtc.methods()[name]
    try:
        method = cls(keep_ratio=0.5)
    except ValueError:
        method = cls()
    try:
        vtc.wrap(model, method)
    except vtc.UnsupportedError as error:
        return str(error)
    vtc.unwrap(model)
    return None


@pytest.mark.parametrize(
    "build",
    [
        lambda: mini_llava.build("clip"),
        lambda: mini_llava.build("siglip", "qwen2"),
        lambda: mini.ENCODERS["hf-blip2-retrieval"](),
        lambda: mini.ENCODERS["timm-siglip"](),
        lambda: mini.ENCODERS["open-clip"](),
        lambda: mini_generic.FAMILIES[0].build(),
    ],
    ids=["llava-clip", "llava-siglip", "blip2", "timm", "open_clip", "generic"],
)
def test_answers_are_those_of_wrap_and_the_model_stays(build: Any) -> None:
    model = build()
    before = snapshot(model)
    found = vtc.inspect(model)
    assert snapshot(model) == before
    assert set(found.methods) == set(vtc.methods())
    for name, why in found.methods.items():
        assert why == wrap_says(model, name), name
    for name, parameters in found.instead.items():
        assert found.methods[name] is not None
        vtc.wrap(model, name, keep_ratio=0.5, **parameters)
        vtc.unwrap(model)
    json.dumps(found.to_dict())


def test_what_is_known_of_a_llava() -> None:
    found = vtc.inspect(mini_llava.build("clip"))
    assert (found.family, found.adapter) == ("LLaVA", "llava")
    assert found.encoder == {
        "class": "CLIPVisionModel",
        "blocks": 4,
        "width": 32,
        "heads": 2,
        "patch": 8,
        "grid": (4, 4),
        "prefix": 1,
        "cls": True,
        "pool": "cls",
        "other sizes": True,
    }
    language: Any = found.language
    assert language["layers"] == 5 and language["decoder"] == "LlamaModel"
    assert (language["heads"], language["kv heads"], language["image tokens"]) == (4, 2, 16)
    assert language["token ids"] == [mini_llava.IMAGE]
    assert found.warnings == [] and "fastv" in found.working


def test_substitutes_for_the_class_token() -> None:
    found = vtc.inspect(mini_llava.build("siglip"))
    assert "[CLS]" in str(found.methods["visionzip"])
    assert found.instead["visionzip"] == {"saliency": "received"}
    assert "visionzip (but not with saliency='received')" in str(found)
    assert found.methods["fastervlm"] and "fastervlm" not in found.instead


@pytest.mark.parametrize("name", ["timm-vit", "timm-eva", "open-clip", "hf-dinov2"])
def test_grids_of_encoders(name: str) -> None:
    found = vtc.inspect(mini.ENCODERS[name]())
    assert found.encoder["grid"] == (mini.GRID, mini.GRID) and found.language is None


# ---- from a configuration alone ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "architecture", "family"),
    [
        (hf.LlavaConfig, "LlavaForConditionalGeneration", "LLaVA"),
        (hf.LlavaConfig, None, "LLaVA"),
        (hf.BlipConfig, "BlipForImageTextRetrieval", "BlipForImageTextRetrieval"),
        (hf.CLIPVisionConfig, None, "CLIPVisionModel"),
    ],
)
def test_real_sizes_without_weights(
    config: Any, architecture: str | None, family: str, tmp_path: Path
) -> None:
    """The configurations' defaults are those of 7 B models."""
    folder = saved(config(), tmp_path, architecture)
    model = from_config(folder)
    assert all(p.is_meta for p in model.parameters()) and not model.training
    found = vtc.inspect(folder)
    assert found.family == family and "divprune" in found.working
    assert vtc.inspect(str(tmp_path / "config.json")).to_dict() == found.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_sliding_window_is_a_warning(tmp_path: Path) -> None:
    config = hf.LlavaConfig(text_config=hf.MistralConfig(sliding_window=512))
    found = vtc.inspect(saved(config, tmp_path))
    assert len(found.warnings) == 1 and "sliding window of 512" in found.warnings[0]
    assert "fastv" in found.working


def test_a_crossing_model_is_refused(tmp_path: Path) -> None:
    folder = saved(hf.MllamaConfig(), tmp_path)
    with pytest.raises(vtc.UnsupportedError, match="cross-attention"):
        vtc.inspect(folder)


def test_mistakes() -> None:
    model = mini_llava.build()
    vtc.wrap(model, "fastv")
    with pytest.raises(ValueError, match="unwrap"):
        vtc.inspect(model)
    with pytest.raises(ValueError, match="expected a model"):
        vtc.inspect(3)  # type: ignore[arg-type]


# ---- the command ---------------------------------------------------------------------------------


def test_command_prints_what_inspect_says(tmp_path: Path) -> None:
    folder = saved(hf.LlavaConfig(), tmp_path)
    done = CliRunner().invoke(cli.app, ["inspect", folder])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(vtc.inspect(folder)).strip()
    assert "LlavaForConditionalGeneration: LLaVA (adapters/llava.py)" in done.stdout
    assert "grid 24 x 24" in done.stdout and "image tokens 576" in done.stdout


def test_command_json(tmp_path: Path) -> None:
    folder = saved(mini_generic.FAMILIES[0].config(), tmp_path)
    done = CliRunner().invoke(cli.app, ["inspect", folder, "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["adapter"] == "generic" and len(shown["notes"]) == 3
    assert shown["methods"]["fastv"] is None and "one to one" in shown["methods"]["random"]


@pytest.mark.parametrize(
    ("config", "says"), [(None, "cannot read"), (hf.FuyuConfig, "no image encoder")]
)
def test_command_mistakes_are_one_line(config: Any, says: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "nothing") if config is None else saved(config(), tmp_path)
    done = CliRunner().invoke(cli.app, ["inspect", folder])
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


def test_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mini_llava.build()
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_: 1 / 0)
    assert vtc.inspect(model).working


def test_models_that_say_less(tmp_path: Path) -> None:
    """No class for the configuration, no size of image, no adapter for the encoder."""
    text = hf.BertConfig()
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(text, text)
    with pytest.raises(ValueError, match="no model class for EncoderDecoderConfig"):
        vtc.inspect(saved(config, tmp_path))
    assert _grid(torch.nn.Linear(1, 1), 14) is None
    vision: Any = SimpleNamespace(tower=torch.nn.Linear(1, 1), blocks=[])
    assert _encoder(SimpleNamespace(vision=vision)) == {"class": "Linear"}  # type: ignore[arg-type]
