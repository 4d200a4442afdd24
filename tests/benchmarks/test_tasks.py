# SPDX-License-Identifier: Apache-2.0
"""Tasks: named ones, your own files with all that can be wrong in them, local copies of hub
sets."""

import importlib.util
import io
import json
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from vtc.benchmarks.metrics.scores import METRICS, RECALL
from vtc.benchmarks.tasks import easy_vqa, hub
from vtc.benchmarks.tasks import rows as rows_of
from vtc.benchmarks.tasks.items import BadItem, Entry, Item, Questions
from vtc.benchmarks.tasks.parquet import ParquetTable
from vtc.benchmarks.tasks.registry import TASKS, Task, open_task


def picture(tone, size=(8, 6), **options):
    """The bytes of a PNG of one tone."""
    data = io.BytesIO()
    Image.new("RGB", size, (tone, tone, tone)).save(data, "PNG", **options)
    return data.getvalue()


def tone(item):
    return item.image.getpixel((0, 0))[0]


def write(folder, *rows, name="mine.jsonl"):
    """A file of lines: objects, strings or bytes as they are; and the images a.png, b.png,
    c.png."""
    for i, letter in enumerate("abc"):
        (folder / f"{letter}.png").write_bytes(picture(10 * i))
    lines = [json.dumps(row).encode() if isinstance(row, dict) else row for row in rows]
    (folder / name).write_bytes(
        b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines)
    )
    return folder / name


def row(image="a.png", question="Which?", answer="one", **more):
    return {"image": image, "question": question, "answer": answer, **more}


# ------------------------------------------------------------------------------- named tasks


def test_an_item_has_all_its_answers():
    item = Item(Image.new("RGB", (2, 2)), "Which?", "one", "")
    assert item.answers == ("one",) and item.id == ""
    item = Item(item.image, "Which?", "one", "", ("one", "1"), "7")
    assert item.answers == ("one", "1") and item.answer == "one"


@pytest.mark.parametrize("name", list(TASKS))
def test_named_tasks(name):
    task = open_task(name, n=12, seed=3)
    old = Task(name, n=12, seed=3)
    assert task.name == name and task.metric in METRICS and task.problems == []
    asked = [(i.question, i.answer, i.kind) for i in task[:3]]
    assert asked == [(i.question, i.answer, i.kind) for i in old[:3]]
    ids = [item.id for item in task.entries]
    assert len(set(ids)) == len(ids) == 12 and all(ids)
    keys = task.image_keys()
    assert len(keys) == 12 and 1 < len(set(keys)) < 12
    same = keys[0] == keys[1]
    assert (task[0].image.tobytes() == task[1].image.tobytes()) == same
    assert task.fingerprint == old.fingerprint == open_task(name, n=12, seed=3).fingerprint
    others = [open_task(name, n=12, seed=4), open_task(name, n=11, seed=3)]
    assert task.fingerprint not in [t.fingerprint for t in others]


def test_fingerprint_is_of_what_is_asked():
    def made(question="Which?", answers=("one",), id="1", name="t", seed=0):
        return Questions(
            name, [Entry(0, None, question, answers[0], "k", answers, id)], "vqa", seed
        )

    first = made().fingerprint
    assert made().fingerprint == first
    for change in (
        {"question": "What?"},
        {"answers": ("one", "1")},
        {"id": "2"},
        {"name": "u"},
        {"seed": 1},
    ):
        assert made(**change).fingerprint != first, change


def test_easy_vqa_has_two_splits_and_so_many_questions():
    pytest.importorskip("easy_vqa")
    assert len(open_task("easy-vqa", n=2, split="train")) == 2
    assert len(easy_vqa.load_split("train")[0]) > len(easy_vqa.load_split("test")[0])
    with pytest.raises(ValueError, match="'train' and 'test', not 'val'"):
        easy_vqa.load_split("val")
    assert len(easy_vqa.entries("test", None, 0)) > 9000
    with pytest.raises(
        ValueError, match=r"easy-VQA test has only \d{4} such questions, 9999 asked"
    ):
        easy_vqa.entries("test", 9999, 0)


def test_easy_vqa_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match="'easy-vqa' needs: pip install easy-vqa"):
        easy_vqa.load_split("test")


