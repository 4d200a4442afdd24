# SPDX-License-Identifier: Apache-2.0
"""``vtc overlay``: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoking import invoke
from PIL import Image

from vtc import cli
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture, and a mini model instead of the embedded one."""
    model = mini_llava()
    monkeypatch.setattr(cli.overlay, "load", lambda *_: (model, mini_processor(model)))
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(noise).save(path)
    return path


def run(photo: Path, *args: Any) -> Any:
    return invoke("overlay", str(photo), *map(str, args))


def test_one_picture(photo: Path, tmp_path: Path):
    file = tmp_path / "new" / "kept.png"
    done = run(photo, "--question", "what shape ?", "--keep", 4, "--out", file, "--size", 200)
    assert done.exit_code == 0, done.output
    assert "visual tokens: 16 -> 4" in done.stdout and "before the LLM: 4" in done.stdout
    assert "answer:" in done.stdout and "kept.png" in done.stdout.replace("\n", "")
    assert Image.open(file).size == (200, 133)


def test_several_kinds_and_json(photo: Path, tmp_path: Path):
    file = tmp_path / "x.png"
    args = ("--method", "fastv", "--keep", "0.25", "--kind", "kept,groups,scores", "--json")
    done = run(photo, *args, "--out", file)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["files"] == [str(tmp_path / f"x-{k}.png") for k in ("kept", "groups", "scores")]
    assert all(Path(f).exists() for f in result["files"]) and not file.exists()
    assert result["stages"] == [["LLM layer 2", 4]] and result["final_tokens"] == 4


def test_layers(photo: Path, tmp_path: Path):
    pictures = {}
    for name, args in {
        "end": [],
        "number": ["--layer", 3],
        "label": ["--layer", "LLM layer 2"],
        "first": ["--layer", 0],
        "all": ["--all-layers"],
    }.items():
        file = tmp_path / f"{name}.png"
        done = run(photo, "--method", "fastv", "--keep", 3, "--out", file, *args)
        assert done.exit_code == 0, done.output
        pictures[name] = file.read_bytes()
    assert pictures["end"] == pictures["number"] == pictures["label"]
    assert len(set(pictures.values())) == 3


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--kind", "heat"], "kind is one of"),
        (["--view", "left"], "view is one of"),
        (["--kind", ","], "at least one --kind"),
        (["--out", "x.jpg"], 'ends in ".png"'),
        (["--layer", "2", "--all-layers"], "not both"),
        (["--layer", "9"], "no LLM layer 9"),
        (["--layer", "lunch"], "the steps are"),
        (["--method", "fastvee"], "did you mean fastv"),
        (["--method", "divprune", "--kind", "scores"], "ranks tokens by"),
        (["--keep", "7.5"], "share of tokens"),
        (["--keep", "1", "--all-layers"], "no steps to draw"),
    ],
)
def test_mistakes(photo: Path, tmp_path: Path, args: list[str], problem: str):
    args = args if "--out" in args else [*args, "--out", str(tmp_path / "x.png")]
    done = run(photo, *args)
    assert done.exit_code == 2, done.output
    assert problem in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.png")), "nothing is written"


def test_files_that_are_no_images(photo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    text, broken = tmp_path / "text.png", tmp_path / "broken.png"
    text.write_text("no picture")
    Image.open(photo).save(broken)
    broken.write_bytes(broken.read_bytes()[:200])
    for path, problem in (
        (tmp_path / "none.png", "no file"),
        (text, "not an image"),
        (broken, "cannot read"),
        (tmp_path, "cannot read"),
    ):
        done = run(path)
        assert done.exit_code == 2 and problem in done.stderr and done.stderr.count("\n") == 1
    out = tmp_path / "out.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # warns above, refuses twice as many
    done = run(photo, "--keep", 4, "--out", out)
    assert done.exit_code == 0 and "90 x 60 pixels" in done.stderr and out.exists()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    done = run(photo)
    assert done.exit_code == 2 and "too many pixels" in done.stderr


def test_a_model_that_is_not_there(tmp_path: Path):
    path = tmp_path / "x.png"
    Image.new("RGB", (9, 9)).save(path)
    done = run(path, "--model", tmp_path / "nothing")
    assert done.exit_code == 2 and "cannot load" in done.stderr and done.stderr.count("\n") == 1


def test_pictures_lie_as_the_camera_was_held(photo: Path, tmp_path: Path):
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.open(photo).save(turned, exif=exif)
    out = tmp_path / "out.png"
    assert run(turned, "--keep", 4, "--out", out, "--size", 120).exit_code == 0
    assert Image.open(out).size == (80, 120)
