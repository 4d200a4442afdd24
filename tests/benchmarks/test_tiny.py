# SPDX-License-Identifier: Apache-2.0
"""The embedded tiny models load with stock classes and see their images."""

import re
import shutil

import pytest

from vtc.benchmarks.tasks.registry import Task
from vtc.benchmarks.tiny import models
from vtc.benchmarks.tiny.models import ASSETS, load_llava, load_retrieval, make_tokenizer
from vtc.benchmarks.tiny.train import pairs_layout


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


def test_pairs_see_the_image_and_themselves():
    mask, positions = pairs_layout(3, 2, 2)
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


def test_assets_that_are_not_there_say_what_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tiny-llava is missing; see .*README\.md"):
        load_llava(assets=tmp_path)


def test_configurations_are_those_of_the_assets():
    """Of what `train` makes; the assets were made by it."""
    for made, name in (
        (models.llava_config(), "tiny-llava"),
        (models.llava_next_config(), "tiny-llava-next"),
        (models.text_config(), "tiny-text"),
    ):
        stored = type(made).from_pretrained(ASSETS / name)
        named = ("architectures", "dtype", "transformers_version", "_name_or_path")
        a, b = ({k: v for k, v in c.to_dict().items() if k not in named} for c in (made, stored))
        assert a == b, name


@pytest.mark.slow
def test_figures_are_printed(monkeypatch, capsys):
    from vtc.benchmarks.tiny import evaluate

    monkeypatch.setattr(evaluate, "load_retrieval", lambda device, assets: None)
    monkeypatch.setattr(evaluate, "recall", lambda retrieval: (0.5, 0.25))
    options = ["--n", "1", "--blank", "1", "--tasks", "scenes", "--next-tasks", "small-text"]
    monkeypatch.setattr("sys.argv", ["evaluate", *options])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"assets: \d\d\.\d MB", lines[0])
    assert lines[1].endswith("image->text 50.0%, text->image 25.0%")
    assert re.match(r"scenes: \d+\.\d% of 1 questions, blank image \d+\.\d% of 1 \(", lines[2])
    shown = [x.split(":")[0] for x in lines if x.startswith("LLaVA-NeXT")]
    assert shown == [f"LLaVA-NeXT, small-text, {view}" for view in evaluate.VIEWS]


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
