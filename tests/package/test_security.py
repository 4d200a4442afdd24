# SPDX-License-Identifier: Apache-2.0
"""Promises of SECURITY.md: nothing runs or connects that should not, odd files are refused."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import few
from hypothesis import given
from hypothesis import strategies as st
from limit_cases import METHODS, made, square, steps
from PIL import Image
from scan import objections, shipped
from typer.testing import CliRunner

import vtc
from vtc import cli
from vtc.benchmarks.accuracy import run as runner
from vtc.benchmarks.harnesses.model_args import parse
from vtc.benchmarks.pages import read as report
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor
from vtc.benchmarks.tasks import images
from vtc.benchmarks.tasks.items import BadItem
from vtc.benchmarks.tasks.registry import open_task
from vtc.cli.common import Mistake, load, read_image
from vtc.demos import uploads
from vtc.inspection import from_config
from vtc.methods._routers import Routers
from vtc.report.images import upright_rgb

ROOT = Path(__file__).resolve().parents[2]


# ---- connections ---------------------------------------------------------------------------------

OFFLINE = """
import importlib, os, socket, sys

def refuse(*args, **kwargs):
    raise SystemExit(f"opens a connection: {args[-1:]}")

for name in ("connect", "connect_ex", "sendto", "listen"):  # urllib3 binds to ::1 to learn of IPv6
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse

import vtc
"""

MODULES = """
top = os.path.dirname(vtc.__path__[0])
for folder, _, files in os.walk(vtc.__path__[0], followlinks=True):
    for file in files:
        name, kind = os.path.splitext(os.path.relpath(os.path.join(folder, file), top))
        if kind == ".py" and not name.endswith("__main__"):
            importlib.import_module(name.replace(os.sep, ".").removesuffix(".__init__"))
print(sum(name.startswith("vtc.") for name in sys.modules))
"""

EMBEDDED = """
from PIL import Image
from typer.testing import CliRunner
from vtc import cli
from vtc.benchmarks.tiny.models import load_llava

model, processor = load_llava()
prompt = "USER: <image> what shape is this ASSISTANT:"
inputs = processor(text=[prompt], images=[Image.new("RGB", (90, 60))], return_tensors="pt")
with vtc.compressing(model, "fastv", keep_ratio=0.25) as session:
    model.generate(**inputs, max_new_tokens=2)
args = ["bench", "scenes", "--samples", "2", "--methods", "random", "--keep", "0.25"]
args += ["--repeats", "0", "--out", sys.argv[1]]
done = CliRunner().invoke(cli.app, args)
print(done.exit_code, done.output if done.exit_code else "")
"""


def offline(code: str, *args: str) -> str:
    hidden = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"}
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE + code, *args],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_no_module_connects_when_imported() -> None:
    assert int(offline(MODULES)) > 150


@pytest.mark.slow
def test_the_embedded_model_runs_without_a_connection(tmp_path: Path) -> None:
    assert offline(EMBEDDED, str(tmp_path)).strip() == "0"
    assert (tmp_path / "scenes.json").exists()


def test_a_connection_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="opens a connection"):
        offline("socket.create_connection(('192.0.2.1', 80))")


# ---- code of strangers ---------------------------------------------------------------------------


def test_shipped_code_reads_no_pickles_and_runs_no_strings() -> None:
    found = shipped(ROOT)
    assert len(found) > 150
    bad = [objection for file in found for objection in objections(file.read_text(), file.name)]
    assert bad == []


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle\npickle.load(file)",
        "from pickle import loads as read\nread(data)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader)",
        "eval(text)",
        "exec(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "AutoProcessor.from_pretrained(name, trust_remote_code=True)",
        "import transformers\ntransformers.AutoModel.from_pretrained(name)",
    ],
)
def test_the_scan_objects(snippet: str) -> None:
    assert len(objections(snippet)) == 1


def test_the_scan_lets_the_safe_forms_pass() -> None:
    fine = (
        "import torch, yaml\nmodel.eval()\nyaml.safe_load(text)\ntorch.load(p, weights_only=True)\n"
        "AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=trust)"
    )
    assert objections(fine) == []


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def evil(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose weights are a pickle that runs code, and the file it would write."""
    folder, marker = tmp_path / "net", tmp_path / "ran"
    net = mini_llava()
    net.save_pretrained(folder)
    mini_processor(net).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    return folder, marker


