# SPDX-License-Identifier: Apache-2.0
"""The lmms-eval plug-in: requests on a mini model, and real runs of its command on a local task."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lmms_eval")

import numpy as np
import torch
import yaml
from chats import made, picture
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.models.model_utils import gen_metrics
from lmms_eval.models.registry_v2 import ModelRegistryV2
from lmms_eval.utils import simple_parse_args_string

import vtc
from vtc.benchmarks.accuracy import run as runner
from vtc.benchmarks.harnesses import lmms_entry, lmms_model, lmms_tasks
from vtc.benchmarks.harnesses.chat import user_turn
from vtc.benchmarks.harnesses.lmms_model import VTC, SimpleVTC, generation_of
from vtc.benchmarks.harnesses.model_args import LoadOptions, parse
from vtc.benchmarks.metrics.scores import metric
from vtc.benchmarks.tasks.items import score
from vtc.benchmarks.tasks.registry import Task
from vtc.benchmarks.tiny.models import load_llava

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ["what colour ?", "is there a red circle ?", "what shape is a square ?", "yes or no ?"]
DOCS = [{"image": picture(i)} for i in range(len(QUESTIONS))]
METHOD = {"method": "visionzip", "keep_tokens": 4}


@pytest.fixture
def mini(monkeypatch):
    """Make a plug-in whose model is a mini LLaVA and whose task has four documents."""
    stock = made()
    monkeypatch.setattr(LoadOptions, "load", lambda self, device: (stock.model, stock.processor))
    gen_metrics.reset_logged_metrics()

    def make(cls, **arguments):
        given = ",".join(f"{k}={v}" for k, v in {"pretrained": "mini", **arguments}.items())
        plugin = cls.create_from_arg_string(given, {"batch_size": "2", "device": "cpu"})
        plugin.task_dict = {"task": {"test": DOCS}}
        return plugin

    return make


def asked(kind: str, *arguments, doc: int) -> Instance:
    return Instance(
        request_type=kind,
        arguments=(*arguments, doc, "task", "test"),
        idx=0,
        metadata={"task": "task", "doc_id": doc, "repeats": 1},
    )


def messages(i: int):
    return lambda doc: [
        {
            "role": "user",
            "content": [
                {"type": "image", "url": doc["image"]},
                {"type": "text", "text": QUESTIONS[i]},
            ],
        }
    ]


def generate(cls, settings: list[dict]) -> list[Instance]:
    """A request for each document, in the form that lmms-eval has for this class."""
    return [
        asked("generate_until", "", messages(i), how, doc=i)
        if cls is VTC
        else asked("generate_until", QUESTIONS[i], how, lambda doc: [doc["image"]], doc=i)
        for i, how in enumerate(settings)
    ]


# ---- registration --------------------------------------------------------------------------------


def test_lmms_eval_takes_the_manifest():
    registry = ModelRegistryV2()
    registry.register_manifest(lmms_entry.manifest())
    assert registry.get_model_class("vtc") is VTC
    assert registry.get_model_class("vtc", force_simple=True) is SimpleVTC


def entry_points() -> dict[str, str]:
    """Of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(
        r'^\[project\.entry-points\."lmms_eval\.models"\]\n((?:.+ = ".+"\n)+)', text, re.M
    )
    return dict(re.findall(r'(\S+) = "(\S+)"', block))


# ---- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [VTC, SimpleVTC])
def test_answers_come_in_the_order_of_the_requests(mini, cls):
    """Batches of two, and prompts with other settings apart from them."""
    plugin = mini(cls, **METHOD)
    settings = [{"max_new_tokens": n} for n in (3, 5, 3, 3)]
    results = plugin.generate_until(generate(cls, settings))
    for i, (result, how) in enumerate(zip(results, settings)):
        (alone,) = plugin.chat.answer(
            [user_turn([DOCS[i]["image"]], QUESTIONS[i])], do_sample=False, **how
        )
        assert isinstance(result, GenerationResult)
        assert (result.text, result.token_counts.output_tokens) == (
            alone.text,
            how["max_new_tokens"],
        )
        assert result.token_counts.input_tokens == 16 + 2 + len(QUESTIONS[i].split())
    assert len({result.text for result in results}) > 1, "no teeth"


