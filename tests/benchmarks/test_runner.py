# SPDX-License-Identifier: Apache-2.0
"""The benchmark runner on a mini random model: counts, honesty of what is shared, statistics."""

from __future__ import annotations

import json
import platform
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from mini_bench import METRIC, MODEL, PROCESSOR, bench, make_items
from PIL import Image

import vtc
from vtc.benchmarks.accuracy import answering, kept_sheet, tables
from vtc.benchmarks.accuracy import run as runner
from vtc.benchmarks.accuracy.encoder_cache import EncoderCache, leaves_encoder_alone
from vtc.benchmarks.measure import timing
from vtc.benchmarks.metrics import scores as metrics
from vtc.benchmarks.metrics import statistics
from vtc.benchmarks.pages import plots
from vtc.benchmarks.shared import budgets, files, prompts, provenance
from vtc.benchmarks.support import mini_families
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor
from vtc.session import observe

SETTINGS = runner.BenchSettings(
    methods=("fastv", "divprune", "pitome", "random"),
    keep=(Fraction(1), Fraction(1, 2), 4),
    batch_size=4,
    max_new_tokens=3,
    repeats=2,
)


@pytest.fixture(scope="module")
def model():
    return MODEL


@pytest.fixture(scope="module")
def processor(model):
    return PROCESSOR


@pytest.fixture(scope="module")
def result():
    return bench(None, make_items(), SETTINGS)


def test_batches_hold_every_question_once_and_every_image_once(processor):
    items = make_items(images=3, questions=4)
    batches = prompts.make_batches(processor, items, 5)
    got = [item for batch in batches for item in batch.items]
    assert sorted(map(id, got)) == sorted(map(id, items))
    for batch in batches:
        assert len(batch.items) <= 5
        assert len(batch.vision["pixel_values"]) == len(
            {prompts.image_key(i.image) for i in batch.items}
        )
        for item, which in zip(batch.items, batch.image_of):
            alone = processor(text=["<image>"], images=[item.image], return_tensors="pt")
            assert torch.equal(alone["pixel_values"][0], batch.vision["pixel_values"][which])
        padding = batch.text["attention_mask"] == 0
        assert not padding[:, -1].any()  # padded on the left


@pytest.mark.parametrize("method", [None, "fastv", "divprune", "pitome", "downsample", "visionzip"])
def test_sharing_the_encoder_between_questions_changes_no_answer(model, processor, method):
    (batch,) = prompts.make_batches(processor, make_items(images=2, questions=3), 6)
    plain = dict(batch.text, pixel_values=batch.vision["pixel_values"][batch.image_of])

    def ask() -> tuple[list[str], torch.Tensor]:
        shared = answering.answer_batch(model, processor, batch, 4)
        return shared, model.generate(**plain, do_sample=False, max_new_tokens=4)

    if method is None:
        shared, tokens = ask()
    else:
        with vtc.compressing(model, method, keep_tokens=6):
            shared, tokens = ask()
    new = tokens[:, batch.text["input_ids"].shape[1] :]
    assert shared == [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]


def seeded_or_plain(method: str, tokens: int) -> vtc.Method:
    try:
        return budgets.seeded(method, tokens, 0)
    except ValueError:  # takes no budget
        return budgets.seeded(method, None, 0)


@pytest.mark.parametrize(
    "method",
    [m for m in vtc.methods() if m not in ("mod", "evs")],  # they need routers, videos
)
def test_sharing_the_encoder_between_methods_changes_no_answer(model, processor, method):
    """A remembered encoder gives the same logits, and is only used where nothing happens in it."""
    (batch,) = prompts.make_batches(processor, make_items(images=2, questions=3), 6)
    chosen = seeded_or_plain(method, 6)
    fresh = dict(batch.text, pixel_values=batch.vision["pixel_values"][batch.image_of])
    encoder = EncoderCache.of(model, [budgets.seeded(m, None, 0) for m in vtc.methods()])
    with torch.no_grad():
        model(**fresh)  # transformers hooks its towers at the first call
    before = dict(vars(model.model.vision_tower))
    blocks: list[int] = []
    count = model.model.vision_tower.encoder.layers[0].register_forward_hook(
        lambda *_: blocks.append(0)
    )
    with torch.no_grad():
        with encoder.remembered(0):
            model(**fresh)
        with vtc.compressing(model, chosen):
            expected = model(**fresh).logits
        shared = encoder.remembered(0) if leaves_encoder_alone(chosen) else nullcontext()
        with vtc.compressing(model, chosen), shared:
            got = model(**fresh).logits
    count.remove()
    assert torch.equal(got, expected)
    assert vars(model.model.vision_tower).keys() == before.keys()
    assert len(blocks) == (2 if leaves_encoder_alone(chosen) else 3)
    known = {"random": True, "fastv": True, "pitome": False, "visionzip": True, "downsample": False}
    assert leaves_encoder_alone(chosen) == known.get(method, leaves_encoder_alone(chosen))


