# SPDX-License-Identifier: Apache-2.0
"""Questions are read a batch at a time, and one that cannot be read loses nothing but itself."""

from __future__ import annotations

import io
import json
import weakref
from dataclasses import replace

import pytest
from mini_bench import METRIC, PROCESSOR, SETTINGS, Toy, bench, make_image, make_items, predictions
from PIL import Image

from vtc.benchmarks.accuracy import kept_sheet, tables
from vtc.benchmarks.accuracy.batches import Samples
from vtc.benchmarks.metrics import scores as metrics
from vtc.benchmarks.shared.prompts import image_key, make_batches
from vtc.benchmarks.tasks.items import BadItem, Entry, Item, Questions

QUICK = replace(SETTINGS, methods=("random",), keep=(4,))


def test_batches_are_those_of_all_items_at_once():
    items = make_items(3, 4)
    for given in (items, Toy()):
        samples = Samples(PROCESSOR, given, 5, METRIC)
        eager = make_batches(PROCESSOR, list(given), 5)
        assert samples.batches == [batch.indices for batch in eager]
        for number, one in enumerate(eager):
            batch, bad = samples.load(number)
            assert not bad
            assert [i.question for i in batch.items] == [i.question for i in one.items]
            assert batch.image_of == one.image_of
            assert (batch.vision["pixel_values"] == one.vision["pixel_values"]).all()
            assert (batch.text["input_ids"] == one.text["input_ids"]).all()


def test_images_are_made_when_their_batch_is_asked_and_then_let_go():
    task, alive, most = Toy(), weakref.WeakSet(), []

    class Watched(Image.Image):
        __hash__ = object.__hash__

    def made(number):
        image = make_image(number)
        image.__class__ = Watched
        alive.add(image)
        most.append(len(alive))
        return image

    for entry in task.entries:
        object.__setattr__(entry, "load", lambda i=entry.image_id: made(i))
    result = bench(None, task, QUICK)
    assert result["questions"] == 22
    assert len(most) == 11, "each image once"
    assert max(most) <= 3, "two in a batch, and the last one that the task made"


def test_bad_images_are_counted_and_survived(tmp_path):
    bad = bench(tmp_path / "bad", Toy(bad=(0, 4)), QUICK)
    good = bench(tmp_path / "good", Toy(), QUICK)
    assert bad["finished"] and bad["questions"] == 18 and bad["questions_given"] == 22
    assert bad["images"] == 9
    why = {"where": "toy.jsonl:4", "why": "no such image"}
    assert bad["skipped"].count(why) == 2 and len(bad["skipped"]) == 4
    assert good["skipped"] == []

    def answered(folder):
        lines = [json.loads(x) for x in predictions(tmp_path / folder).read_text().splitlines()]
        return {
            (x["configuration"], x["index"]): (x["id"], x["score"], x["prediction"])
            for x in lines[1:]
            if "configuration" in x
        }

    without = {k: v for k, v in answered("good").items() if k[1] % 11 not in (0, 4)}
    assert answered("bad") == without  # all ids, and what they answered, are those of a whole task
    (note,) = tables.notes(bad)
    assert "questions that could not be asked: 4, the first: toy.jsonl:0: no such image" in note
    assert note in tables.markdown(bad)


def test_nothing_that_can_be_read_is_an_error_with_the_reason():
    with pytest.raises(BadItem, match=r"none of the 22 questions .* toy.jsonl:0: no such image"):
        bench(None, Toy(bad=tuple(range(11))))


