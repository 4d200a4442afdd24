# SPDX-License-Identifier: Apache-2.0
"""The demo without a browser: uploads, choices, the engine, and what the page says of them."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import threading
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from typer.testing import CliRunner

import vtc
from vtc import cli
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor
from vtc.demos import choices, gallery, loading, measuring, pages, uploads
from vtc.demos.engine import Engine
from vtc.demos.examples import EXAMPLES
from vtc.demos.gallery import Gallery
from vtc.demos.results import BASELINE, COMPRESSED
from vtc.demos.worker import Worker
from vtc.methods.fastv import FastV

TITLE, QUESTION = "mini", "is there a red circle ?"


def picture(seed: int = 0, size: tuple[int, int] = (72, 56)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def mini():
    net = mini_llava()
    model = choices.PageModel(TITLE, net, mini_processor(net), "noise", "raise SystemExit")
    made = Engine([model])
    yield made
    made.close()


def last(updates):
    *_, end = updates
    return end


def unwrapped(made: Engine) -> bool:
    return all("vtc" not in model.net.__dict__ for model in made.models.values())


# ---- uploads -----------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds no pixels at all."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\x00\x00\x00") + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"just text", "not an image"),
        (b"", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (png_header(10_000, 10_000), "100 megapixels (10000 x 10000); at most 32"),
        (png_header(100_000, 100_000), "more than 178 megapixels; at most 32"),
        (png_header(200, 200), "damaged"),
        (png_header(4000, 2), "too narrow"),
    ],
    ids=["text", "empty", "svg", "100-megapixels", "bomb", "no-pixels", "line"],
)
def test_what_cannot_be_read_is_refused_in_words_that_name_no_path(tmp_path, content, says):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        uploads.read_image(path)
    assert str(tmp_path) not in str(refused.value)


def test_a_file_that_was_cleared_away_is_to_be_uploaded_again(tmp_path):
    with pytest.raises(ValueError, match="upload it again"):
        uploads.read_image(tmp_path / "gone.png")


def test_a_cut_off_file_is_refused(tmp_path):
    picture(size=(200, 200)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        uploads.read_image(tmp_path / "half.png")


@pytest.mark.parametrize("kind", uploads.FORMATS)
def test_images_come_out_upright_rgb_and_not_too_large(tmp_path, kind):
    path = tmp_path / f"image.{kind.lower()}"
    picture(size=(1600, 400)).save(path, kind)
    image = uploads.read_image(path)
    assert image.mode == "RGB"
    assert image.size == (uploads.MAX_EDGE, uploads.MAX_EDGE // 4)


def test_a_turned_photo_is_turned_back(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    picture(size=(80, 40)).save(tmp_path / "photo.jpg", exif=exif)
    assert uploads.read_image(tmp_path / "photo.jpg").size == (40, 80)


# ---- choices -----------------------------------------------------------------------------------


def test_several_methods_are_a_chain_in_the_order_of_their_stages():
    chain = choices.make(["fastv", "pitome", "divprune"], 0.125)
    assert [m.name for m in chain.methods] == ["pitome", "divprune", "fastv"]
    assert [m.keep_ratio for m in chain.methods] == [0.5, 0.25, 0.125]


def test_a_method_without_a_budget_comes_as_it_is():
    chain = choices.make(["vidkv", "fastv"], 0.2)
    assert [(m.name, m.keep_ratio) for m in chain.methods] == [("fastv", 0.2), ("vidkv", None)]


def test_no_method_is_refused(mini):
    with pytest.raises(ValueError, match="at least one method"):
        mini.answer(TITLE, picture(), QUESTION, [], 0.5)


@pytest.mark.parametrize(
    ("question", "says"),
    [("  ", "ask a question"), ("x" * 501, "501 characters"), ("what is <image> ?", "<image>")],
)
def test_questions_that_cannot_be_asked(mini, question, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        last(mini.answer(TITLE, picture(), question, ["fastv"], 0.5))
    assert unwrapped(mini)


@pytest.mark.parametrize(
    ("title", "numbers", "says"),
    [
        ("other", {}, "no such model; there are mini"),
        (TITLE, {"length": 0}, "the longest answer lies between 1 and 256; got 0"),
        (TITLE, {"length": 257}, "the longest answer lies between 1 and 256; got 257"),
        (TITLE, {"rounds": 10}, "the number of timed rounds lies between 0 and 9; got 10"),
    ],
)
def test_what_the_page_does_not_offer_is_refused(mini, title, numbers, says):
    for run in (mini.answer, mini.compare):
        with pytest.raises(ValueError, match=re.escape(says)):
            run(title, picture(), QUESTION, ["fastv"], 0.5, **numbers)


def test_a_chain_says_how_the_slider_is_shared():
    assert "the slider is what the last one leaves" in pages.about(["pitome", "fastv"])
    assert "the slider" not in pages.about(["fastv"])


@pytest.mark.slow
def test_every_method_on_offer_answers(mini):
    offered = mini.methods[TITLE]
    assert len(offered) > 25
    assert "evs" not in offered  # compares frames
    assert "mod" not in offered  # wants trained routers
    assert set(offered) <= set(vtc.methods())
    for name in offered:
        end = last(mini.answer(TITLE, picture(), QUESTION, [name], 0.5, length=2, rounds=0))
        assert end.done and end.report is not None, name
    assert unwrapped(mini)


# ---- answers -----------------------------------------------------------------------------------


def answer_of(model: choices.PageModel, image: Image.Image, question: str, length: int) -> str:
    """Answer of plain ``generate``."""
    inputs = model.inputs(image, question)
    out = model.net.generate(**inputs, do_sample=False, max_new_tokens=length)
    new = out[0, inputs["input_ids"].shape[1] :]
    return model.processor.decode(new, skip_special_tokens=True).strip()


def test_both_answers_are_streamed_and_are_those_of_generate(mini):
    updates = list(mini.answer(TITLE, picture(), QUESTION, ["fastv"], 0.25, length=8, rounds=1))
    end = updates[-1]
    assert end.done and not any(u.done for u in updates[:-1])
    before, after = end.sides[BASELINE], end.sides[COMPRESSED]
    model = mini.models[TITLE]
    assert before.text == answer_of(model, picture(), QUESTION, 8)
    with vtc.compressing(model.net, "fastv", keep_ratio=0.25):
        assert after.text == answer_of(model, picture(), QUESTION, 8)
    for name in end.sides:
        seen = list(dict.fromkeys(u.sides[name].text for u in updates))
        assert seen[0] == "" and len(seen) >= 3, "not streamed"
        assert all(end.sides[name].text.startswith(text) for text in seen)
    assert (before.tokens, after.tokens) == (16, 4)
    assert after.average < before.average
    assert after.kv_bytes < before.kv_bytes
    for side in (before, after):
        assert 0 < side.first_ms <= side.total_ms
        assert side.peak_bytes > side.kv_bytes
        assert side.new_tokens == 8
    assert [tokens for _, tokens in end.report.stages()] == [4]
    assert unwrapped(mini)


def test_no_rounds_no_times(mini):
    end = last(mini.answer(TITLE, picture(), QUESTION, ["fastv"], 0.25, length=2, rounds=0))
    assert end.sides[BASELINE].first_ms is None
    assert end.sides[COMPRESSED].total_ms is None


def test_the_order_of_the_two_is_random(mini):
    def first() -> str:
        run = mini.answer(TITLE, picture(), QUESTION, ["fastv"], 0.25, length=1, rounds=0)
        return next(u.status for u in run if u.status.startswith("answering"))

    seen = {first() for _ in range(20)}
    assert seen == {f"answering, {BASELINE}", f"answering, {COMPRESSED}"}


def test_the_stock_model_is_timed_without_hooks(monkeypatch):
    net = mini_llava()
    seen = []

    def generate(net, inputs, length, watch):
        seen.append("vtc" in net.__dict__)
        watch.put(torch.zeros(1))
        watch.put(torch.tensor([5]))

    monkeypatch.setattr(measuring, "generate", generate)
    times = measuring.race(
        net,
        {},
        {"stock": nullcontext, "small": lambda: vtc.compressing(net, "fastv")},
        1,
        4,
    )
    assert sorted(seen) == [False] * 4 + [True] * 4
    assert len(times["stock"].first) == len(times["small"].total) == 4


def test_a_failing_request_leaves_the_model_clean_and_the_next_one_works(mini, monkeypatch):
    def broken(self, v):
        raise RuntimeError("inside a hook")

    with monkeypatch.context() as patch:
        patch.setattr(FastV, "score", broken)
        with pytest.raises(RuntimeError, match="inside a hook"):
            last(mini.answer(TITLE, picture(), QUESTION, ["fastv"], 0.25))
    assert unwrapped(mini)
    assert last(mini.answer(TITLE, picture(), QUESTION, ["fastv"], 0.25, length=2)).done


def test_who_leaves_stops_the_work(mini):
    run = mini.answer(TITLE, picture(), QUESTION, ["fastv"], 0.25, length=256, rounds=9)
    for update in run:
        if update.sides[BASELINE].text or update.sides[COMPRESSED].text:
            break
    run.close()
    start = time.perf_counter()
    assert last(mini.answer(TITLE, picture(), QUESTION, ["fastv"], 0.25, length=1, rounds=0)).done
    assert time.perf_counter() - start < 3  # 20 answers of 256 tokens take far longer
    assert unwrapped(mini)


def test_closing_ends_what_runs():
    worker = Worker()
    began = threading.Event()

    def forever(say):
        while True:
            began.set()
            say(None)
            time.sleep(0.001)

    listener = threading.Thread(target=lambda: list(worker.run(forever)), daemon=True)
    listener.start()
    assert began.wait(timeout=10)
    worker.close()
    listener.join(timeout=10)
    assert not listener.is_alive()


def test_ten_users_at_once_get_their_own_answers(mini):
    def ask(seed: int) -> tuple[str, str, list[int]]:
        end = last(mini.answer(TITLE, picture(seed), QUESTION, ["fastv"], 0.25, 6, rounds=0))
        return *(side.text for side in end.sides.values()), end.report.kept[0].tolist()

    alone = [ask(seed) for seed in range(10)]
    assert len({str(answer) for answer in alone}) == 10
    together: dict[int, object] = {}
    users = [
        threading.Thread(target=lambda seed=seed: together.update({seed: ask(seed)}))
        for seed in range(10)
    ]
    for user in users:
        user.start()
    for user in users:
        user.join(timeout=60)
    assert [together.get(seed) for seed in range(10)] == alone
    assert unwrapped(mini)


# ---- comparison --------------------------------------------------------------------------------


def test_methods_side_by_side_and_one_that_cannot(mini, monkeypatch):
    def broken(self, v):
        raise vtc.UnsupportedError("not on <b>this</b> image")

    monkeypatch.setattr(FastV, "score", broken)
    names = ["pitome", "fastv", "divprune"]
    status, rows = last(mini.compare(TITLE, picture(), QUESTION, names, 0.25, rounds=1))
    assert status == "done"
    assert [row.name for row in rows] == [BASELINE, *names]
    base, merged, failed, kept = rows
    assert failed.error and failed.picture is None
    assert {row.side.tokens for row in (merged, kept)} == {4}
    assert kept.side.flops < base.side.flops
    assert all(row.side.first_ms > 0 and row.picture is not None for row in (base, merged, kept))
    shown = pages.comparison(rows, 1)
    assert shown.count('<td class="why"') == 1
    assert "not on &lt;b&gt;this&lt;/b&gt; image" in shown
    assert unwrapped(mini)


def test_without_knowing_where_tokens_lie_there_is_a_row_and_no_picture():
    net = mini_llava()
    processor = mini_processor(net)

    class Mirroring(type(processor)):
        def __call__(self, images, **more):
            return super().__call__(images=[ImageOps.mirror(image) for image in images], **more)

    processor.__class__ = Mirroring
    made = Engine([choices.PageModel(TITLE, net, processor, "", "")])
    try:
        _, rows = last(made.compare(TITLE, picture(), QUESTION, ["fastv"], 0.25, 2, rounds=0))
    finally:
        made.close()
    assert [(row.error, row.picture, row.side.tokens) for row in rows] == [
        ("", None, 16),
        ("", None, 4),
    ]


def test_too_many_methods_are_refused(mini):
    with pytest.raises(ValueError, match="between 1 and 8"):
        mini.compare(TITLE, picture(), QUESTION, list(mini.methods[TITLE])[:9], 0.25)


# ---- models of one's own -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A checkpoint on disk."""
    net = mini_llava()
    net.save_pretrained(tmp_path / "net")
    mini_processor(net).save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def test_a_model_by_folder_and_its_snippet(folder, monkeypatch, capsys):
    model = loading.other(str(folder), "cpu", "float32")
    assert model.title == "net"
    made = Engine([model])
    try:
        picture().save(folder / "image.png")
        names, keep = ["fastv", "pitome"], 0.25
        end = last(made.answer("net", picture(), QUESTION, names, keep, length=8, rounds=0))
    finally:
        made.close()
    monkeypatch.chdir(folder)
    exec(choices.snippet(model, QUESTION, names, keep, 8), {})
    said, report = capsys.readouterr().out.split("\n", 1)
    assert said.strip() == end.sides[COMPRESSED].text
    assert "16 -> 4 at the end" in report