def test_only_towers_read_at_one_layer_are_remembered():
    assert EncoderCache.of(mini_families.build("Qwen2-VL"), []) is None


def test_rows_are_complete_and_consistent(result):
    rows = result["rows"]
    assert result["visual_tokens"] == 16
    assert [r["method"] for r in rows] == ["uncompressed"] + [
        m for m in SETTINGS.methods for _ in range(2)
    ]
    assert [r["asked_tokens"] for r in rows] == [16] + [8, 4] * len(SETTINGS.methods)
    for row in rows:
        assert row["error"] is None, row
        assert row["final_tokens"] == row["asked_tokens"]
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert 0 <= row["agreement"] <= 1
        assert set(row["accuracy_by_kind"]) == {"kind0", "kind1"}
        assert row["prefill_ms"] > 0
    base = rows[0]
    assert base["flops_share"] == base["kv_share"] == base["prefill_ratio"] == 1
    assert base["blank_accuracy"] is not None
    assert base["method_ms"] is None
    for row in rows[1:]:
        assert row["flops_share"] < 1
        assert row["kv_share"] < 1
        assert row["blank_accuracy"] is None
        assert row["method_ms"] is not None


def test_kv_bytes_are_those_the_report_tells(model, processor):
    (batch,) = prompts.make_batches(processor, make_items(1, 1), 1)
    inputs = dict(batch.text, pixel_values=batch.vision["pixel_values"])
    for name in (None, "fastv", "divprune"):
        context = observe(model) if name is None else vtc.compressing(model, name, keep_tokens=4)
        with context as session:
            _, measured = timing.timed_prefill(model, inputs)
            assert measured == session.report().kv_bytes, name


def test_result_is_json_and_says_where_it_comes_from(result, tmp_path):
    path = files.write_json(result, tmp_path / "deep" / "toy.json")
    again = json.loads(path.read_text())
    assert again["rows"] == result["rows"]
    assert {"python", "torch", "transformers", "vtc"} <= set(again["versions"])
    assert {"cpu", "cores", "device"} <= set(again["machine"])
    assert again["settings"]["seed"] == 0
    assert again["settings"]["keep"] == ["1", "1/2", "4"]
    assert again["timing"]["warmup_rounds"] == 1
    assert again["benchmark"] == "task" and again["metric"] == "odd" and again["finished"]


def test_a_result_comes_from_no_commit_outside_a_checkout_or_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(
        provenance, "__file__", str(tmp_path / "benchmarks" / "shared" / "provenance.py")
    )
    assert "commit" not in provenance.versions()
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "commit" not in provenance.versions()


def test_a_system_that_does_not_tell_its_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "Path", lambda name: tmp_path / "none")
    told = provenance.machine(torch.device("cpu"))["cpu"]
    assert told and told in (platform.processor(), platform.machine())


def test_accuracy_does_not_depend_on_the_run(result):
    settings = runner.BenchSettings(
        methods=("random",), keep=(4,), batch_size=2, max_new_tokens=3, repeats=0
    )
    again = bench(None, make_items(), settings)
    for row in again["rows"]:
        (before,) = [
            r
            for r in result["rows"]
            if (r["method"], r["asked_tokens"]) == (row["method"], row["asked_tokens"])
        ]
        for name in ("accuracy", "accuracy_low", "accuracy_high", "agreement", "kv_bytes"):
            assert row[name] == before[name]
        assert row["kl"] == pytest.approx(before["kl"], rel=1e-2, abs=1e-6)  # other padding
        assert row["prefill_ms"] is None  # not measured, not estimated