def test_times_and_tokens_go_to_the_throughput_block(mini):
    plugin = mini(VTC, **METHOD)
    plugin.generate_until(generate(VTC, [{"max_new_tokens": 4}] * 4))
    found = gen_metrics.summarize_logged_metrics()
    assert found["total_gen_tokens"] == 16 and found["total_elapsed_time"] > 0
    assert found["avg_latency"] == pytest.approx(found["total_elapsed_time"] / 4)
    assert (found["avg_visual_tokens"], found["avg_final_tokens"]) == (16, 4)
    assert 0 < found["avg_flops_share"] < 1 and 0 < found["avg_kv_share"] < 1
    assert 0 < found["avg_ttft"] < found["total_elapsed_time"] and found["avg_tpot"] > 0
    plugin.generate_until(generate(VTC, [{"max_new_tokens": 4}] * 4)[:1])
    assert gen_metrics.get_logged_metrics_history()[-1]["total_requests"] == 1  # counts anew
    assert plugin.generate_until([]) == []


def test_stock_runs_report_times_alone(mini):
    plugin = mini(VTC)
    plugin.generate_until(generate(VTC, [{"max_new_tokens": 4}]))
    assert plugin.chat.session is None
    assert "avg_final_tokens" not in gen_metrics.summarize_logged_metrics()


def test_answers_end_where_the_task_says(mini):
    plugin = mini(VTC)
    (whole,) = plugin.generate_until(generate(VTC, [{"max_new_tokens": 8}]))
    words = whole.text.split(" ")
    end = " " + words[1]
    how = {"max_new_tokens": 8, "until": ["nowhere", end, "\n\n"]}
    (cut,) = plugin.generate_until(generate(VTC, [how]))
    assert len(words) > 2 and cut.text == whole.text.split(end)[0] != whole.text


def test_generation_settings():
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    assert generation_of({}) == ({"max_new_tokens": 1024, **greedy}, [])
    assert generation_of({"max_gen_toks": 7, "temperature": 0, "top_p": 0.9, "until": "x"}) == (
        {"max_new_tokens": 7, **greedy},
        ["x"],
    )
    sampled = {"temperature": 0.7, "top_p": 0.9, "num_beams": 2, "max_new_tokens": 5}
    assert generation_of(sampled) == ({**sampled, "do_sample": True}, [])
    assert generation_of({**sampled, "do_sample": False})[0]["do_sample"] is False
    assert generation_of({"do_sample": True})[0]["do_sample"] is False  # at no temperature
    assert generation_of({"image_aspect_ratio": "pad", "until": None})[0].keys() == {
        "max_new_tokens",
        *greedy,
    }


def test_likelihoods_of_choices(mini):
    """A loss and the greedy flag for each request, in order, in a form that lmms-eval keeps."""
    plugin = mini(SimpleVTC, **METHOD)
    visuals = lambda doc: [doc["image"]]  # noqa: E731
    requests = [
        asked("loglikelihood", QUESTIONS[i], choice, visuals, doc=i)
        for choice in (" red", " a blue circle", lambda doc: " no")
        for i in (1, 0)
    ]
    results = [unwrap_generation_output(r)[0] for r in plugin.loglikelihood(requests)]
    for i in (0, 1):
        chat = user_turn([DOCS[i]["image"]], QUESTIONS[i])
        want = plugin.chat.losses([chat] * 3, [" red", " a blue circle", " no"])
        for (loss, greedy), (slow, flag) in zip(results[1 - i :: 2], want, strict=True):
            assert (loss, greedy) == (pytest.approx(slow, abs=1e-4), flag)
    assert results[0] != results[1]
    metrics = gen_metrics.summarize_logged_metrics()
    assert metrics["avg_final_tokens"] == 4 and metrics["total_gen_tokens"] == 0