def test_pickled_weights_are_refused(evil: tuple[Path, Path]) -> None:
    """By the commands, and by the plug-ins of lmms-eval and VLMEvalKit, which used to read them."""
    folder, marker = evil
    with pytest.raises(Mistake, match=r"cannot load .*safetensors"):
        load(str(folder), "load_llava", "cpu", "float32")
    loading, _ = parse({"pretrained": str(folder)})
    with pytest.raises(OSError, match="safetensors"):
        loading.load("cpu")
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_weights_of_other_libraries_run_no_code(tmp_path: Path) -> None:
    import open_clip
    import timm

    from vtc.benchmarks.encoders import towers

    marker, weights = tmp_path / "ran", tmp_path / "weights.bin"
    weights.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(Exception, match=r"(?i)weights.?only|unsupported|invalid|corrupt|magic"):
        towers.load(f"open_clip:ViT-B-32/{weights}")
    folder = tmp_path / "timm"
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(weights.read_bytes())
    with pytest.raises(Exception):  # noqa: B017  pickle and timm have several
        towers.load(f"timm:local-dir:{folder}")
    assert open_clip and not marker.exists()
    pickle.loads(weights.read_bytes())
    assert marker.exists(), "the pickle has no teeth"


def test_routers_are_read_from_safetensors_alone(tmp_path: Path) -> None:
    torch.save({"layers.1.weight": torch.ones(4)}, tmp_path / "routers.bin")
    with pytest.raises(ValueError, match=r"routers\.bin .*safetensors"):
        Routers.read(tmp_path / "routers.bin")


