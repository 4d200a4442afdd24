# SPDX-License-Identifier: Apache-2.0
"""Small signs: deterministic pictures, answers that follow from them, a model that needs crops."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from vtc.benchmarks.tasks import scenes, small_text
from vtc.benchmarks.tasks.registry import Task


def test_same_seed_same_picture():
    first = small_text.make_picture(3, "test", 7)
    assert first == small_text.make_picture(3, "test", 7)
    image = small_text.render(first)
    assert image.size == (first.width, first.height) and image.mode == "RGB"
    assert (np.asarray(image) == np.asarray(small_text.render(first))).all()
    assert small_text.ask(first, 5) == small_text.ask(first, 5)
    assert first != small_text.make_picture(3, "test", 8)
    with pytest.raises(ValueError, match="unknown split"):
        small_text.make_picture(0, "dev")


def test_splits_do_not_meet():
    made = [
        {small_text.make_picture(i, split, 0).objects for i in range(200)}
        for split in scenes.SPLITS
    ]
    assert len(set.union(*made)) == 600


def test_signs_are_small_apart_and_inside():
    sizes = set()
    for i in range(200):
        picture = small_text.make_picture(i, "val")
        sizes.add((picture.width, picture.height))
        assert 1 <= len(small_text.signs(picture)) <= 2 <= len(picture.objects) <= 5
        assert len({o.color for o in picture.objects}) == len(picture.objects)
        for o in picture.objects:
            assert o.r <= o.x <= picture.width - o.r and o.r <= o.y <= picture.height - o.r
            assert o.r <= 18
    assert sizes == set(small_text.SIZES)


def test_answers_follow_from_the_signs():
    kinds = set()
    for i in range(80):
        picture = small_text.make_picture(i, "val")
        for question, answer, kind in small_text.ask(picture, 8, random.Random(i)):
            kinds.add(kind)
            words = question.rstrip("?").split()
            if kind == "place":
                shown = [str(small_text.places(picture)[question[:-1].split("the ")[1]].digit)]
            else:
                said = [w for w in words if w in scenes.COLORS or w in scenes.SHAPES]
                shown = [
                    str(o.digit) for o in picture.objects if all(w in o.words.split() for w in said)
                ]
            assert shown == [answer]
    assert kinds == set(small_text.KINDS)


def test_places_are_where_they_say():
    for i in range(80):
        picture = small_text.make_picture(i, "val")
        for place, sign in small_text.places(picture).items():
            assert ("left" in place) <= (sign.x < picture.width / 2)
            assert ("right" in place) <= (sign.x > picture.width / 2)
            assert ("top" in place) <= (sign.y < picture.height / 2)
            assert ("bottom" in place) <= (sign.y > picture.height / 2)


# ---------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def llava_next():
    from vtc.benchmarks.tiny.models import load_llava_next

    return load_llava_next()


def test_tower_is_that_of_the_tiny_llava(llava_next):
    from vtc.benchmarks.tiny.models import load_llava

    ours = llava_next[0].model.vision_tower.state_dict()
    theirs = load_llava()[0].model.vision_tower.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name.endswith("position_embeddings"):
            assert value.shape == (1, 65, 384)
        else:
            assert torch.equal(value, theirs[name])


@pytest.mark.parametrize(("size", "views", "tokens"), [((336, 224), 7, 464), ((330, 105), 4, 264)])
def test_stock_forward(llava_next, size, views, tokens):
    model, processor = llava_next
    inputs = processor(
        text=["USER: <image>\nHm? ASSISTANT:"], images=[Image.new("RGB", size)], return_tensors="pt"
    )
    assert inputs.pixel_values.shape == (1, views, 3, 112, 112)
    assert (inputs.input_ids == model.config.image_token_id).sum() == tokens
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.slow
def test_answers_need_the_crops(llava_next):
    """On 40 questions; `python -m vtc.benchmarks.tiny.evaluate --tasks` measures on many more."""
    from vtc.benchmarks.tiny.evaluate import accuracy_next

    items = Task("small-text", n=40)[:]
    seen, small = (accuracy_next(*llava_next, items, v)["all"] for v in ("crops", "thumbnail"))
    assert seen >= 0.6
    assert small <= seen - 0.2
