# SPDX-License-Identifier: Apache-2.0
"""The VLMEvalKit script, with a stand-in for VLMEvalKit: it is not on PyPI.

The stand-in does what the real ``run.py`` and ``vlmeval/inference.py`` do with a model: look it up,
make it, call ``set_dump_image`` and ``generate``.
"""

from __future__ import annotations

import json
import sys

import pytest
from chats import made, picture

import vtc
from vtc.benchmarks.harnesses import vlmevalkit
from vtc.benchmarks.harnesses.chat import user_turn
from vtc.benchmarks.harnesses.model_args import LoadOptions
from vtc.methods.visionzip import VisionZip

QUESTIONS = ["what colour ?", "is there a red circle ?", "what shape is a square ?", "yes or no ?"]

RUN = """
import argparse, copy, json, os
from vlmeval.config import supported_VLM

RANK = int(os.environ.get("RANK", 0))

def build_model_from_config(cfg, model_name):
    import vlmeval.vlm
    config = copy.deepcopy(cfg[model_name])
    cls_name = config.pop("class")
    if hasattr(vlmeval.vlm, cls_name):
        return getattr(vlmeval.vlm, cls_name)(**config)
    raise ValueError(f"Class {cls_name} is not supported in `vlmeval.vlm`")

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=str, nargs="+")
    parser.add_argument("--model", type=str, nargs="+")
    parser.add_argument("--config", type=str)
    parser.add_argument("--work-dir", type=str, default="./outputs")
    args = parser.parse_args()
    cfg = None
    if args.config is not None:
        assert args.data is None and args.model is None
        cfg = json.load(open(args.config))
        args.model, args.data = list(cfg["model"]), list(cfg["data"])
    for k, v in supported_VLM.items():
        if hasattr(v, "keywords") and "retry" in v.keywords:
            v.keywords["retry"] = 1
    for name in args.model:
        model = supported_VLM[name]() if cfg is None else build_model_from_config(cfg["model"], name)
        assert not getattr(model, "is_api", False)
        for data in args.data:
            model.set_dump_image(print)
            messages = json.load(open(data))
            found = [model.generate(message=m, dataset="data") for m in messages]
            os.makedirs(args.work_dir, exist_ok=True)
            json.dump(found, open(os.path.join(args.work_dir, name + ".json"), "w"))
"""

BASE = """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset):
        return False

    def set_dump_image(self, func):
        self.dump_image_func = func

    def generate_inner(self, message, dataset=None):
        raise NotImplementedError

    def generate(self, message, dataset=None):
        for item in message:
            assert item["type"] in self.allowed_types, item["type"]
        return self.generate_inner(message, dataset)
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder like a clone of VLMEvalKit, on sys.path as after ``pip install -e``; a mini
    model."""
    root = tmp_path / "VLMEvalKit"
    (root / "vlmeval" / "vlm").mkdir(parents=True)
    (root / "run.py").write_text(RUN)
    (root / "vlmeval" / "__init__.py").write_text("")
    (root / "vlmeval" / "config.py").write_text("supported_VLM = {}\n")
    (root / "vlmeval" / "vlm" / "__init__.py").write_text("from .base import BaseModel\n")
    (root / "vlmeval" / "vlm" / "base.py").write_text(BASE)
    monkeypatch.syspath_prepend(root)

    def load(self, device):
        stock = made()
        return stock.model, stock.processor

    monkeypatch.setattr(LoadOptions, "load", load)
    yield root
    for name in [n for n in sys.modules if n.split(".")[0] == "vlmeval"]:
        del sys.modules[name]


@pytest.fixture
def data(tmp_path):
    """Questions about files."""
    messages = []
    for i, question in enumerate(QUESTIONS):
        picture(i).save(tmp_path / f"{i}.png")
        image = {"type": "image", "value": str(tmp_path / f"{i}.png")}
        messages.append([image, {"type": "text", "value": question}])
    (tmp_path / "data.json").write_text(json.dumps(messages))
    return tmp_path / "data.json"


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["vlmevalkit", *map(str, arguments)])
    vlmevalkit.main()


def answers(**parameters) -> list[str]:
    """Answers of the mini model with VisionZip."""
    model = made(VisionZip(**parameters) if parameters else None)
    asked = [user_turn([picture(i)], question) for i, question in enumerate(QUESTIONS)]
    return [a.text for a in model.answer(asked, max_new_tokens=6, do_sample=False)]


MODEL = "pretrained=tiny-llava,method=visionzip,keep_tokens=4,max_new_tokens=6"


def test_a_model_from_the_command_line(clone, data, tmp_path, monkeypatch, capsys):
    given = ["--data", data, "--work-dir", tmp_path / "out", "--model-args"]
    run(monkeypatch, *given, MODEL)
    name = "vtc_pretrained=tiny-llava_method=visionzip_keep_tokens=4_max_new_tokens=6"
    found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert found == answers(keep_tokens=4)
    said = capsys.readouterr().out
    assert "visionzip(keep_tokens=4)" in said and "4 prompts" in said
    assert "  final_tokens 4\n" in said and "  visual_tokens 16\n" in said

    run(monkeypatch, *given, "pretrained=tiny-llava,max_new_tokens=6", "--model", "stock")
    assert json.loads((tmp_path / "out" / "stock.json").read_text()) == answers() != found


def test_models_from_a_configuration(clone, data, tmp_path, monkeypatch):
    how = {
        "pretrained": "tiny-llava",
        "method": "visionzip",
        "keep_tokens": 4,
        "max_new_tokens": 6,
    }
    config = {"model": {"mine": {"class": "VTC", **how}}, "data": {str(data): {}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(monkeypatch, "--config", tmp_path / "config.json", "--work-dir", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "mine.json").read_text()) == answers(keep_tokens=4)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--data", "x"], "give --model-args, or --config"),
        (["--data", "x", "--model-args", "method=fastv"], "pretrained is missing"),
        (["--data", "x", "--model-args", "pretrained=y,method=fastv,r=3"], 'unknown argument "r"'),
        (["--data", "x", "--model-args", MODEL], "package vlmeval is missing; get it as a clone"),
    ],
)
def test_mistakes_are_said_before_anything_runs(arguments, said, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *arguments)
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_package_without_its_script(clone, data, monkeypatch, capsys):
    (clone / "run.py").unlink()
    with pytest.raises(SystemExit):
        run(monkeypatch, "--data", data, "--model-args", MODEL)
    assert "run.py is missing" in capsys.readouterr().err


def test_lists_hold_commas(clone, data, tmp_path, monkeypatch):
    """And a method that the model cannot take is refused as everywhere."""
    args = "pretrained=tiny-llava,method=sparsevlm,ratios=[0.5,0.25,0.1],max_new_tokens=1"
    run(monkeypatch, "--data", data, "--work-dir", tmp_path, "--model-args", args, "--model", "x")
    assert len(json.loads((tmp_path / "x.json").read_text())) == 4
    with pytest.raises(vtc.UnsupportedError, match="video"):
        run(monkeypatch, "--data", data, "--model-args", "pretrained=tiny-llava,method=evs")