def test_options_of_open_task():
    assert open_task("scenes", n=2, metric="anls").metric == "anls"
    assert open_task("scenes", n=2, split="val")[0].question
    for arguments, options, why in [
        (("scenes",), {"metric": "bleu"}, "unknown metric 'bleu'"),
        (("scenes",), {"data_dir": "."}, "scenes takes no data_dir"),
        (("scenes",), {"suffix": "?"}, "scenes takes no suffix"),
        (("nothing",), {}, "neither a name .*scenes.*textvqa.* nor a .jsonl, .parquet file"),
        (("mine.csv",), {}, "unknown task 'mine.csv'"),
        (("no/such.jsonl",), {}, "no/such.jsonl: no such file"),
    ]:
        with pytest.raises(ValueError, match=why):
            open_task(*arguments, n=2, **options)


# ------------------------------------------------------------------------------- lines of JSON


def test_a_good_file(tmp_path):
    path = write(
        tmp_path,
        row(),
        row("b.png", "How many?", "2", id="q2", kind="count", metric="anls"),
        "",
        {"image": str(tmp_path / "b.png"), "question": "Who?", "answers": ["me", "I"], "id": 17},
        row("./a.png", source="columns that nobody knows are left alone"),
    )
    task = open_task(path)
    assert (task.name, task.metric, task.problems) == ("mine", "anls", [])
    assert [(i.question, i.answer, i.answers, i.kind, i.id) for i in task] == [
        ("Which?", "one", ("one",), "question", "1"),
        ("How many?", "2", ("2",), "count", "q2"),
        ("Who?", "me", ("me", "I"), "question", "17"),
        ("Which?", "one", ("one",), "question", "5"),
    ]
    assert [tone(item) for item in task] == [0, 10, 10, 0]
    assert task[0].image.mode == "RGB" and task[0].image.size == (8, 6)
    keys = task.image_keys()
    assert keys[0] == keys[3] == "a.png"  # the same on any machine
    assert open_task(str(path)).fingerprint == task.fingerprint
    other = open_task(path, metric="exact-match")  # wins over what a row names
    assert other.metric == "exact-match" and other.problems == []
    assert open_task(write(tmp_path, row())).metric == "one-word"


BAD = [
    ({"question": "Which?", "answer": "one"}, '"image" is missing'),
    (row(image=3), '"image" must be a string, not 3'),
    (row("d.png"), r"there is no image .*d\.png"),
    (row("."), "there is no image"),
    (row("a.png\0"), "there is no image"),
    (row("../a.png"), "lies outside the folder of mine.jsonl; write its absolute path"),
    (row("x/../../a.png"), "lies outside the folder"),
    (row("https://example.org/a.png"), "there is no image"),
    ({"image": "a.png", "answer": "one"}, '"question" is missing'),
    (row(question=["Which?"]), '"question" must be a string'),
    (row(question=" \n"), '"question" is empty'),
    (row(question="\ud800"), "surrogates not allowed"),
    ({"image": "a.png", "question": "Which?"}, 'either "answer" or "answers"; both are missing'),
    (row(answers=["one"]), "both are there"),
    (row(answer=1), '"answer" must be a string, not 1'),
    (row(answer=""), '"answer" is empty'),
    (row(answer=None, answers=[]), '"answers" must be a list of strings'),
    (row(answer=None, answers="one"), '"answers" must be a list of strings'),
    (row(answer=None, answers=["one", ""]), '"answers" is empty'),
    (row(answer=None, answers=["one", 2]), '"answers" must be a string, not 2'),
    (row(kind=3), '"kind" must be a string'),
    (row(id=1.5), '"id" must be a string or a whole number, not 1.5'),
    (row(id=""), '"id" must be'),
    (row(id="first"), "the id 'first' is that of row 1 already"),
    (row(metric="bleu"), "unknown metric 'bleu'; one of one-word"),
    (row(metric="anls"), "one file has one metric: 'exact-match' above, 'anls' here"),
    ("{", "not JSON, one object a line: .*, column "),
    ('{"image": "a.png",}', "not JSON"),
    ("[1, 2]", r"must be an object with fields, not \[1, 2\]"),
    ("[" * 200000, "nested too deeply|not JSON"),
    (b'{"image": "\xff"}', "not UTF-8 at byte 12 of the line"),
]


