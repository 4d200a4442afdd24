# SPDX-License-Identifier: Apache-2.0
"""Retrieval and classification: towers of every library, figures by hand, data that is not well."""

from __future__ import annotations

import dataclasses
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers as hf
from mini import DEPTH, ENCODERS, GRID, HEADS, PATCH, SIZE, WIDTH, loud
from PIL import Image
from safetensors.torch import save_file
from snapshot import snapshot
from torch import nn
from typer.testing import CliRunner

import vtc
from vtc import cli
from vtc.benchmarks.encoders import classification, retrieval, sweep, towers
from vtc.benchmarks.encoders.tables import caption
from vtc.benchmarks.metrics.scores import top_k_accuracy
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.shared.columns import fill
from vtc.benchmarks.shared.names import BASELINE
from vtc.benchmarks.tasks.galleries import (
    ClassFolder,
    class_names,
    class_outputs,
    open_captions,
)
from vtc.benchmarks.tasks.items import Entry, Item, Questions
from vtc.benchmarks.tiny.models import load_retrieval
from vtc.errors import UnsupportedError

N = GRID * GRID
COLORS = ("red", "green", "blue", "white", "black", "gold", "navy")
TIMM = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH}
TIMM |= {"num_heads": HEADS}


# ---- mini models on disk, as their libraries write them ------------------------------------------


def tokenizer() -> hf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "</s>", "a", "photo", "of", "picture", ".", *COLORS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


def save_hf(kind: str, folder: Path) -> str:
    edges = {"height": SIZE, "width": SIZE}
    size = {"size": {"shortest_edge": SIZE}, "crop_size": edges} if kind == "CLIP" else {}
    images = getattr(hf, f"{kind.title() if kind != 'CLIP' else kind}ImageProcessor")
    processor = getattr(hf, f"{kind.title() if kind != 'CLIP' else kind}Processor")
    processor(
        image_processor=images(**(size or {"size": edges})), tokenizer=tokenizer()
    ).save_pretrained(folder)
    ENCODERS[f"hf-{kind.lower()}-model"]().save_pretrained(folder)
    return str(folder)


def save_open_clip(folder: Path) -> str:
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            **dict(layers=DEPTH, width=WIDTH, head_width=WIDTH // HEADS),
            **dict(patch_size=PATCH, image_size=SIZE),
        },
        "text_cfg": dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=1),
    }
    folder.mkdir()
    torch.manual_seed(0)
    save_file(loud(open_clip.CLIP(**config)).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"size": SIZE}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    return f"open_clip:local-dir:{folder}"