def test_what_cannot_be_asked_is_said(mini):
    plugin = mini(SimpleVTC)
    alone = Instance("loglikelihood", ("", "red"), 0, {"task": "t", "doc_id": 0, "repeats": 1})
    with pytest.raises(NotImplementedError, match="t: acc_mutual_info asks for choices without"):
        plugin.loglikelihood([alone])
    with pytest.raises(NotImplementedError, match=r"task: .*generate_until_multi_round"):
        plugin.generate_until_multi_round([asked("generate_until_multi_round", doc=0)])
    with pytest.raises(ValueError, match="batch_size is a number of prompts, got auto"):
        VTC(batch_size="auto", pretrained="mini")
    with pytest.raises(ValueError, match='unknown argument "keep_ration"'):
        mini(VTC, method="visionzip", keep_ration=0.5)
    with pytest.raises(vtc.UnsupportedError, match="routers"):
        mini(VTC, method="mod")


def test_one_process_of_several_takes_no_model_over_devices(monkeypatch):
    several = SimpleNamespace(process_index=0, num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr(lmms_model, "Accelerator", lambda: several)
    with pytest.raises(ValueError, match="device_map spreads one model over devices; start one"):
        VTC(pretrained="mini", device_map="auto")


def test_clean_lets_go_of_the_model(mini):
    plugin = mini(VTC)
    plugin.clean()
    assert not hasattr(plugin, "chat")


# ---- real runs -----------------------------------------------------------------------------------


def installed(folder: Path) -> Path:
    """Write the metadata of an installed vtc, so that lmms-eval finds its entry point as ever."""
    info = folder / "visual_token_compression-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: visual-token-compression\nVersion: 0\n"
    )
    lines = [f"{name} = {target}" for name, target in entry_points().items()]
    (info / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines]))
    return folder


def result_of(folder: Path) -> tuple[dict, list[dict]]:
    (results,) = folder.glob("*/*_results.json")
    (samples,) = folder.glob("*/*_samples_*.jsonl")
    return json.loads(results.read_text()), [
        json.loads(line) for line in samples.read_text().splitlines()
    ]


