# SPDX-License-Identifier: Apache-2.0
"""The rendered scenes: deterministic, disjoint splits, answers that follow from the objects."""

import random
from dataclasses import replace

import numpy as np
import pytest

from vtc.benchmarks.metrics.scores import normalize
from vtc.benchmarks.tasks import scenes
from vtc.benchmarks.tasks.items import score
from vtc.benchmarks.tasks.registry import TASKS, Task


@pytest.mark.parametrize("level", ["default", "hard"])
def test_same_seed_same_scene(level):
    first = scenes.make_scene(3, "test", 7, level)
    assert first == scenes.make_scene(3, "test", 7, level)
    assert (np.asarray(scenes.render(first)) == np.asarray(scenes.render(first))).all()
    assert scenes.ask(first, 5) == scenes.ask(first, 5)
    assert first != scenes.make_scene(3, "test", 8, level)


def test_splits_do_not_meet():
    made = [
        {scenes.make_scene(i, split, 0, level).objects for i in range(300)}
        for split in scenes.SPLITS
        for level in ("default", "hard")
    ]
    assert len(set.union(*made)) == 300 * len(made)


def test_objects_stay_apart_and_inside():
    for i in range(50):
        for level, (low, high) in {"default": (1, 3), "hard": (3, 6)}.items():
            scene = scenes.make_scene(i, "val", 0, level)
            assert low <= len(scene.objects) <= high
            assert all(o.r <= o.x <= 336 - o.r and o.r <= o.y <= 336 - o.r for o in scene.objects)
            assert (scenes.coverage(scene).sum(0) <= 1.01).all()


def test_patches_show_the_object():
    for i in range(10):
        scene = scenes.make_scene(i, "test")
        pixels = np.asarray(scenes.render(scene), np.float32).reshape(24, 14, 24, 14, 3)
        pixels = pixels.mean((1, 3)).reshape(576, 3)
        for obj, covered in zip(scene.objects, scenes.patches(scene, 0.99)):
            if obj.digit is None:
                away = np.abs(pixels[covered] - scenes.COLORS[obj.color])
                assert len(covered) >= 1
                assert away.max() < 20


def test_every_kind_is_asked_and_counts_are_right():
    kinds = set()
    for i in range(60):
        scene = scenes.make_scene(i, "val")
        for question, answer, kind in scenes.ask(scene, 12, random.Random(i)):
            kinds.add(kind)
            assert " " not in answer
            if question == "how many objects are there?":
                assert answer == str(len(scene.objects))
            if question.startswith("is there a") and not question.endswith("object?"):
                words = question.rstrip("?").split()[3:]
                found = any(all(w in o.words.split() for w in words) for o in scene.objects)
                assert answer == ("yes" if found else "no")
    assert kinds == set(scenes.KINDS)


def test_captions_tell_scenes_apart():
    captions = {scenes.caption(scenes.make_scene(i, "test")) for i in range(100)}
    assert len(captions) == 100


def test_a_caption_may_name_the_objects_in_any_order():
    scene = next(s for s in map(scenes.make_scene, range(99)) if len(s.objects) > 2)

    def parts(text):
        return text.split(" on a ")[0].split(" and ")

    plain = parts(scenes.caption(scene))
    mixed = {tuple(parts(scenes.caption(scene, random.Random(i)))) for i in range(20)}
    assert len(mixed) > 2 and {frozenset(m) for m in mixed} == {frozenset(plain)}


def test_what_a_scene_does_not_allow_to_ask_is_not_asked():
    """No shape is absent where all are there; what is in the middle is on no side."""
    scene = next(s for s in map(scenes.make_scene, range(99)) if len(s.objects) > 2)
    every = [replace(scene.objects[0], shape=shape) for shape in scenes.SHAPES]
    full = replace(scene, objects=tuple(every))
    drawn = [scenes._exist(full, random.Random(i)) for i in range(60)]
    assert None in drawn
    shapes = {f"{article} {shape}?" for article in ("a", "an") for shape in scenes.SHAPES}
    about = {a for a in filter(None, drawn) if a[0].removeprefix("is there ") in shapes}
    assert about and {answer for _, answer in about} == {"yes"}
    twins = replace(scene, objects=(replace(full.objects[0]), replace(full.objects[0])))
    assert {scenes._size(twins, random.Random(i)) for i in range(20)} == {None}
    middle = replace(scene.objects[0], x=scenes.SIDE / 2, y=scenes.SIDE / 2)
    alone = replace(scene, objects=(middle,))
    assert {scenes._position(alone, random.Random(i)) for i in range(20)} == {None}


def test_tasks_share_one_interface():
    for name in TASKS:
        if name == "easy-vqa":
            pytest.importorskip("easy_vqa")
        task = Task(name, "test", 12, seed=1)
        again = Task(name, "test", 12, seed=1)
        assert len(task) == 12
        assert [i.question for i in task] == [i.question for i in again]
        assert task[0].image is task[1].image
        assert task[0].image.mode == "RGB"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown task"):
        Task("vqav2")
    with pytest.raises(ValueError, match="unknown split"):
        scenes.make_scene(0, "dev")
    with pytest.raises(ValueError, match="unknown level 'easy'; one of default, hard"):
        scenes.make_scene(0, level="easy")


def test_score_normalises():
    assert score("The circle.", "circle")
    assert score("Two", "2")
    assert not score("blue circle", "circle")
    assert normalize(" Yes! ") == "yes"