def save_timm(folder: Path, classes: int = 7, **options: Any) -> str:
    torch.manual_seed(0)
    args = {**TIMM, **options}
    model = loud(timm.create_model("vit_tiny_patch16_224", num_classes=classes, **args))
    timm.models.save_for_hf(model, folder, model_args=args, safe_serialization=True)
    return f"timm:local-dir:{folder}"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names of mini models for `towers.load`."""
    root = tmp_path_factory.mktemp("towers")
    average = {"class_token": False, "global_pool": "avg"}
    return {
        "clip": save_hf("CLIP", root / "clip"),
        "siglip": save_hf("siglip", root / "siglip"),
        "open_clip": save_open_clip(root / "open_clip"),
        "timm": save_timm(root / "timm"),
        "timm-mean": save_timm(root / "mean", **average),
        "embedded": "embedded",
    }


@pytest.fixture(scope="session")
def loaded(saved: dict[str, str]) -> dict[str, Any]:
    return {name: towers.load(spec) for name, spec in saved.items()}


def pictures(n: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)) for _ in range(n)]


def gallery(n: int, captions: int = 1) -> Questions:
    """Random images, each with captions that name its number."""
    made = pictures(n)
    entries = []
    for i in range(n):
        texts = tuple(f"a {COLORS[i % 7]} picture {j}" for j in range(captions))
        entries.append(Entry(i, lambda i=i: made[i], "", texts[0], "caption", texts))
    return Questions("random", entries, "recall")


def settings(*methods: str, **options: Any) -> sweep.Settings:
    options = {"keep": (Fraction(1, 2),), "batch_size": 3, "repeats": 0} | options
    return sweep.Settings(methods, **options)


TOWERS = pytest.mark.parametrize("name", ["clip", "siglip", "open_clip", "timm", "timm-mean"])


# ---- towers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reads", "width"),
    [
        ("clip", "cls", 16),
        ("siglip", "map", WIDTH),
        ("open_clip", "cls", 16),
        ("embedded", "cls+mean", 128),
    ],
)
def test_two_towers(loaded: dict[str, Any], name: str, reads: str, width: int) -> None:
    model = loaded[name]
    images, texts = model.encode_images(pictures(3)), model.encode_texts(["a red .", "navy"])
    assert model.reads == reads
    assert images.shape == (3, width)
    assert texts.shape == (2, width)
    for x in (images, texts):
        torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))
    assert not images.requires_grad
    assert model.device.type == "cpu" and model.dtype == torch.float32
    assert "/" not in model.describe()["name"]


def test_clip_is_what_transformers_computes(saved: dict[str, str], loaded: dict[str, Any]) -> None:
    """Padded texts count for CLIP as for SigLIP what their own processors make of them."""
    texts = ["a red .", "a photo of a navy picture"]
    for name, padding in (("clip", True), ("siglip", "max_length")):
        model = hf.AutoModel.from_pretrained(saved[name]).eval()
        processor = hf.AutoProcessor.from_pretrained(saved[name])
        inputs = processor(
            images=pictures(2),
            text=texts,
            return_tensors="pt",
            padding=padding,
            max_length=8,
            truncation=True,
        )
        if name == "siglip":  # trained without a mask
            inputs.pop("attention_mask", None)
        with torch.no_grad():
            out = model(**inputs)
        got = loaded[name]
        torch.testing.assert_close(got.encode_images(pictures(2)), out.image_embeds)
        torch.testing.assert_close(got.encode_texts(texts), out.text_embeds)


def test_open_clip_by_architecture_and_file(tmp_path: Path, monkeypatch: Any) -> None:
    seen = {}

    def create(architecture: str, weights: str | None) -> Any:
        seen["asked"] = architecture, weights
        return ENCODERS["open-clip-model"](), lambda image: torch.zeros(3, SIZE, SIZE)

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda architecture: None)
    file = tmp_path / "weights.pt"
    file.touch()
    model = towers.load(f"open_clip:ViT-B-32/{file}")
    assert seen["asked"] == ("ViT-B-32", str(file))
    assert model.name == "open_clip:ViT-B-32/weights.pt"
    assert towers.load("open_clip:ViT-B-32/openai").name == "open_clip:ViT-B-32/openai"
    assert towers.load("open_clip:hf-hub:a/b").name == "open_clip:hf-hub:a/b"
    assert seen["asked"] == ("hf-hub:a/b", None)


def test_timm_uses_its_own_transforms(saved: dict[str, str], loaded: dict[str, Any]) -> None:
    model = loaded["timm"]
    assert isinstance(model, towers.Classifier) and model.classes == 7
    stock = timm.create_model(saved["timm"].removeprefix("timm:"), pretrained=True).eval()
    config = timm.data.resolve_model_data_config(stock)
    transform = timm.data.create_transform(**config, is_training=False)
    pixels = torch.stack([transform(image) for image in pictures(2)])
    with torch.no_grad():
        assert torch.equal(model.encode_images(pictures(2)), stock(pixels))


def test_what_cannot_be_loaded_says_why(saved: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ViT-B-32 needs weights.*openai"):
        towers.load("open_clip:ViT-B-32")
    with pytest.raises(ValueError, match="nonsense"):
        towers.load("open_clip:ViT-B-32/nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        towers.load("timm:nonsense")
    tiny = hf.BertConfig(vocab_size=9, hidden_size=12, num_hidden_layers=1)
    hf.BertModel(tiny).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="dual encoder"):
        towers.load(str(tmp_path / "bert"))
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    flexible = hf.Siglip2Config(text_config=shape | {"vocab_size": 9}, vision_config=shape)
    hf.Siglip2Model(flexible).save_pretrained(tmp_path / "naflex")
    with pytest.raises(UnsupportedError, match="no adapter for the encoder Siglip2Model"):
        towers.load(str(tmp_path / "naflex"))
    headless = save_timm(tmp_path / "headless", global_pool="")
    with pytest.raises(UnsupportedError, match="pools no embedding"):
        towers.load(headless)


def test_encoders_without_an_adapter_are_refused(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "resnet", safe_serialization=True)
    with pytest.raises(UnsupportedError, match="no adapter for the encoder ResNet"):
        towers.load(f"timm:local-dir:{tmp_path / 'resnet'}")


def test_code_and_pickles_of_a_repository_stay_out(
    saved: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    asked = {}
    stock = hf.AutoModel.from_pretrained

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.update(options)
        return stock(name, **options)

    monkeypatch.setattr(hf.AutoModel, "from_pretrained", from_pretrained)
    towers.load(saved["clip"])
    assert asked["trust_remote_code"] is False and asked["use_safetensors"] is True
    folder = Path(save_hf("CLIP", tmp_path / "pickled"))
    model = ENCODERS["hf-clip-model"]()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        towers.load(str(folder))


# ---- with compression ----------------------------------------------------------------------------


@TOWERS
@pytest.mark.parametrize("method", ["pitome", "tome", "zero-tprune", "random", "pool"])
def test_full_budget_and_unwrapping_leave_every_bit(
    loaded: dict[str, Any], name: str, method: str
) -> None:
    check_bits(loaded[name], method)


def test_the_embedded_model_keeps_every_bit(loaded: dict[str, Any]) -> None:
    check_bits(loaded["embedded"], "tome")


def check_bits(model: Any, method: str) -> None:
    pixels = model.pixels(pictures(2))
    before, stock = snapshot(model.vision), model.encode(pixels)
    with vtc.compressing(model.vision, seeded(method, Fraction(1), 0)):
        assert torch.equal(model.encode(pixels), stock)
    with vtc.compressing(model.vision, seeded(method, Fraction(1, 2), 0)) as session:
        half = model.encode(pixels)
        assert session.report().final_tokens == round(session.report().visual_tokens / 2)
    assert half.shape == stock.shape and half.isfinite().all()
    assert torch.equal(model.encode(pixels), stock)
    assert snapshot(model.vision) == before


def test_the_embedded_model_weighs_tokens_by_their_patches(loaded: dict[str, Any]) -> None:
    """Its mean over merged tokens is that over the patches that they stand for."""
    model = loaded["embedded"]
    pixels = model.pixels(pictures(1))
    parts = load_retrieval()
    with torch.no_grad(), vtc.compressing(model.vision, "tome", keep_ratio=0.5) as session:
        got = model.forward(pixels)
        tokens = model.vision(pixels).last_hidden_state
        spread = session.vision.state.tokens.expand(tokens)
        want = parts.projection(torch.cat([tokens[:, 0], spread[:, 1:].mean(1)], 1))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# ---- a sweep -------------------------------------------------------------------------------------


def test_rows_of_a_sweep(loaded: dict[str, Any]) -> None:
    found = sweep.sweep(
        loaded["siglip"],
        gallery(7),
        settings("tome", "random", "fastv", "vispruner", keep=(Fraction(1, 2), 16), repeats=1),
        sweep.SweepRow,
        beside=lambda batch: [item.id for item in batch],
    )
    rows = found.rows
    assert [(r.method, r.asked_tokens) for r in rows] == [
        (BASELINE, N),
        *[("tome", 32), ("tome", 16), ("random", 32), ("random", 16)],
        *[("fastv", None), ("vispruner", None)],
    ]
    assert [r.final_tokens for r in rows[:5]] == [N, 32, 16, 32, 16]
    assert rows[0].flops_share == rows[3].flops_share == 1.0  # random drops behind the encoder
    assert 0 < rows[2].flops_share < rows[1].flops_share < 1
    assert all(r.encode_ms > 0 for r in rows[:5]) and rows[0].encode_ratio == 1.0
    assert "language model" in rows[5].error and "[CLS]" in rows[6].error
    assert rows[5].encode_ms is None and found.outputs[5] is None
    assert [x is not None for x in found.outputs] == [r.error is None for r in rows]
    assert all(x.shape == (7, WIDTH) for x in found.outputs[:5])
    assert found.finished and found.visual_tokens == N and found.timed_images == 3
    assert [i for part in found.beside for i in part] == [f"{i}-0" for i in range(7)]
    want = loaded["siglip"].encode_images([item.image for item in gallery(7)])
    torch.testing.assert_close(found.outputs[0], want)
    with vtc.compressing(loaded["siglip"].vision, "tome", keep_tokens=16):
        want = loaded["siglip"].encode_images([item.image for item in gallery(7)])
    torch.testing.assert_close(found.outputs[2], want)


@pytest.mark.parametrize(
    ("name", "idle", "busy"),
    [
        ("clip", ("random", "pool", "visionzip"), ("pitome", "downsample")),
        ("siglip", (), ("random", "pool", "tome")),
        ("timm", ("random", "pool"), ("zero-tprune", "downsample")),
        # The mean over patches does not see that some were averaged before it.
        ("timm-mean", ("pool",), ("random", "tome")),
    ],
)
def test_methods_that_change_nothing_say_so(
    loaded: dict[str, Any], name: str, idle: tuple[str, ...], busy: tuple[str, ...]
) -> None:
    found = sweep.sweep(loaded[name], gallery(2), settings(*idle, *busy), sweep.SweepRow)
    for row, output in zip(found.rows[1:], found.outputs[1:], strict=True):
        if row.method in idle:
            assert "changes nothing" in row.error
            assert towers.READS[loaded[name].reads] in row.error
            assert output is None
        else:
            assert row.error is None
            assert not torch.equal(output, found.outputs[0])


def test_budgets_out_of_reach_are_rows_with_errors(loaded: dict[str, Any]) -> None:
    found = sweep.sweep(
        loaded["clip"], gallery(2), settings("pitome", keep=(1, Fraction(1, 2))), sweep.SweepRow
    )
    half, one = found.rows[1:]
    assert half.error is None
    assert "layer" in one.error


def test_nan_is_an_error_of_its_row(loaded: dict[str, Any]) -> None:
    """Merged tokens of later images overflow, say, in half precision."""
    model = loaded["clip"]

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        out = model.forward(pixels)
        return out / 0 if len(pixels) == 1 and hasattr(model.vision, "vtc") else out

    broken = dataclasses.replace(model, forward=forward)
    found = sweep.sweep(broken, gallery(4), settings("tome"), sweep.SweepRow)
    assert found.rows[0].error is None and found.outputs[0].shape == (4, 16)
    assert "NaN" in found.rows[1].error and found.outputs[1] is None
    with pytest.raises(ValueError, match="NaN"):
        sweep.sweep(broken, gallery(1), settings("tome"), sweep.SweepRow)


class Interrupting(Questions):
    """Ctrl-C while item 4 is read."""

    def __getitem__(self, index: Any) -> Item:
        if index == 4:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_interrupted_runs_keep_what_they_have(loaded: dict[str, Any]) -> None:
    task = Interrupting("random", gallery(6, captions=2).entries, "recall")
    whole = retrieval.run(loaded["clip"], gallery(3, captions=2), settings("tome"))
    part = retrieval.run(loaded["clip"], task, settings("tome"))
    assert (part["finished"], part["images"], part["captions"]) == (False, 3, 6)
    assert whole["finished"] is True
    assert [r["recall"] for r in part["rows"]] == [r["recall"] for r in whole["rows"]]
    assert "Interrupted" in caption(part)
    with pytest.raises(KeyboardInterrupt):  # nothing to keep yet
        retrieval.run(loaded["clip"], task, settings("tome", batch_size=6))

    def stop(*progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrieval.run(loaded["clip"], gallery(3), settings("tome"), stop)


def test_progress_reaches_its_end(loaded: dict[str, Any]) -> None:
    told: list[tuple[str, int, int]] = []
    sweep.sweep(
        loaded["clip"],
        gallery(7),
        settings("tome", repeats=2),
        sweep.SweepRow,
        progress=lambda *what: told.append(what),
    )
    assert [done for _, done, _ in told] == [0, 1, 2, 3, 4, 5]
    assert {total for _, _, total in told} == {6}


# ---- retrieval -----------------------------------------------------------------------------------


def test_recall_by_hand() -> None:
    """Three images; the first has two captions, and one of them is nearest to it."""
    similarity = torch.tensor(
        [
            # a     a2    b     c
            [0.9, 0.1, 0.3, 0.2],  # image a: its first caption is nearest
            [0.2, 0.8, 0.4, 0.3],  # image b: a2 is nearer than its own
            [0.3, 0.2, 0.7, 0.6],  # image c: b is nearer than its own
        ]
    )
    row = retrieval.RetrievalRow("hand", [], None)
    # Texts are unit vectors, so that images @ texts.T is the matrix.
    retrieval.score(row, similarity, torch.eye(4), [0, 0, 1, 2], seed=0)
    assert row.recall["image_to_text"] == {"1": pytest.approx(1 / 3), "5": 1.0, "10": 1.0}
    # a -> image a; a2 -> image b (wrong); b -> image c (wrong); c -> image c
    assert row.recall["text_to_image"] == {"1": 0.5, "5": 1.0, "10": 1.0}
    for direction in retrieval.DIRECTIONS:
        low, high = (t[direction]["1"] for t in (row.recall_low, row.recall_high))
        assert low < row.recall[direction]["1"] < high
        assert row.recall_low[direction]["5"] == row.recall_high[direction]["5"] == 1.0


def test_queries_are_ranked_in_chunks(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    queries, texts = torch.randn(10, 8), torch.randn(30, 8)
    positives = [(3 * i, 3 * i + 1) for i in range(10)]
    whole = retrieval.ranked_hits(queries, texts, positives)
    monkeypatch.setattr(retrieval, "CHUNK", 3)
    assert torch.equal(retrieval.ranked_hits(queries, texts, positives), whole)
    assert whole.shape == (10, 3) and 0 < whole.sum() < 30


@pytest.mark.slow
def test_the_embedded_model_finds_its_captions(loaded: dict[str, Any]) -> None:
    """As its trainer measures it (`tiny.evaluate.recall`): 99 % and 98 % of 100 scenes."""
    result = retrieval.run(loaded["embedded"], open_captions("scenes", 100), settings(batch_size=4))
    (stock,) = result["rows"]
    assert stock["recall"]["image_to_text"] == {"1": 0.99, "5": 1.0, "10": 1.0}
    assert stock["recall"]["text_to_image"] == {"1": 0.98, "5": 1.0, "10": 1.0}


def test_a_retrieval_result(loaded: dict[str, Any]) -> None:
    result = retrieval.run(loaded["clip"], gallery(5, captions=2), settings("tome", "fastv"))
    assert json.loads(json.dumps(result)) == result
    assert (result["benchmark"], result["images"], result["captions"]) == ("retrieval", 5, 10)
    for key in ("date", "settings", "versions", "machine", "finished", "skipped", "problems"):
        assert key in result
    stock, tome, fastv = result["rows"]
    assert set(stock["recall"]["image_to_text"]) == {"1", "5", "10"}
    assert tome["recall"] and not fastv["recall"] and fastv["error"]
    again = retrieval.run(loaded["clip"], gallery(5, captions=2), settings("tome", "fastv"))
    assert again["rows"] == result["rows"]
    cells = fill(retrieval.COLUMNS, result["rows"]).lines[1:]
    assert cells[0][0] == BASELINE and cells[2][7:] == [""] * 6


# ---- data ----------------------------------------------------------------------------------------


def write_images(folder: Path, n: int = 3) -> None:
    for i, image in enumerate(pictures(n)):
        image.save(folder / f"{i}.png")


def test_captions_of_your_own(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows: list[Any] = [
        {"image": "0.png", "captions": ["one", "two"]},
        {"image": "1.png", "captions": "no list"},
        {"image": "absent.png", "captions": ["three"]},
        {"image": "./0.png", "captions": ["again"]},
        {"image": "2.png", "captions": ["four"]},
        {"image": "2.png", "captions": []},
        {"image": "2.png", "captions": [""]},
    ]
    lines = [json.dumps(row) for row in rows] + ["{broken"]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    task = open_captions(str(tmp_path / "own.jsonl"))
    assert [item.answers for item in task] == [("one", "two", "again"), ("four",)]
    assert [where for where, _ in task.problems] == [f"own.jsonl:{n}" for n in (2, 3, 6, 7, 8)]
    assert task.name == "own" and task[0].image.size == (48, 40)
    assert task.fingerprint == open_captions(tmp_path / "own.jsonl").fingerprint
    assert len(open_captions(tmp_path / "own.jsonl", 1)) == 1
    for spec, says in (("nothing.jsonl", "no such file"), ("gqa", "flickr30k, coco")):
        with pytest.raises(ValueError, match=says):
            open_captions(spec)
    (tmp_path / "empty.jsonl").write_text(lines[1])
    with pytest.raises(ValueError, match=r"empty\.jsonl:1: .*list"):
        open_captions(tmp_path / "empty.jsonl")


def test_captions_in_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_images(tmp_path)
    captions = [["one", "two"], ["three"], None]
    paths = [f"{i}.png" for i in range(3)]
    data = [(tmp_path / p).read_bytes() for p in paths]
    for name, column in (("paths", paths), ("bytes", [{"bytes": d, "path": None} for d in data])):
        file = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": column, "captions": captions}), file)
        task = open_captions(file)
        assert [item.answers for item in task] == [("one", "two"), ("three",)]
        assert np.array_equal(task[1].image, pictures(3)[1])
        assert [where for where, _ in task.problems] == [f"{name}.parquet:3"]


def test_captions_of_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_images(tmp_path, 2)
    rows = [
        {
            "image": {"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None},
            "caption": [f"{i} a", f"{i} b"],
            "img_id": str(i),
        }
        for i in range(2)
    ]
    (tmp_path / "flickr30k" / "data").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows), tmp_path / "flickr30k" / "data" / "test-0-of-1.parquet"
    )
    monkeypatch.setenv("VTC_DATA", str(tmp_path))
    task = open_captions("flickr30k")
    assert [item.answers for item in task] == [("0 a", "0 b"), ("1 a", "1 b")]
    assert np.array_equal(task[1].image, pictures(2)[1])


def test_scenes_are_the_same_for_the_same_seed() -> None:
    a, b = open_captions("scenes", 3), open_captions("scenes", 3)
    assert len(open_captions("scenes")) == 200
    assert [x.answers for x in a] == [x.answers for x in b]
    assert np.array_equal(a[2].image, b[2].image)
    assert a[0].answers != open_captions("scenes", 3, seed=1)[0].answers


def test_unreadable_images_are_left_out_and_counted(loaded: dict[str, Any], tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    (tmp_path / "1.png").write_bytes(b"no image")
    data = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(data[: len(data) // 2])
    lines = [json.dumps({"image": f"{i}.png", "captions": [f"{i}"]}) for i in range(5)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    with (tmp_path / "own.jsonl").open("a") as file:
        file.write('\n{"image": "4.png"}')
    task = open_captions(tmp_path / "own.jsonl")
    result = retrieval.run(loaded["clip"], task, settings("tome", batch_size=2))
    assert "1 rows refused; the first: own.jsonl:6: " in caption(result)
    assert (result["images"], result["captions"], result["finished"]) == (3, 3, True)
    assert [s["where"] for s in result["skipped"]] == ["own.jsonl:2", "own.jsonl:4"]
    assert all("cannot read" in s["why"] for s in result["skipped"])
    assert "2 images left out; the first: own.jsonl:2" in caption(result)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    task = open_captions(tmp_path / "own.jsonl")
    with pytest.raises(ValueError, match=r"none of 5 images .* first is own\.jsonl:1"):
        retrieval.run(loaded["clip"], task, settings("tome"))


# ---- classification ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven classes of two images, as torchvision's ImageFolder wants them, and some clutter."""
    root = tmp_path / "val"
    for i, color in enumerate(COLORS):
        (root / color / "deep").mkdir(parents=True)
        for j, image in enumerate(pictures(2, seed=i)):
            image.save(root / color / ("deep" if j else "") / f"{j}.PNG")
    (root / "notes.txt").write_text("not a class")
    (root / "red" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    return root


def test_class_folders(folder: Path) -> None:
    task = ClassFolder(folder)
    assert task.classes == sorted(COLORS) and len(task) == 14
    assert [item.answer for item in task][:4] == ["black", "black", "blue", "blue"]
    assert task[0].id == "black/0.PNG" and not task.problems
    drawn = [item.id for item in ClassFolder(folder, 5)]
    assert len(drawn) == 5 and drawn == [item.id for item in ClassFolder(folder, 5)]
    assert drawn != [item.id for item in ClassFolder(folder, 5, seed=1)]
    empty = folder.parent / "empty"
    (empty / "red").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty: no images in its 1 subfolders"):
        ClassFolder(empty)
    (folder / "zebra").mkdir()
    assert ClassFolder(folder).problems == [("zebra", "a class without images")]
    for where, says in (("nowhere", "no folder"), ("red/deep", "no subfolders")):
        with pytest.raises(ValueError, match=says):
            ClassFolder(folder / where)


def test_names_and_outputs_of_classes(tmp_path: Path) -> None:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    classes = ["n01", "n02_b"]
    assert class_names(classes) == ["n01", "n02 b"]
    assert class_names(classes, write("a.txt", "tench\n\ngoldfish\n")) == ["tench", "goldfish"]
    named = write("a.json", {"n02_b": "goldfish", "n01": "tench", "n03": "shark"})
    assert class_names(classes, named) == ["tench", "goldfish"]
    assert class_outputs(classes, 2) == {"n01": 0, "n02_b": 1}
    assert class_outputs(classes, 9, write("b.json", {"n01": 8, "n02_b": 3})) == {
        "n01": 8,
        "n02_b": 3,
    }
    with pytest.raises(ValueError, match="2 class folders and a classifier of 1000 outputs"):
        class_outputs(classes, 1000)
    for content, says in (
        ({"n01": 0}, "lacks 1 class folders; the first is n02_b"),
        ({"n01": 0, "n02_b": 9}, "0 to 8"),
        ({"n01": 0, "n02_b": -1}, "0 to 8"),
        ({"n01": 0, "n02_b": True}, "0 to 8"),
        ({"n01": 0, "n02_b": "b"}, "0 to 8"),
        ({"n01": 0, "n02_b": 0}, "two folders"),
        ([0, 1], "object"),
        ("{", "cannot read"),
    ):
        with pytest.raises(ValueError, match=says):
            class_outputs(classes, 9, write("c.json", content))
    with pytest.raises(ValueError, match="names"):
        class_names(classes, write("d.json", {"n01": 0, "n02_b": 1}))
    with pytest.raises(ValueError, match="1 names and there are 2"):
        class_names(classes, write("e.txt", "tench"))
    with pytest.raises(ValueError, match="cannot read"):
        class_names(classes, tmp_path / "absent.txt")


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[3.0, 1, 2, 0, 0, 0], [0, 1, 0, 0, 0, 9], [5, 4, 3, 2, 1, 0]])
    row = classification.ClassificationRow("hand", [], None)
    classification.score(row, classification.best(logits), [0, 1, 5], seed=0)
    assert (row.accuracy, row.top5) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert row.accuracy_low < row.accuracy < row.accuracy_high