def test_pickled_weights_are_not_read(folder):
    state = mini_llava().state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        loading.other(str(folder), "cpu", "float32")


def test_code_of_a_checkpoint_runs_only_when_asked_for(folder):
    marker = folder / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        loading.other(str(folder), "cpu", "float32")
    assert not marker.exists()
    with pytest.raises(Exception):  # noqa: B017  it ran, and is no model
        loading.other(str(folder), "cpu", "float32", trust_remote_code=True)
    assert marker.exists()


# ---- the embedded models -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    made = Engine(loading.embedded())
    yield made
    made.close()


@pytest.mark.slow
def test_the_examples_are_answered_right_uncompressed(tiny):
    title_of = {loader: title for loader, (title, _) in loading.EMBEDDED.items()}
    for e in EXAMPLES:
        model = tiny.models[title_of[e.loader]]
        assert (answer_of(model, e.draw(), e.question, 4) == e.answer) == e.known, e


@pytest.mark.slow
@pytest.mark.parametrize("names", [["visionzip"], ["cdpruner"], ["pitome", "fastv"]])
def test_the_snippet_does_what_the_page_did(tiny, names, tmp_path, monkeypatch, capsys):
    title, example = next(iter(tiny.models)), EXAMPLES[0]
    image, keep = example.draw(), 0.2
    end = last(tiny.answer(title, image, example.question, names, keep, length=8, rounds=0))
    code = choices.snippet(tiny.models[title], example.question, names, keep, 8)
    image.save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    said, report = capsys.readouterr().out.split("\n", 1)
    assert said.strip() == end.sides[COMPRESSED].text
    assert f"576 -> {end.sides[COMPRESSED].tokens:g} at the end" in report