def test_code_of_a_checkpoint_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks on a terminal whether to run it, unless it is told not to."""
    marker, net = tmp_path / "ran", mini_llava()
    net.save_pretrained(tmp_path / "net")
    (tmp_path / "net" / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: 0\n")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    for attempt in (
        lambda: load(str(tmp_path / "net"), "load_llava", "cpu", "float32"),
        lambda: from_config(str(tmp_path / "net")),
    ):
        with pytest.raises((Mistake, ValueError)):
            attempt()
    assert not marker.exists()


# ---- images --------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


def photo(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert(mode)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(), "JPEG", exif=exif)


GREY16 = Image.fromarray(np.full((16, 24), 128 << 8, np.uint16))
FINE: dict[str, tuple[bytes, tuple[int, int]]] = {
    "grey": (encoded(photo("L")), (24, 16)),
    "RGBA": (encoded(photo("RGBA")), (24, 16)),
    "palette, transparent": (encoded(photo("P"), transparency=3), (24, 16)),
    "CMYK": (encoded(photo("CMYK"), "JPEG"), (24, 16)),
    "16 bits": (encoded(GREY16), (24, 16)),
    "animated GIF": (
        encoded(photo(), "GIF", save_all=True, append_images=[photo("L")] * 3),
        (24, 16),
    ),
    "animated WebP": (
        encoded(photo(), "WEBP", save_all=True, append_images=[photo("L")] * 3),
        (24, 16),
    ),
    "turned": (turned(), (16, 24)),
}
BROKEN: dict[str, bytes] = {
    "bomb": png_header(100_000, 100_000),
    "cut off": encoded(photo(size=(99, 99)))[:90],
    "noise": bytes(range(256)) * 4,
    "empty": b"",
    "text": b"<svg onload='alert(1)'/>",
    "header alone": png_header(50, 50),
}
READERS: dict[str, tuple[Callable[[Path], Image.Image], type[Exception]]] = {
    "tasks, file": (lambda path: images.open_image(path, "row"), BadItem),
    "tasks, bytes": (lambda path: images.open_image(path.read_bytes(), "row"), BadItem),
    "commands": (read_image, Mistake),
    "demo": (uploads.read_image, ValueError),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", FINE)
def test_odd_images_are_read(tmp_path: Path, kind: str, reader: str) -> None:
    data, size = FINE[kind]
    (tmp_path / "image").write_bytes(data)
    image = READERS[reader][0](tmp_path / "image")
    assert image.mode == "RGB" and image.size == size
    assert kind != "16 bits" or image.getpixel((3, 3)) == (128, 128, 128)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_and_bombs_are_refused_in_words(
    tmp_path: Path, kind: str, reader: str
) -> None:
    (tmp_path / "image").write_bytes(BROKEN[kind])
    read, error = READERS[reader]
    with pytest.raises(error) as refused:
        read(tmp_path / "image")
    assert len(str(refused.value)) > 10 and "\n" not in str(refused.value)


@pytest.mark.parametrize("reader", [r for r in READERS if r != "demo"])
def test_one_pixel_is_an_image_and_floats_are_none(tmp_path: Path, reader: str) -> None:
    read, error = READERS[reader]
    (tmp_path / "image").write_bytes(encoded(photo(size=(1, 1))))
    assert read(tmp_path / "image").size == (1, 1)
    (tmp_path / "image").write_bytes(encoded(photo("F"), "TIFF"))
    with pytest.raises(error, match="no known range"):
        read(tmp_path / "image")


def test_sixteen_bits_keep_their_tones() -> None:
    """They became white: Pillow cuts off at 255."""
    ramp = Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16)[None])
    assert np.asarray(upright_rgb(ramp))[0, :, 0].tolist() == list(range(256))


def test_a_bomb_for_vtc_match_is_one_line(tmp_path: Path) -> None:
    """It was a traceback."""
    (tmp_path / "bomb.png").write_bytes(BROKEN["bomb"])
    args = ["match", "fastv", "--flops", "0.4", "--image", str(tmp_path / "bomb.png")]
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "too many pixels" in done.stderr


def test_a_report_leaves_out_pictures_that_are_bombs(tmp_path: Path) -> None:
    """It stopped the whole page."""
    photo().save(tmp_path / "scenes-kept.png")
    (tmp_path / "scenes-kept-2.png").write_bytes(BROKEN["bomb"])
    assert len(report._pictures(tmp_path / "scenes.json")) == 1


def test_no_module_lifts_pillows_limit() -> None:
    stock = 1024 * 1024 * 1024 // 4 // 3
    assert stock == Image.MAX_IMAGE_PIXELS
    lifts = r"MAX_IMAGE_PIXELS\s*=|LOAD_TRUNCATED_IMAGES\s*="
    assert [f.name for f in shipped(ROOT) if re.search(lifts, f.read_text())] == []


# ---- data files ----------------------------------------------------------------------------------


def row(**more: Any) -> str:
    return json.dumps({"image": "a.png", "question": "what?", "answer": "a"} | more)


def test_absurd_rows_are_bad_rows(tmp_path: Path) -> None:
    """A number of 5,000 digits stopped the reading of the whole file."""
    photo().save(tmp_path / "a.png")
    rows = [
        row(),
        '{"id": ' + "9" * 5000 + ', "image": "a.png", "question": "q", "answer": "a"}',
        "[" * 200_000,
        row(question="x" * 2_000_000),
        row(answers=["a"] * 100_000, answer=None),
        row(image="../" * 400 + "etc/passwd"),
        row(image="a.png\0"),
        row(id=1e400),
        "\x00" * 1000,
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    task = open_task(tmp_path / "mine.jsonl")
    bad = [int(where.rpartition(":")[2]) for where, _ in task.problems]
    assert bad == [2, 3, 6, 7, 8, 9] and len(task) == 3
    assert all(len(why) < 2000 for _, why in task.problems)


def test_parquet_cells_that_unpack_to_much_are_bad_items(tmp_path: Path) -> None:
    """32 MB of zeros in a file of a few kB: read row by row, refused as an image."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    cells = [bytes(32 * 2**20), encoded(photo()), BROKEN["bomb"]]
    outside = [{"bytes": None, "path": "../" * 20 + "etc/passwd"}]
    table = {"question": ["q"] * 4, "answer": ["a"] * 4}
    structs = [{"bytes": c, "path": None} for c in cells] + outside
    path = tmp_path / "mine.parquet"
    made_of = pa.table(table | {"image": structs})
    pq.write_table(made_of, path, row_group_size=1, compression="zstd")
    assert path.stat().st_size < 200_000
    task = open_task(path)
    assert task[1].image.size == (24, 16)
    for i in (0, 2, 3):
        with pytest.raises(BadItem):
            task[i]