def test_every_bad_row_is_named_and_the_others_are_asked(tmp_path):
    rows = [row(id="first", metric="exact-match")]
    for bad, _ in BAD:
        rows += [bad, row()]
    task = open_task(write(tmp_path, *rows))
    assert len(task) == len(BAD) + 1 and len({i.id for i in task}) == len(task)
    assert len(task.problems) == len(BAD)
    for number, (where, why), (_, expected) in zip(range(2, 999, 2), task.problems, BAD):
        assert where == f"mine.jsonl:{number}"
        assert re.search(expected, why), (where, why, expected)


def test_references_that_do_not_fit_the_metric_are_bad_rows(tmp_path):
    path = write(tmp_path, row(answer="yes"), row(answer="maybe"), row(answer="No"))
    task = open_task(path, metric="pope")
    assert [i.answer for i in task] == ["yes", "No"]
    assert task.problems == [("mine.jsonl:2", 'the answer must be "yes" or "no", not \'maybe\'')]
    with pytest.raises(
        ValueError, match=r"no row can be asked. mine.jsonl:1: .*four or more people"
    ):
        open_task(path, metric="vqa")


def test_a_file_without_a_good_row(tmp_path):
    path = write(tmp_path, "{", row("no.png"), row(answer=""), row(question=""))
    with pytest.raises(ValueError) as error:
        open_task(path)
    message = str(error.value)
    assert len(re.findall(r"mine.jsonl:\d", message)) == 3 and "mine.jsonl:4" not in message
    for text in ("mine.jsonl:1: not JSON", "mine.jsonl:2: there is no image", ':3: "answer" is'):
        assert text in message
    with pytest.raises(ValueError, match=r"mine.jsonl: no row can be asked. It is empty"):
        open_task(write(tmp_path, ""))
    utf16 = tmp_path / "wide.jsonl"
    utf16.write_text(json.dumps(row()), encoding="utf-16")
    with pytest.raises(ValueError, match="not UTF-8"):
        open_task(utf16)


def test_a_byte_order_mark_and_carriage_returns_are_read(tmp_path):
    line = json.dumps(row()).encode()
    path = write(tmp_path, b"\xef\xbb\xbf" + line + b"\r", line)
    assert len(open_task(path)) == 2


def test_a_sample_is_drawn_by_seed(tmp_path):
    path = write(tmp_path, *[row(id=str(i)) for i in range(30)])

    def ids(**options):
        return [item.id for item in open_task(path, **options)]

    everything = [str(i) for i in range(30)]
    assert ids() == ids(n=30) == ids(n=99) == everything
    first = ids(n=10)
    assert first == ids(n=10) and len(set(first)) == 10
    assert sorted(first, key=int) == first != everything[:10]
    assert first != ids(n=10, seed=1)


# ------------------------------------------------------------------------------------ images


def test_a_broken_image_is_named_and_the_others_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # importing lmms_eval sets it
    path = write(tmp_path, row(), row("bad.png"), row("short.png"), row("gone.png"), row("b.png"))
    (tmp_path / "bad.png").write_text("not an image")
    (tmp_path / "short.png").write_bytes(picture(1, (99, 99))[:80])
    (tmp_path / "gone.png").write_bytes(picture(1))
    task = open_task(path)
    assert task.problems == []  # nothing is decoded on opening
    (tmp_path / "gone.png").unlink()
    for i, name in ((1, "bad.png"), (2, "short.png"), (3, "gone.png")):
        with pytest.raises(BadItem, match=rf"mine.jsonl:{i + 1}: cannot read .*{name} as an image"):
            task[i]
    assert tone(task[0]) == 0 and tone(task[4]) == 10


def test_a_decompression_bomb_is_a_bad_item(tmp_path, monkeypatch):
    limit = Image.MAX_IMAGE_PIXELS
    task = open_task(write(tmp_path, row()))
    assert limit == Image.MAX_IMAGE_PIXELS is not None  # left as Pillow has it
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadItem, match=r"mine.jsonl:1: cannot read .*a.png.*decompression bomb"):
        task[0]


def test_images_come_upright_and_in_rgb(tmp_path):
    path = write(tmp_path, row("turned.png"), row("gray.png"), row("clear.png"))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (tmp_path / "turned.png").write_bytes(picture(9, (8, 6), exif=exif))
    Image.new("L", (4, 4), 77).save(tmp_path / "gray.png")
    Image.new("RGBA", (4, 4), (5, 6, 7, 0)).save(tmp_path / "clear.png")
    items = list(open_task(path))
    assert items[0].image.size == (6, 8)
    assert [i.image.mode for i in items] == ["RGB"] * 3
    assert items[1].image.getpixel((0, 0)) == (77, 77, 77)