@pytest.mark.slow
def test_lmms_eval_gives_the_accuracies_of_vtc_bench(tmp_path):
    """``python -m lmms_eval`` on 16 questions: stock, with a method, and by likelihood."""
    n, limit = 20, 16
    task = lmms_tasks.write(tmp_path / "tasks", "scenes", n)
    choice = yaml.safe_load(
        (tmp_path / "tasks" / f"{task}.yaml").read_text().replace("!function ", "")
    )
    del choice["process_results"], choice["generation_kwargs"]
    items = list(Task("scenes", n=limit))
    choice |= {
        "task": "vtc_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": list(dict.fromkeys(item.answer for item in items[:4])),
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks" / "choice.yaml").write_text(yaml.safe_dump(choice))

    method = "pretrained=tiny-llava,method=visionzip,keep_ratio=0.25"
    shared = {"model": "vtc", "include_path": str(tmp_path / "tasks"), "log_samples": True}
    runs = [
        {"model_args": "pretrained=tiny-llava", "tasks": task, "limit": limit, "batch_size": "8", "output_path": "stock"},
        {"model_args": method, "tasks": task, "limit": limit, "batch_size": "8", "output_path": "method"},
        {"model_args": method, "tasks": "vtc_choice", "limit": 4, "batch_size": "8", "output_path": "choice", "force_simple": True},
    ]  # fmt: skip
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump([{**shared, **run} for run in runs]))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(installed(tmp_path / "site"))]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "lmms_eval", "--config", "runs.yaml", "--verbosity", "DEBUG"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]

    model, processor = load_llava()
    settings = runner.BenchSettings(methods=("visionzip",), keep=(144,), repeats=0, batch_size=8)
    ours = runner.run(model, processor, "scenes", items, metric("one-word"), settings)["rows"]
    for name, row in zip(("stock", "method"), ours):
        results, samples = result_of(tmp_path / name)
        assert len(samples) == results["n-samples"][task]["effective"] == limit
        assert results["results"][task]["accuracy,none"] == pytest.approx(row["accuracy"])
        scores = [float(score(s["filtered_resps"], s["target"])) for s in samples]
        assert sum(scores) / limit == pytest.approx(row["accuracy"])
        assert [s["target"] for s in samples] == [item.answer for item in items]
        assert results["config"]["model_backend"].endswith("lmms_model.VTC (chat)")
        assert results["efficiency"]["overall"]["total_input_tokens"] > 576 * limit
        assert results["throughput"]["total_gen_tokens"] == sum(
            s["token_counts"][0]["output_tokens"] for s in samples
        )
        assert results["throughput"]["avg_ttft"] > 0
    assert ours[0]["accuracy"] != ours[1]["accuracy"], "no teeth: choose a smaller budget"

    throughput = result_of(tmp_path / "method")[0]["throughput"]
    assert throughput["avg_visual_tokens"] == 576
    assert throughput["avg_final_tokens"] == throughput["avg_kv_tokens"] == 144
    assert 0 < throughput["avg_flops_share"] < 0.25
    assert "avg_final_tokens" not in result_of(tmp_path / "stock")[0]["throughput"]

    results, samples = result_of(tmp_path / "choice")
    assert results["config"]["model_backend"].endswith("lmms_model.SimpleVTC (simple)")
    assert results["throughput"]["avg_final_tokens"] == 144
    # The likeliest of all answers is what greedy decoding writes, where it writes an answer.
    written = {s["doc_id"]: s["filtered_resps"] for s in result_of(tmp_path / "method")[1]}
    choices, checked = choice["doc_to_choice"], 0
    for sample in samples:
        losses = [float(loss) for loss, _ in sample["filtered_resps"]]
        best = choices[losses.index(min(losses))]
        assert sample["acc"] == float(best == sample["target"])
        if written[sample["doc_id"]] in choices:
            checked += 1
            assert best == written[sample["doc_id"]]
    assert checked >= 3, "no teeth"


def test_local_tasks_hold_the_questions_of_vtc_bench(tmp_path):
    import datasets

    name = lmms_tasks.write(tmp_path, "scenes", 3)
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / f"{name}.parquet"), cache_dir=str(tmp_path / "c")
    )["train"]
    for row, item in zip(table, Task("scenes", n=3), strict=True):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(item.image))
        assert (row["question"], row["answer"], row["kind"]) == (
            item.question,
            item.answer,
            item.kind,
        )
        assert lmms_tasks.process_results(row, [f"The {item.answer}."]) == {"accuracy": 1.0}
        assert lmms_tasks.process_results(row, ["none of it"]) == {"accuracy": 0.0}


def test_a_local_task_is_written_from_the_command_line(tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "tasks")
    monkeypatch.setattr("sys.argv", ["lmms_tasks", "scenes", "--n", "2", "--out", out])
    lmms_tasks.main()
    task = yaml.safe_load(
        (tmp_path / "tasks" / "vtc_scenes.yaml").read_text().replace("!function ", "")
    )
    said = f"lmms-eval --model vtc --include_path {out} --tasks {task['task']}\n"
    assert capsys.readouterr().out == said
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).stat().st_size > 0


def test_model_args_of_the_docs_are_right():
    """Every ``--model_args`` that docs/engines.md shows."""
    text = (ROOT / "docs" / "engines.md").read_text()
    shown = re.findall(r"--model[_-]args\s+(?:\\\n\s*)?([^\s`]+)", text)
    assert len(shown) >= 4
    for line in shown:
        loading, _ = parse(simple_parse_args_string(line))
        assert loading.pretrained
    for field in fields(LoadOptions):
        assert f"`{field.name}`" in text, f"docs/engines.md does not tell of {field.name}"