def encoded(image: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def broken(tmp_path) -> dict[str, object]:
    """Files that Pillow fails on in different ways, some of them only when it decodes."""
    png, jpeg = encoded(make_image(1), "PNG"), encoded(make_image(1), "JPEG")
    return {
        "gone": None,
        "empty": b"",
        "text": b"no image at all",
        "half a PNG": png[: len(png) // 2],
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "PNG with a broken chunk": png[:60] + b"\x00" * 40 + png[100:],
    }


@pytest.mark.parametrize("lazy", [False, True], ids=["decoded by the task", "decoded by us"])
def test_whatever_pillow_raises_is_survived(tmp_path, lazy):
    files = broken(tmp_path)

    def load(name):
        path = tmp_path / name
        image = Image.open(path)
        return image if lazy else image.convert("RGB")

    entries = []
    for name, data in files.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        entries.append(Entry(name, lambda name=name: load(name), "what shape ?", "yes", "k"))
    entries.append(Entry("fine", lambda: make_image(0), "what shape ?", "yes", "k"))
    result = bench(None, Questions("toy", entries, "one-word"), QUICK)
    assert result["questions"] == 1
    assert len(result["skipped"]) == len(files)


@pytest.mark.parametrize("pixels", [2000, 1000], ids=["more than twice", "a little more"])
def test_decompression_bombs_are_survived(monkeypatch, tmp_path, pixels):
    """Pillow raises above twice its limit, and only warns above the limit."""
    make_image(1).save(tmp_path / "big.png")  # 3136 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels if pixels == 1000 else 2000)
    entries = [
        Entry("big", lambda: Image.open(tmp_path / "big.png"), "what shape ?", "yes", "k"),
        Entry("fine", lambda: make_image(0), "what shape ?", "yes", "k"),
    ]
    result = bench(None, Questions("toy", entries, "one-word"), QUICK)
    assert result["questions"] == 1
    assert "DecompressionBomb" in result["skipped"][0]["why"]


def test_an_image_that_the_processor_refuses_is_left_out_of_its_batch(monkeypatch):
    def picky(images=(), **rest):
        if any(image.size == (1, 500) for image in images):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return PROCESSOR(images=images, **rest)

    items = make_items(2, 1)
    items.insert(1, Item(Image.new("RGB", (1, 500)), "what shape ?", "yes", "k"))
    samples = Samples(picky, items, 3, METRIC)
    batch, bad = samples.load(0)
    assert batch.indices == [0, 2]
    (line,) = bad
    assert line["index"] == 1 and "aspect ratio" in line["why"]


def test_a_row_with_too_few_answers_for_the_metric_is_left_out():
    items = make_items(2, 1)
    items.append(Item(make_image(5), "what shape ?", "yes", "k", ("yes",) * 10))
    samples = Samples(PROCESSOR, items, 3, metrics.metric("vqa"))
    batch, bad = samples.load(0)
    assert batch.indices == [2]
    assert "of four or more people, not 1" in bad[0]["why"]


def test_fingerprint_of_a_plain_list_tells_what_is_asked():
    items = make_items(2, 2)
    other = [*items[:-1], Item(items[-1].image, "another ?", "yes", "k")]
    prints = {Samples(PROCESSOR, x, 4, METRIC).fingerprint for x in (items, make_items(2, 2))}
    assert len(prints) == 1
    assert Samples(PROCESSOR, other, 4, METRIC).fingerprint not in prints
    assert Samples(PROCESSOR, items, 4, METRIC).keys[0] == image_key(items[0].image)
    task = Toy()
    assert Samples(PROCESSOR, task, 4, METRIC).fingerprint == task.fingerprint
    assert task.loaded == []  # a task knows its images without decoding them


def test_the_example_is_a_question_that_can_be_shown():
    items = [Item(make_image(0), "is it ?", "yes", "k"), Item(make_image(1), "what ?", "red", "k")]
    assert kept_sheet.example(items) is items[1]
    assert kept_sheet.example(items[:1]) is items[0]
    assert kept_sheet.example(Toy(bad=(0,))).image.tobytes() == make_image(1).tobytes()
    with pytest.raises(BadItem):
        kept_sheet.example(Toy(bad=tuple(range(11))))


def test_problems_of_the_task_are_in_the_result():
    task = Toy()
    task.problems = [("toy.jsonl:3", "no answer")]
    result = bench(None, task, QUICK)
    assert result["problems"] == [{"where": "toy.jsonl:3", "why": "no answer"}]
    assert any("bad rows: 1, the first: toy.jsonl:3: no answer" in x for x in tables.notes(result))