def test_a_link_inside_the_folder_is_followed(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    (tmp_path / "far" / "z.png").write_bytes(picture(50))
    os.symlink(tmp_path / "far", tmp_path / "near" / "images")
    task = open_task(write(tmp_path / "near", row("images/z.png"), row("..a.png")))
    assert tone(task[0]) == 50
    assert "there is no image" in task.problems[0][1]  # a name that only looks like the way out


# -------------------------------------------------------------------------------- image folder


def test_an_image_folder(tmp_path):
    lines = [
        {"file_name": "a.png", "question": "Which?", "answer": "one"},
        {"file_name": "sub/d.png", "question": "Which?", "answers": ["two", "2"], "metric": "anls"},
        {"image": "a.png", "question": "Which?", "answer": "one"},
    ]
    write(tmp_path, *lines, name="metadata.jsonl")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.png").write_bytes(picture(99))
    task = open_task(tmp_path)
    assert (task.name, task.metric) == (tmp_path.name, "anls")
    assert [tone(i) for i in task] == [0, 99] and task[1].answers == ("two", "2")
    assert task.problems == [("metadata.jsonl:3", '"file_name" is missing')]


def test_an_image_folder_reads_as_datasets_reads_it(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = [{"file_name": f"{x}.png", "question": "Which?", "answer": x} for x in "cab"]
    write(folder, *lines, name="metadata.jsonl")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    theirs = {r["answer"]: np.asarray(r["image"].convert("RGB")) for r in theirs}
    task = open_task(folder)
    assert len(task) == len(theirs) == 3
    assert all((theirs[i.answer] == np.asarray(i.image)).all() for i in task)


def test_a_folder_without_questions(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.png").write_bytes(picture(1))
    with pytest.raises(ValueError, match=r"no metadata.jsonl, .* is for vtc classify"):
        open_task(tmp_path)


# ------------------------------------------------------------------------------------- Parquet


@pytest.fixture
def table(tmp_path):
    """Writes a table of columns, with images a.png ... beside it."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def made(name="mine.parquet", groups=2, **columns):
        write(tmp_path)
        pq.write_table(pa.table(columns), tmp_path / name, row_group_size=groups)
        return tmp_path / name

    return made


def test_parquet_with_paths(table):
    path = table(
        image=["a.png", "b.png", "no.png", "a.png"],
        question=["Which?", "How many?", "Which?", None],
        answers=[["one"], ["2", "two"], ["x"], ["y"]],
        id=[None, "q", "r", "s"],
        kind=["k", None, None, None],
        metric=["anls"] * 4,
    )
    task = open_task(path)
    assert task.metric == "anls" and [tone(i) for i in task] == [0, 10]
    assert [(i.id, i.kind, i.answers) for i in task] == [
        ("1", "k", ("one",)),
        ("q", "question", ("2", "two")),
    ]
    assert [where for where, _ in task.problems] == ["mine.parquet:3", "mine.parquet:4"]
    assert "there is no image" in task.problems[0][1] and task.image_keys() == ["a.png", "b.png"]


def test_parquet_with_text_that_is_not_utf8(table):
    pa = pytest.importorskip("pyarrow")
    asked = pa.array([b"Which?", b"\xff\xfe", b"How many?"], pa.binary()).view(pa.string())
    task = open_task(table(image=["a.png"] * 3, question=asked, answers=[["x"]] * 3))
    assert [item.question for item in task] == ["Which?", "How many?"]
    ((where, why),) = task.problems
    assert where == "mine.parquet:2" and why.startswith("not UTF-8: 'utf-8' codec can't decode")


def as_bytes(data):
    return data


def as_struct(data):
    return {"bytes": data, "path": None}


@pytest.mark.parametrize("form", [as_bytes, as_struct])
def test_parquet_with_bytes(table, form):
    data = [picture(0), picture(10), picture(0), b"not an image", None, picture(20)]
    path = table(
        image=[form(d) for d in data],
        question=[f"Which {i}?" for i in range(6)],
        answer=["x"] * 6,
    )
    task = open_task(path)
    assert len(task) == 6 and task.problems == []
    assert [tone(task[i]) for i in (5, 0, 2, 1)] == [20, 0, 0, 10]
    with pytest.raises(BadItem, match=r"mine.parquet:4: cannot read its bytes as an image"):
        task[3]
    with pytest.raises(BadItem, match=r"mine.parquet:5: there is no image"):
        task[4]
    keys = task.image_keys()
    assert keys[0] == keys[2] and len(set(keys)) == 5
    sampled = open_task(path, n=3)
    assert sampled.image_keys() == [keys[int(i.id) - 1] for i in sampled.entries]


def test_parquet_structs_may_hold_paths(table):
    path = table(
        image=[{"bytes": None, "path": "b.png"}, {"bytes": None, "path": "no.png"}],
        question=["Which?"] * 2,
        answer=["x"] * 2,
    )
    task = open_task(path)
    assert tone(task[0]) == 10
    with pytest.raises(BadItem, match=r"mine.parquet:2: there is no image .*no.png"):
        task[1]
    assert len(task.image_keys()) == 2


def test_parquet_reads_no_images_before_they_are_wanted(table, monkeypatch):
    path = table(image=[picture(i) for i in range(6)], question=["?"] * 6, answer=["x"] * 6)
    read = []
    monkeypatch.setattr(ParquetTable, "image", lambda self, n, source: read.append(n) or picture(n))
    task = open_task(path)
    assert read == []
    assert tone(task[2]) == 3 and read == [3]


def test_parquet_that_datasets_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (4, 4), (i, i, i)) for i in (3, 4, 3)]
    made = datasets.Dataset.from_dict(
        {"image": images, "question": ["Which?"] * 3, "answers": [["x", "y"]] * 3}
    )
    made.to_parquet(tmp_path / "theirs.parquet")
    task = open_task(tmp_path / "theirs.parquet")
    assert [tone(i) for i in task] == [3, 4, 3] and task[0].answers == ("x", "y")
    first, second, third = task.image_keys()
    assert first == third != second


def test_parquet_files_that_are_none(table, tmp_path, monkeypatch):
    (tmp_path / "text.parquet").write_text("image,question")
    with pytest.raises(ValueError, match=r"text.parquet: cannot be read as a Parquet file"):
        open_task(tmp_path / "text.parquet")
    for path in (
        table("none.parquet", question=["Which?"], answer=["x"]),
        table("wrong.parquet", image=[3], question=["Which?"], answer=["x"]),
    ):
        with pytest.raises(
            ValueError, match=r'needs a column "image" of paths.* question \(string'
        ):
            open_task(path)
    path = table("empty.parquet", image=["a.png"], question=["Which?"])
    with pytest.raises(ValueError, match=r'empty.parquet:1: .*either "answer" or "answers"'):
        open_task(path)
    path = table("broken.parquet", 500, image=["a.png"] * 2000, question=["Which?"] * 2000,
                 answer=[str(i * 7919 % 997) for i in range(2000)])  # fmt: skip
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = b"\xff" * 400
    path.write_bytes(data)
    with pytest.raises(ValueError):
        open_task(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "visual-token-compression\[data\]"'):
        open_task(path)


# ---------------------------------------------------------------------- data sets of the hub

# The columns that each repository has, as far as we know them, and two or more rows of them.
QUESTIONS = {
    "gqa": [
        {"id": "201", "imageId": "n1", "question": "Is it red?", "answer": "yes", "isBalanced": True},
        {"id": "202", "imageId": "n2", "question": "Who is it?", "answer": "man", "isBalanced": True},
        {"id": "203", "imageId": "n1", "question": "What is it?", "answer": "cup", "isBalanced": True},
        {"id": "204", "imageId": "n9", "question": "What is it?", "answer": "cup", "isBalanced": True},
    ],
    "textvqa": [
        {"image_id": "i1", "question_id": 5, "question": "what BRAND?", "answers": ["Nokia"] * 10},
        {"image_id": "i2", "question_id": 6, "question": "what year?", "answers": ["1999"] * 10},
    ],
    "pope": [
        {"id": str(i), "question_id": str(i % 2), "question": "Is there a dog?", "answer": answer,
         "image_source": f"COCO_{i}", "category": category}
        for i, (answer, category) in enumerate(
            [("yes", "random"), ("no", "random"), ("yes", "popular"), ("no", "popular")])
    ],
    "docvqa": [
        {"questionId": "49153", "question": "What is the date?", "question_types": ["layout"],
         "docId": 1, "ucsf_document_id": "x", "ucsf_document_page_no": page,
         "answers": ["1/8/93", "1 / 8 / 93"]}
        for page in ("1", "2")
    ],
    "chartqa": [
        {"type": "human_test", "question": "How many bars?", "answer": "3"},
        {"type": "augmented_test", "question": "What is the value?", "answer": "0.57"},
        {"type": "human_test", "question": "How many bars?", "answer": "3"},
    ],
    "scienceqa": [
        {"question": "Which is a mammal?", "choices": ["ant", "dog"], "answer": 1, "hint": "Look.",
         "subject": "natural science"},
        {"question": "Which?", "choices": ["x", "y", "z"], "answer": 0, "hint": "",
         "subject": "social science"},
    ],
    "flickr30k": [
        {"img_id": str(i), "caption": [f"Dog {i}.", "A dog."], "filename": f"{i}.jpg",
         "sentids": ["0", "1"]}
        for i in range(3)
    ],
    "coco": [
        {"question_id": f"{i}.jpg", "id": i, "question": "Please describe.", "answer": ["A cat.", "Cat."]}
        for i in range(3)
    ],
}  # fmt: skip
FOLDERS = {"gqa": "testdev_balanced_instructions", "docvqa": "DocVQA", "scienceqa": "ScienceQA-IMG"}


@pytest.fixture
def copy(tmp_path):
    """Writes a local copy of a hub set, laid out as its repository; row i has an image of tone
    i."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def store(rows, path, files=1, group=100):
        path.mkdir(parents=True, exist_ok=True)
        size = -(-len(rows) // files)
        for i in range(files):
            made = datasets.Dataset.from_list(rows[i * size : (i + 1) * size])
            if "image" in rows[0]:
                made = made.cast_column("image", datasets.Image())
            made.to_parquet(path / f"{split}-{i:05}-of-{files:05}.parquet", batch_size=group)

    def made(name, rows=None, where=None, **layout):
        nonlocal split
        folder, split = tmp_path / name, hub.SETS[name].split
        rows = QUESTIONS[name] if rows is None else rows
        if name == "gqa":
            images = [{"id": key, "image": image(i)} for i, key in enumerate(["n1", "n2"])]
            store(images, folder / "testdev_balanced_images")
        else:
            rows = [{**r, "image": image(i)} for i, r in enumerate(rows)]
        store(rows, folder / (where or FOLDERS.get(name, "data")), **layout)
        return folder

    def image(i):
        return {"bytes": picture(i % 256), "path": None}

    split = ""
    return made


def test_every_set_has_a_test():
    assert set(QUESTIONS) == set(hub.SETS)
    for known in hub.SETS.values():
        assert known.metric in METRICS or known.metric == RECALL


@pytest.mark.parametrize("name", list(QUESTIONS))
def test_local_copies(copy, name):
    folder = copy(name)
    task = open_task(name, data_dir=folder)
    known = hub.SETS[name]
    assert (task.name, task.metric) == (name, known.metric)
    lost = 1 if name == "gqa" else 0
    assert len(task) == len(QUESTIONS[name]) - lost == len({i.id for i in task})
    assert all(i.question.endswith(known.suffix) for i in task)
    assert [tone(i) for i in task] == ([0, 1, 0] if name == "gqa" else list(range(len(task))))
    again = open_task(name, data_dir=folder, n=2, seed=5)
    assert len(again) == 2 and {i.id for i in again} <= {i.id for i in task}
    by_id = {i.id: (i.question, i.answers, i.kind, tone(i)) for i in task}
    if name != "chartqa":  # two equal questions, told apart by their number in the sample
        assert all(by_id[i.id] == (i.question, i.answers, i.kind, tone(i)) for i in again)
    assert again.fingerprint == open_task(name, data_dir=folder, n=2, seed=5).fingerprint
    plain = open_task(name, data_dir=folder, suffix="", n=1)
    assert not plain[0].question.endswith(hub.SHORT)


def test_what_the_columns_become(copy):
    def opened(name):
        return open_task(name, data_dir=copy(name))

    gqa = opened("gqa")
    assert gqa.image_keys() == ["n1", "n2", "n1"] and gqa[1].id == "202"
    assert gqa.problems == [("gqa/testdev:4", "there is no image 'n9'")]

    textvqa = opened("textvqa")
    assert textvqa[0].question == "What brand?" + hub.SHORT
    assert len(textvqa[0].answers) == 10 and textvqa.image_keys() == ["i1", "i2"]

    pope = opened("pope")
    assert [i.kind for i in pope] == ["random", "random", "popular", "popular"]
    assert [i.id for i in pope] == ["random-0", "random-1", "popular-0", "popular-1"]

    docvqa = opened("docvqa")
    assert docvqa.image_keys() == ["x-1", "x-2"]
    assert [i.id for i in docvqa] == ["49153", "49153#2"]

    chartqa = opened("chartqa")
    assert chartqa[0].question.endswith("Answer the question with a single word.")
    ids = [i.id for i in chartqa]
    assert ids[2] == f"{ids[0]}#2" and len(set(chartqa.image_keys())) == 3

    science = opened("scienceqa")
    assert science[0].question == "Context: Look.\nWhich is a mammal?\nA. ant\nB. dog" + hub.LETTER
    assert science[1].question.startswith("Which?\nA. x\nB. y\nC. z\nAnswer with")
    assert [i.answer for i in science] == ["B", "A"]

    flickr = opened("flickr30k")
    assert flickr[1].answers == ("Dog 1.", "A dog.") and flickr[1].answer == "Dog 1."
    assert flickr.image_keys() == ["0", "1", "2"]


def test_a_sample_is_spread_over_all_files(copy, monkeypatch):
    rows = [{"question_id": i, "question": "what?", "answers": ["x"] * 4} for i in range(400)]
    folder = copy("textvqa", rows, files=2, group=10)  # 40 row groups

    def opened(n, seed=0):
        return open_task("textvqa", n=n, seed=seed, data_dir=folder)

    task = opened(24)
    ids = [int(i.id) for i in task.entries]
    assert ids == sorted(ids) and len(set(ids)) == 24
    assert min(ids) < 200 <= max(ids)
    assert len({i // 10 for i in ids}) <= hub.SPREAD  # no other row group is read
    assert [tone(i) for i in task] == [i % 256 for i in ids]
    assert (
        ids == [int(i.id) for i in opened(24).entries] != [int(i.id) for i in opened(24, 1).entries]
    )
    assert len({int(i.id) // 10 for i in opened(5).entries}) > 1
    many = {i // 10 for i in (int(i.id) for i in opened(100).entries)}
    assert hub.SPREAD < len(many) <= 20  # as many groups as have 200 rows
    assert len(opened(400)) == len(opened(999)) == 400
    read = []
    real = ParquetTable.image
    monkeypatch.setattr(ParquetTable, "image", lambda self, n: read.append(n) or real(self, n))
    task = opened(5)
    assert read == []
    _ = task[:], task[:], task.image_keys()
    assert len(read) == 5  # fetched once each


def test_bad_rows_of_a_copy(copy):
    rows = [
        {"question_id": 1, "question": "what?", "answers": ["x"] * 10},
        {"question_id": 2, "question": "what?", "answers": None},
        {"question_id": 3, "question": None, "answers": ["x"] * 10},
        {"question_id": 4, "question": "what?", "answers": ["x"] * 3},
    ]
    task = open_task("textvqa", data_dir=copy("textvqa", rows))
    assert len(task) == 1
    assert [where for where, _ in task.problems] == [f"textvqa/validation:{i}" for i in (2, 3, 4)]
    assert "four or more" in task.problems[2][1]
    folder = copy("pope", [{"text": "Is there a dog?", "label": "yes"}])
    with pytest.raises(ValueError, match=r"no row can be asked. pope/test:1: not as lmms-lab-enc"):
        open_task("pope", data_dir=folder)


def test_a_row_without_an_image_is_a_bad_item(copy, monkeypatch):
    folder = copy("chartqa")
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": None, "path": None}, {"bytes": b"no image", "path": None}]
    table = pa.table({"question": ["a?", "b?"], "answer": ["1", "2"], "image": images})
    pq.write_table(table, folder / "data" / "test-00000-of-00001.parquet")
    task = open_task("chartqa", data_dir=folder)
    for i, why in ((0, "chartqa/test:1: there is no image"), (1, "chartqa/test:2: cannot read")):
        with pytest.raises(BadItem, match=why):
            task[i]
    assert len(set(task.image_keys())) == 2


def test_a_row_of_a_copy_that_is_not_utf8_is_a_bad_row(copy):
    folder = copy("chartqa")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (file,) = folder.rglob("*.parquet")
    whole = pq.read_table(file).slice(0, 1)
    broken = pa.array([b"\xff"], pa.binary()).view(pa.string())
    column = whole.schema.get_field_index("question")
    pq.write_table(pa.concat_tables([whole, whole.set_column(column, "question", broken)]), file)
    task = open_task("chartqa", data_dir=folder)
    assert len(task) == 1
    ((where, why),) = task.problems
    assert where == "chartqa/test:2"
    assert why.startswith(f"not as {hub.SETS['chartqa'].repo} has it: not UTF-8: ")


def test_where_a_copy_may_lie(copy, tmp_path, monkeypatch):
    folder = copy("docvqa", where=".")  # the files of one configuration, without its subfolder
    assert len(open_task("docvqa", data_dir=folder)) == 2
    copy("pope")
    monkeypatch.setenv(hub.FOLDER, str(tmp_path))
    assert len(open_task("pope")) == 4
    with pytest.raises(ValueError, match="no such folder with a copy of pope"):
        open_task("pope", data_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no validation-\*.parquet in .*pope"):
        open_task("pope", split="validation")


@pytest.mark.parametrize("name", ["gqa", "pope"])
def test_the_hub_is_read_like_a_copy(copy, name, monkeypatch):
    """With the answers that `datasets` gives about a repository, but for local files."""
    datasets = pytest.importorskip("datasets")
    folder, known, asked = copy(name), hub.SETS[name], []

    def builder(repo, config, **more):
        asked.append((repo, config))
        assert not more  # no code of a repository is trusted
        files = sorted((folder / (config or "data")).glob("*.parquet"))
        found = {known.split: [f"file://{f}" for f in files]}
        return types.SimpleNamespace(config=types.SimpleNamespace(data_files=found))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    for n in (None, 3):
        here, there = open_task(name, n=n, data_dir=folder), open_task(name, n=n)
        assert here.fingerprint == there.fingerprint and here.image_keys() == there.image_keys()
        assert [tone(i) for i in here] == [tone(i) for i in there]
    configs = [known.config, known.images] if known.images else [known.config]
    assert asked == 2 * [(known.repo, c) for c in configs]
    with pytest.raises(ValueError, match=f"there is no split 'train', only {known.split}"):
        open_task(name, split="train")


def test_without_network_the_error_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    monkeypatch.delenv(hub.FOLDER, raising=False)
    for n in (None, 3):
        with pytest.raises(ValueError) as error:
            open_task("gqa", n=n)
        message = str(error.value)
        assert "\n" not in message
        assert message.startswith("gqa cannot be read from the hub: Couldn't reach the Hub.")
        for text in (
            "data_dir",
            "$VTC_DATA",
            "hf download lmms-lab-encoder/GQA --repo-type dataset",
        ):
            assert text in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "visual-token-compression\[data\]"'):
        open_task("gqa")


LMMS = {
    "gqa": ["gqa/gqa.yaml"],
    "textvqa": ["textvqa/textvqa_val.yaml", "textvqa/_default_template_textvqa_yaml"],
    "pope": ["pope/pope.yaml"],
    "docvqa": ["docvqa/docvqa_val.yaml", "docvqa/_default_template_docvqa_yaml"],
    "chartqa": ["chartqa/chartqa.yaml"],
    "scienceqa": ["scienceqa/scienceqa_img.yaml"],
    "flickr30k": ["flickr30k/flickr30k_test.yaml"],
    "coco": ["coco_cap/coco2017_cap_val.yaml"],
}


@pytest.mark.parametrize("name", list(hub.SETS))
def test_repositories_and_prompts_are_those_of_lmms_eval(name):
    found = importlib.util.find_spec("lmms_eval")
    if found is None:
        pytest.skip("lmms-eval is not installed: nothing to compare with")
    (folder,) = found.submodule_search_locations
    text = "\n".join((Path(folder) / "tasks" / file).read_text() for file in LMMS[name])
    known = hub.SETS[name]

    def field(name):
        match = re.search(rf"^ *{name} *: *(.+?) *$", text, re.MULTILINE)
        return match and match[1].strip('"').replace("\\n", "\n")

    assert field("dataset_path") == known.repo
    assert field("dataset_name") == known.config
    assert field("test_split") == known.split
    assert (field("post_prompt") or "") == known.suffix  # the first is that of "default"


def test_the_docs_name_every_metric_and_data_set():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in (*METRICS, *hub.SETS, *TASKS):
        assert f"`{name}`" in text, name
    for known in hub.SETS.values():
        assert known.repo in text


def test_the_default_metric_is_one():
    assert rows_of.DEFAULT_METRIC in METRICS