def test_accuracy_is_that_of_the_metrics() -> None:
    """Rounded, so that there are ties; and with fewer than five classes."""
    torch.manual_seed(0)
    for classes in (9, 3):
        logits, labels = torch.randn(40, classes).round(), [i % classes for i in range(40)]
        row = classification.ClassificationRow("random", [], None)
        classification.score(row, classification.best(logits), labels, seed=0)
        assert {1: row.accuracy, 5: row.top5} == pytest.approx(top_k_accuracy(logits, labels))


def test_classifier_on_the_labels_it_gives(loaded: dict[str, Any], folder: Path) -> None:
    """A mapping from each folder to what the stock model answers makes it right."""
    model, task = loaded["timm"], ClassFolder(folder)
    said = model.encode_images([item.image for item in task]).argmax(1).tolist()
    first = {item.answer: s for item, s in reversed(list(zip(task, said, strict=True)))}
    right = [said[i] == first[item.answer] for i, item in enumerate(task)]
    result = classification.run(model, task, first, settings("tome", "random", keep=(4,)))
    stock, tome, random = result["rows"]
    assert (result["benchmark"], result["classes"], result["outputs"]) == ("classification", 7, 7)
    assert stock["accuracy"] == pytest.approx(sum(right) / 14) and stock["agreement"] == 1.0
    assert tome["final_tokens"] == 4 and 0 <= tome["agreement"] < 1.0
    assert random["error"] and random["accuracy"] is None
    assert json.loads(json.dumps(result)) == result


