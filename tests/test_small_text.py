# SPDX-License-Identifier: Apache-2.0
"""Small signs: deterministic pictures, answers that follow from them, a model that needs crops."""

import random

import numpy as np
import pytest

from vtc.benchmarks.tasks import scenes, small_text


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
        assert 3 <= len(small_text.signs(picture)) <= 5
        assert len({o.color for o in picture.objects}) == len(picture.objects)
        for o in picture.objects:
            assert o.r <= o.x <= picture.width - o.r and o.r <= o.y <= picture.height - o.r
            assert o.r <= 17
    assert sizes == set(small_text.SIZES)


def test_answers_follow_from_the_signs():
    kinds = set()
    for i in range(80):
        picture = small_text.make_picture(i, "val")
        for question, answer, kind in small_text.ask(picture, 8, random.Random(i)):
            kinds.add(kind)
            words = question.rstrip("?").split()
            digits = [w for w in words if w.isdigit()]
            if kind == "color":
                shown = [o.color for o in picture.objects if o.digit == int(digits[0])]
            elif kind == "place":
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