def test_a_method_that_cannot_run_keeps_its_row_and_says_why():
    model = mini_llava("siglip")
    settings = runner.BenchSettings(methods=("fastervlm", "random"), keep=(8,), repeats=1)
    args = (model, mini_processor(model), "toy", make_items(1, 2), METRIC, settings)
    result = runner.run(*args)
    bad, good = result["rows"][1:]
    assert "CLS" in bad["error"]
    assert bad["accuracy"] is bad["prefill_ms"] is bad["final_tokens"] is None
    assert good["error"] is None
    assert good["accuracy"] is not None
    assert "CLS" in tables.markdown(result)
    assert "vtc" not in vars(model)


def test_a_method_that_fails_on_some_images_keeps_its_row_and_stops(monkeypatch, tmp_path):
    seen = []

    def compressing(model, method):
        seen.append(method.name)
        if method.name == "pitome" and seen.count("pitome") == 2:
            raise vtc.UnsupportedError("not these images")
        return vtc.compressing(model, method)

    monkeypatch.setattr("vtc.benchmarks.accuracy.evaluation.compressing", compressing)
    settings = replace(SETTINGS, methods=("pitome", "random"), keep=(4,), repeats=0)
    result = bench(tmp_path, make_items(3, 4), settings)
    _, failed, fine = result["rows"]
    assert failed["error"] == "not these images" and failed["accuracy"] is None
    assert fine["error"] is None and fine["accuracy"] is not None
    assert seen == ["pitome", "random", "pitome", "random", "random"]
    assert "pitome" not in (tmp_path / "toy.predictions.jsonl").read_text().split("\n", 1)[1]


def test_summary_of_the_metric_is_in_the_rows():
    metric = metrics.Metric("count", lambda p, r: 0.0, lambda p, r: {"n": len(p), "refs": len(r)})
    settings = replace(SETTINGS, methods=("random",), repeats=0)
    args = (MODEL, PROCESSOR, "toy", make_items(), metric, settings)
    for row in runner.run(*args)["rows"]:
        assert row["summary"] == {"n": 9, "refs": 9}


def test_no_questions_is_an_error():
    with pytest.raises(ValueError, match="no questions"):
        bench(None, [], SETTINGS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("0.5", Fraction(1, 2)),
        ("0.33", Fraction(1, 3)),
        ("0.22", Fraction(2, 9)),
        ("0.11", Fraction(1, 9)),
        ("2/9", Fraction(2, 9)),
        ("0.05", Fraction(1, 20)),
        ("0.3", Fraction(3, 10)),
        ("128", 128),
    ],
)
def test_budgets_are_read_as_the_literature_means_them(text, value):
    assert budgets.parse_keep(text) == value


@pytest.mark.parametrize("text", ["0", "-0.5", "1.5", "many", "1/0", ""])
def test_bad_budgets_are_refused(text):
    with pytest.raises(ValueError, match=r"share|budget"):
        budgets.parse_keep(text)


def test_literature_budgets_of_576_tokens():
    found = budgets.token_budgets((Fraction(1), *budgets.SHARES), 576)
    assert list(found) == [288, 192, 128, 64]


def test_bootstrap_draws_images_not_questions():
    scores = np.repeat([1.0, 0.0] * 10, 8)  # eight questions about each of twenty images
    grouped = statistics.bootstrap(scores, np.repeat(np.arange(20), 8).tolist(), 0)
    alone = statistics.bootstrap(scores, list(range(160)), 0)
    assert grouped[0] < alone[0] < 0.5 < alone[1] < grouped[1]
    assert grouped == statistics.bootstrap(scores, np.repeat(np.arange(20), 8).tolist(), 0)