@few(10)
@given(st.text(min_size=1))
def test_files_of_a_task_stay_in_their_folder(name: str) -> None:
    base = runner.file_stem(name)
    path = Path("/out") / f"{base}.json"
    assert os.path.dirname(os.path.normpath(path)) == "/out" and "\0" not in base


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..\\x", "a/b", "..", "\0"])
def test_names_lead_nowhere_else(name: str) -> None:
    assert not set("/\\\0") & set(runner.file_stem(name))


# ---- images that make work -----------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if made(m, "LLaVA, CLIP", 9).has_budget])
def test_what_is_drawn_does_not_change_the_work(method: str) -> None:
    """With a fixed budget as many tokens stay, after as many steps, whatever the image shows."""
    model, inputs = square(6, heads=4)
    chosen = made(method, "LLaVA, CLIP", 9)
    done: list[Counter[str]] = []
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(inputs["pixel_values"].shape, generator=g)
    half = noise.clone()
    half[..., : noise.shape[-1] // 2] = 0
    for pixels in (noise, torch.zeros_like(noise), 1e4 * noise, half):
        given_ = inputs | {"pixel_values": pixels}
        with torch.no_grad(), vtc.compressing(model, chosen) as session:
            model(**given_)  # also loads what is loaded when it is first needed
            kept = session.report()
        assert min(kept.final_tokens, kept.kv_tokens or 36) == 9
        done.append(steps(model, given_, chosen))
    assert all(d == done[0] for d in done)


# ---- what SECURITY.md says -----------------------------------------------------------------------

BACKED = {
    "It opens no connection": "test_security.test_no_module_connects_when_imported",
    "neither does any command on the embedded models": (
        "test_security.test_the_embedded_model_runs_without_a_connection"
    ),
    "It runs no code from checkpoints": (
        "test_security.test_code_of_a_checkpoint_is_refused_without_a_question"
    ),
    "`trust_remote_code` is never set unless you ask": (
        "test_demo.test_code_of_a_checkpoint_runs_only_when_asked_for"
    ),
    "read from safetensors only": "test_security.test_pickled_weights_are_refused",
    "read without unpickling objects": (
        "test_security.test_pickled_weights_of_other_libraries_run_no_code"
    ),
    "loading refuses a file that differs": "test_tiny.test_assets_are_the_published_ones",
    "`vtc demo` binds to localhost": (
        "test_demo.test_the_command_has_an_example_and_is_safe_by_default"
    ),
    "Pillow's limit stays on": "test_security.test_no_module_lifts_pillows_limit",
    "refused in words wherever vtc opens an image": (
        "test_security.test_broken_images_and_bombs_are_refused_in_words"
    ),
    "the benchmark counts and reports unreadable files": (
        "test_tasks.test_a_broken_image_is_named_and_the_others_are_seen"
    ),
    "fixed budgets (`keep_tokens`) bound the cost whatever the image says": (
        "test_security.test_what_is_drawn_does_not_change_the_work"
    ),
    "depends on shapes,\n  not on values": (
        "test_security.test_what_is_drawn_does_not_change_the_work"
    ),
    "Work in Python grows in proportion to the number of images": (
        "test_limits.test_work_is_linear_to_a_hundred_images"
    ),
    "Broken rows are reported and skipped": "test_security.test_absurd_rows_are_bad_rows",
    "the report page escapes everything it shows": (
        "test_report_page.test_nothing_is_loaded_and_no_name_becomes_markup"
    ),
    "serves no file outside its own session's": (
        "test_demo_browser.test_no_file_outside_the_session_is_served"
    ),
}
"""Sentences of SECURITY.md, and the test that would fail if one were not true."""


@pytest.mark.parametrize("sentence", BACKED)
def test_every_statement_has_its_test(sentence: str) -> None:
    assert sentence in (ROOT / "SECURITY.md").read_text()
    file, _, name = BACKED[sentence].partition(".")
    tree = ast.parse(next((ROOT / "tests").rglob(f"{file}.py")).read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in defined