def test_zero_shot_is_the_nearest_mean_of_prompts(loaded: dict[str, Any]) -> None:
    model = loaded["clip"]
    made = classification.zero_shot(model, ["red", "navy"], ["a {} .", "a photo of {}"])
    prompts = [["a red .", "a photo of red"], ["a navy .", "a photo of navy"]]
    means = torch.stack([model.encode_texts(p).mean(0) for p in prompts])
    cosine = nn.functional.cosine_similarity
    images = model.encode_images(pictures(3))
    want = cosine(images[:, None], means[None], dim=-1)
    torch.testing.assert_close(made.encode_images(pictures(3)), want)
    assert made.classes == 2
    with pytest.raises(ValueError, match=r"one \{\}"):
        classification.zero_shot(model, ["red"], ["a photo"])


# ---- commands ------------------------------------------------------------------------------------


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def test_vtc_retrieval(saved: dict[str, str], tmp_path: Path) -> None:
    write_images(tmp_path)
    lines = [json.dumps({"image": f"{i}.png", "captions": [COLORS[i]]}) for i in range(3)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    common = ("retrieval", tmp_path / "own.jsonl", "--methods", "tome,random", "--keep", "0.5")
    common += ("--repeats", "1", "--out", tmp_path / "out", "--model", saved["clip"])
    done = invoke(*common)
    assert done.exit_code == 0, done.output
    assert "uncompressed" in done.stdout and "i->t @1" in done.stdout
    assert "random on own: changes nothing here" in done.stdout
    written = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert written["benchmark"] == "retrieval" and written["command"].startswith("vtc")
    done = invoke(*common, "--json", "--samples", "2")
    assert json.loads(done.stdout)["images"] == 2


def test_ctrl_c_writes_what_there_is(
    saved: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    task = Interrupting("random", gallery(6).entries, "recall")
    monkeypatch.setattr("vtc.benchmarks.tasks.galleries.open_captions", lambda *_: task)
    done = invoke(
        *("retrieval", "--model", saved["clip"], "--methods", "tome", "--keep", "0.5"),
        *("--repeats", "0", "--batch-size", "2", "--out", tmp_path),
    )
    assert done.exit_code == 130
    assert "Interrupted" in done.stdout
    written = json.loads((tmp_path / "retrieval.json").read_text())
    assert written["finished"] is False and written["images"] == 4


def test_vtc_classify(saved: dict[str, str], folder: Path, tmp_path: Path) -> None:
    common = ("--methods", "tome", "--keep", "16", "--repeats", "0", "--out", tmp_path / "out")
    for model, options in (("timm", ()), ("open_clip", ("--template", "a {} picture"))):
        done = invoke("classify", folder, "--model", saved[model], *options, *common)
        assert done.exit_code == 0, done.output
        assert "top-1" in done.stdout and "same %" in done.stdout
    written = json.loads((tmp_path / "out" / "classification.json").read_text())
    assert written["rows"][1]["final_tokens"] == 16


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "own.parquet").touch()
    for module, args, extra in (
        ("pyarrow.parquet", (tmp_path / "own.parquet",), "data"),
        ("open_clip", ("--model", "open_clip:ViT-B-32/openai"), "open-clip"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        done = invoke("retrieval", *args)
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert f"[{extra}]" in done.stderr


def test_mistakes_are_one_clear_line(
    saved: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "three.json").write_text("{}")
    (tmp_path / "blocked").touch()
    classless = save_timm(tmp_path / "classless", classes=0)
    run = ("--methods", "tome", "--keep", "0.5", "--repeats", "0")
    for args, says in (
        (("retrieval", "nonsense"), "flickr30k"),
        (("retrieval", "--methods", "tomee"), "tome"),
        (("retrieval", "--keep", "7.5"), "(0, 1]"),
        (("retrieval", "--dtype", "int8"), "int8"),
        (("retrieval", "--model", tmp_path / "nothing"), "cannot load"),
        (("retrieval", "--model", saved["timm"]), "vtc classify"),
        (("classify", tmp_path / "no", "--model", saved["timm"]), "no folder"),
        (("classify", folder / "red", "--model", saved["timm"]), "1 class folders"),
        (("classify", folder, "--model", classless), f"error: {classless} has no classes"),
        (("classify", folder, "--model", saved["timm"], "--template", "{}"), "prompts"),
        (
            ("classify", folder, "--model", saved["timm"], "--classes", tmp_path / "three.json"),
            "lacks 7",
        ),
        (("classify", folder, "--model", saved["clip"], "--template", "x"), "one {}"),
        (
            ("classify", folder, "--model", saved["timm"], *run, "--out", tmp_path / "blocked"),
            "cannot write",
        ),
    ):
        done = invoke(*args)
        assert done.exit_code == 2, (args, done.output)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and says in last, (args, done.stderr)
        assert "Traceback" not in done.output
