# SPDX-License-Identifier: Apache-2.0
"""The embedded tiny models load with stock classes and see their images."""

import shutil

import pytest

from vtc.benchmarks.tasks.base import Task
from vtc.benchmarks.tiny import models
from vtc.benchmarks.tiny.models import ASSETS, load_llava, load_retrieval, make_tokenizer
from vtc.benchmarks.tiny.train import packed_layout


@pytest.fixture(scope="module")
def llava():
    return load_llava()


def test_assets_are_the_published_ones(monkeypatch, tmp_path):
    pinned = (ASSETS / "SHA256SUMS").read_text().splitlines()
    assert sorted(pinned) == sorted(f"{d}  {path}" for path, d in models.digests(ASSETS).items())
    for file in ("config.json", "model.safetensors"):
        copy = shutil.copytree(ASSETS, tmp_path / file)
        text = copy / "tiny-text" / file
        text.write_bytes(text.read_bytes()[:-1] + b"\0")
        monkeypatch.setattr(models, "ASSETS", copy)
        models._verify.cache_clear()
        with pytest.raises(ValueError, match="SHA256SUMS"):
            models._folder(copy, "tiny-text")
    models._verify.cache_clear()


def test_assets_are_small():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 80e6


def test_geometry_is_that_of_llava(llava):
    model, processor = llava
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hm?"}]}],
        add_generation_prompt=True,
    )
    assert prompt.endswith("USER: <image>\nHm? ASSISTANT:")
    image = Task("scenes", n=1)[0].image
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    assert (inputs.input_ids == model.config.image_token_id).sum() == 576
    assert inputs.pixel_values.shape == (1, 3, 336, 336)
    assert model.config.vision_feature_layer == -2
    assert processor.tokenizer.padding_side == "left"
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_any_question_tokenises():
    tokenizer = make_tokenizer()
    ids = tokenizer("USER: <image>\nWhat's the RED dodecahedron? ASSISTANT:").input_ids
    assert tokenizer.decode(ids) == "<s> user : <image> what ' <unk> the red <unk> ? assistant :"


def test_packed_pairs_see_the_image_and_themselves():
    mask, positions = packed_layout(3, 2, 2)
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 1, 1],
    ]
    assert mask.int().tolist() == expected
    assert positions.tolist() == [0, 1, 2, 3, 4, 3, 4]


@pytest.mark.slow
def test_retrieval():
    from vtc.benchmarks.tiny.evaluate import recall

    assert min(recall(load_retrieval(), count=24)) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("task", "least"), [("scenes", 0.8), ("easy-vqa", 0.9)])
def test_answers_need_the_image(llava, task, least):
    """On 48 questions; `python -m vtc.benchmarks.tiny.evaluate` measures on many more."""
    from vtc.benchmarks.tiny.evaluate import accuracy

    items = Task(task, n=48)[:]
    seen, blank = accuracy(*llava, items)["all"], accuracy(*llava, items, blank=True)["all"]
    assert seen >= least
    assert blank <= seen - 0.25