@pytest.mark.slow
def test_search_finds_the_described_scene():
    worker = Worker()
    gallery, wanted = Gallery(worker, size=4), 2
    text = gallery.captions[wanted]
    try:
        status, found = last(gallery.search(text, ["pitome"], 0.2))
        start = time.perf_counter()
        assert last(gallery.search(text, ["pitome"], 0.2)) == (status, found)
        assert time.perf_counter() - start < 1  # the gallery is not encoded again
        with pytest.raises(ValueError, match="describe a scene"):
            gallery.search(" ", ["pitome"], 0.2)
        with pytest.raises(vtc.UnsupportedError):
            last(gallery.search(text, ["fastv"], 0.2))
    finally:
        worker.close()
    assert status == "done"
    before, after = found[BASELINE], found[COMPRESSED]
    assert before.order[0] == wanted
    assert before.hits == 4
    assert (before.tokens, after.tokens) == (576, 115)
    assert sorted(after.order) == list(range(4))
    assert after.scores == sorted(after.scores, reverse=True)
    assert after.scores != before.scores
    assert "vtc" not in gallery.tower.vision.__dict__
    assert "pitome" in gallery.methods and "fastv" not in gallery.methods


@pytest.mark.slow
def test_only_so_many_settings_of_the_gallery_are_remembered(monkeypatch):
    monkeypatch.setattr(gallery, "REMEMBERED", 2)
    worker = Worker()
    scenes = Gallery(worker, size=1)

    def encoded(keep: float) -> list[str]:
        told = [status for status, _ in scenes.search("a circle", ["random"], keep)]
        return [status.split(",")[0] for status in told if "image" in status]

    try:
        assert encoded(0.5) == [BASELINE, COMPRESSED]
        assert encoded(0.5) == []
        assert encoded(0.2) == [COMPRESSED]  # in place of the baseline, the oldest
        assert encoded(0.2) == [BASELINE]
    finally:
        worker.close()