def test_pictures_and_tables(model, processor, result, tmp_path):
    pytest.importorskip("matplotlib")
    plot = plots.pareto(result, tmp_path / "p.png")
    sheet = kept_sheet.show_kept(
        model, processor, make_items()[0], 16, SETTINGS, tmp_path / "k.png", size=100
    )
    settings = replace(SETTINGS, methods=(*SETTINGS.methods, "vidkv", "mod"))
    again = kept_sheet.show_kept(
        model, processor, make_items()[0], 16, settings, tmp_path / "a.png", size=100
    )
    assert sheet.read_bytes() == again.read_bytes()  # one takes no budget, one cannot run
    for path in (plot, sheet):
        with Image.open(path) as image:
            assert min(image.size) > 100
    text = tables.markdown(result)
    assert text.count("\n|") == len(result["rows"]) + 1
    text = tables.overview([result])
    assert "| divprune |" in text
    assert "toy, 8 of 16" in text
    assert text.count("↓") == 1 + sum(
        r["accuracy"] < c["accuracy"]
        for r in result["rows"][1:]
        for c in result["rows"]
        if c["method"] == "random" and c["asked_tokens"] == r["asked_tokens"]
    )


def test_methods_without_a_budget_and_those_that_cannot_run():
    settings = runner.BenchSettings(
        methods=("mod", "random", "vidkv"), keep=(Fraction(1, 2),), repeats=0
    )
    result = bench(None, make_items(1, 2), settings)
    _, mod, random, vidkv = result["rows"]
    assert "routers" in mod["error"] and mod["accuracy"] is None
    assert random["asked_tokens"] == 8 and vidkv["asked_tokens"] is None
    assert vidkv["final_tokens"] == 16 and vidkv["accuracy"] is not None
    text = tables.overview([result])
    assert "| mod | - |" in text and "* mod on toy: mod runs routers" in text
    assert "(all) |" in text
    assert tables.failures([result])[0] in tables.markdown(result)


def test_equal_flops():
    names = ("fastv", "divprune", "random", "prefixkv")
    settings = runner.BenchSettings(methods=names, flops=0.6, repeats=0)
    result = bench(None, make_items(1, 2), settings)
    *found, cache = result["rows"][1:]
    for row in found:  # a token more or less on 16
        assert row["flops_share"] == pytest.approx(0.6, abs=0.05), row["method"]
        assert row["final_tokens"] == pytest.approx(round(row["final_tokens"]))
    assert found[0]["final_tokens"] < found[1]["final_tokens"] == found[2]["final_tokens"]
    assert cache["accuracy"] is None and "prefixkv" in cache["error"]
    assert "toy, equal FLOPs" in tables.overview([result])


@pytest.mark.parametrize("name", ["easy-vqa", "scenes", "small-text", "flops-scenes"])
def test_results_of_earlier_releases_can_still_be_read(name, tmp_path):
    """They lack the fields that came later."""
    pytest.importorskip("matplotlib")
    folder = Path(provenance.__file__).parents[1] / "results"
    result = json.loads((folder / f"{name}.json").read_text())
    assert "kl" not in result["rows"][0]
    assert "| fastv |" in tables.overview(tables.merged([result]))
    text = tables.markdown(result)
    assert text.count("\n|") == len(result["rows"]) + 1
    assert tables.notes(result) == []
    with Image.open(plots.pareto(result, tmp_path / "p.png")) as image:
        assert min(image.size) > 100


def test_runs_of_one_task_are_merged(result):
    halves = []
    for names in (("fastv", "random"), ("divprune", "pitome")):
        rows = [r for r in result["rows"] if r["method"] in ("uncompressed", *names)]
        halves.append({**result, "rows": rows})
    (whole,) = tables.merged([halves[1], halves[0]])
    assert [r["method"] for r in whole["rows"][1:]] == sorted(
        r["method"] for r in result["rows"][1:]
    )
    assert tables.overview([whole]).count("↓") == tables.overview([result]).count("↓")
    again = {**halves[0], "rows": [{**r, "accuracy": 0.5} for r in halves[0]["rows"]]}
    (newer,) = tables.merged([result, again])
    assert {r["accuracy"] for r in newer["rows"] if r["method"] == "random"} == {0.5}
    with pytest.raises(ValueError, match="differ in questions"):
        tables.merged([result, {**result, "questions": 1}])