# ---- the command -------------------------------------------------------------------------------


def test_the_command_has_an_example_and_is_safe_by_default():
    done = CliRunner().invoke(cli.app, ["demo", "--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert "Example: vtc demo" in done.stdout
    text = re.sub(r"\s+", " ", done.stdout)
    assert "127.0.0.1" in text and "--trust-remote-code" in text and "--share" in text


def test_a_port_that_is_taken_is_one_clear_line(monkeypatch):
    pytest.importorskip("gradio")

    def taken(*args):
        raise OSError("Cannot find empty port\nin range")

    net = mini_llava()
    tiny = [choices.PageModel("mini", net, mini_processor(net), "", "")]
    monkeypatch.setattr(loading, "embedded", lambda device: tiny)
    monkeypatch.setattr("vtc.demos.server.serving", taken)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    done = CliRunner().invoke(cli.app, ["demo", "--port", "7860"])
    assert done.exit_code == 2
    assert done.stderr == (
        "error: cannot listen on 127.0.0.1:7860; choose another --port or --host\n"
    )


@pytest.mark.parametrize(("host", "open_to_all"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_the_command_serves_until_it_is_told_to_stop(monkeypatch, host, open_to_all):
    """Also a SIGTERM is a polite end; who opens the page to others is told so."""
    pytest.importorskip("gradio")
    net, seen = mini_llava(), []
    tiny = [choices.PageModel("mini", net, mini_processor(net), "", "")]
    folders = set(Path(tempfile.gettempdir()).glob("vtc-demo-*"))

    def sleep(seconds: float) -> None:
        seen.extend(set(Path(tempfile.gettempdir()).glob("vtc-demo-*")) - folders)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loading, "embedded", lambda device: tiny)
    monkeypatch.setattr(cli.demo, "time", SimpleNamespace(sleep=sleep))
    before = signal.getsignal(signal.SIGTERM)
    try:
        done = CliRunner().invoke(cli.app, ["demo", "--host", host])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.exit_code == 0, done.output
    assert re.fullmatch(r"http://[\w.]+:\d+/  \(Ctrl-C stops it\)\nstopped\n", done.stdout)
    assert ("anyone who reaches this page can use this machine" in done.stderr) == open_to_all
    assert len(seen) == 1 and not seen[0].exists()


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("192.168.1.5", False),
        ("workstation", False),
    ],
)
def test_addresses_of_this_machine_alone(host, alone):
    server = pytest.importorskip("vtc.demos.server", exc_type=ImportError)
    assert server.is_loopback(host) is alone


def test_a_dtype_that_is_none_is_one_clear_line():
    pytest.importorskip("gradio")
    done = CliRunner().invoke(cli.app, ["demo", "--dtype", "int8"])
    assert done.exit_code == 2
    assert done.stderr == 'error: unknown dtype "int8"; use float32, bfloat16 or float16\n'


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path):
    pytest.importorskip("gradio")
    done = CliRunner().invoke(cli.app, ["demo", "--model", str(tmp_path / "nothing")])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: cannot load")
    assert done.stderr.count("\n") == 1
    assert Path.cwd() != tmp_path
