# SPDX-License-Identifier: Apache-2.0
"""Every method at every budget on the same questions, with the uncompressed model beside it.

What is measured, and how:

* Accuracy: greedy answers to padded batches. The image encoder runs once for each image, not once
  for each question. Methods that do not change it share its output; of blocks that they look into,
  the attention runs again on its remembered input.
* Time: one prompt with one image (batch 1), from pixels to the logits of the first answer token.
  The stock model, without any hook of ours, takes its turn among the methods in every round; the
  first round is a warm-up and is not counted. Medians are reported.
* KV bytes: the storage that the cache of that prompt holds.
* Nothing is estimated: what was not measured is None.
"""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import inspect
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..adapters.locate import locate
from ..errors import UnsupportedError
from ..matching import match
from ..method import Chain, Method, resolve
from ..wrapping import compressing, observe

SHARES = (Fraction(1, 2), Fraction(1, 3), Fraction(2, 9), Fraction(1, 9))
"""The budgets of the literature: 288, 192, 128 and 64 of LLaVA-1.5's 576 tokens."""

VARIANTS: dict[str, dict[str, Any]] = {"cdpruner": {"relevance": "none"}}
"""How methods run that need more than a model and an image, which the embedded models lack."""

VISION_INPUTS = ("pixel_values", "image_sizes")

Progress = Callable[[str, int, int], None]
"""Called with what is running, steps done and steps in all."""


@dataclass(frozen=True)
class Settings:
    """How a benchmark runs.

    Attributes:
        methods: registered names.
        keep: budgets, shares of the visual tokens or counts; the uncompressed model always runs.
        flops: instead of budgets, the share of the LLM's FLOPs (visual tokens) that every method is
            tuned to with `vtc.match`; one that cannot reach it says so in its row.
        batch_size: questions answered together; max_new_tokens: length of an answer.
        repeats: timed forwards of each configuration after one warm-up; 0 measures no time.
        seed: of the bootstrap and of methods that draw at random.
    """

    methods: tuple[str, ...]
    keep: tuple[Fraction | int, ...] = SHARES
    flops: float | None = None
    batch_size: int = 20
    max_new_tokens: int = 6
    repeats: int = 7
    seed: int = 0


@dataclass
class Row:
    """One method at one budget. Times in milliseconds; shares and ratios are of the stock model."""

    method: str
    stages: list[str]
    asked_tokens: int | None
    parameters: str = ""
    final_tokens: float | None = None
    average_tokens: float | None = None
    flops_g: float | None = None
    flops_share: float | None = None
    flops_all_g: float | None = None
    flops_all_share: float | None = None
    prefill_ms: float | None = None
    prefill_ratio: float | None = None
    vision_ms: float | None = None
    llm_prefill_ms: float | None = None
    method_ms: float | None = None
    kv_bytes: int | None = None
    kv_share: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    agreement: float | None = None
    blank_accuracy: float | None = None
    accuracy_by_kind: dict[str, float] = field(default_factory=dict)
    error: str | None = None


BASELINE = "uncompressed"


# ---- prompts -----------------------------------------------------------------------------------


def prompt_of(processor: Any, question: str) -> str:
    """The text of one question about one image, as the model was trained to read it."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    return f"USER: <image>\n{question} ASSISTANT:"


@dataclass
class Batch:
    """Questions about a few images, ready for the model.

    ``vision`` holds each image once (pixel values, and sizes where the model cuts crops);
    ``image_of`` says which of them a question is about.
    """

    items: list[Any]
    text: dict[str, torch.Tensor]
    vision: dict[str, torch.Tensor]
    image_of: list[int]

    def inputs(self, model: Any) -> dict[str, torch.Tensor]:
        """What the model takes, on its device."""
        return {
            **{k: v.to(model.device) for k, v in self.text.items()},
            **self.images(model),
        }

    def images(self, model: Any) -> dict[str, torch.Tensor]:
        """The images alone, pixels in the dtype of the model."""
        moved = {k: v.to(model.device) for k, v in self.vision.items()}
        return {**moved, "pixel_values": moved["pixel_values"].to(model.dtype)}


def image_key(image: Image.Image) -> str:
    """What identifies an image: size and content."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=16)
    return f"{image.mode}{image.size}{digest.hexdigest()}"


def make_batches(processor: Any, items: Sequence[Any], size: int) -> list[Batch]:
    """Left-padded batches of at most ``size`` questions, sorted so that images are shared."""
    keys = [image_key(item.image) for item in items]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    order = sorted(range(len(items)), key=lambda i: (first[keys[i]], i))
    batches = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        unique = list(dict.fromkeys(keys[i] for i in chosen))
        inputs = processor(
            text=[prompt_of(processor, items[i].question) for i in chosen],
            images=[items[i].image.convert("RGB") for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        image_of = [unique.index(keys[i]) for i in chosen]
        rows = [image_of.index(u) for u in range(len(unique))]
        vision = {k: inputs.pop(k)[rows] for k in VISION_INPUTS if k in inputs}
        batches.append(Batch([items[i] for i in chosen], dict(inputs), vision, image_of))
    return batches


# ---- answers -----------------------------------------------------------------------------------


@torch.no_grad()
def answer_batch(model: Any, processor: Any, batch: Batch, max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch; the encoder runs once for each of its images."""
    text = {k: v.to(model.device) for k, v in batch.text.items()}
    images = batch.images(model)
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        encoded = model.get_image_features(**images)
        features = [encoded.pooler_output[i] for i in batch.image_of]
        outputs = {"image": type(encoded)(pooler_output=features)}
        vision: dict[str, Any] = {"mm_encoder_outputs": outputs}
    else:  # transformers before 5.18: one encoder pass for each question
        vision = {k: v[batch.image_of] for k, v in images.items()}
    out = model.generate(**text, **vision, do_sample=False, max_new_tokens=max_new_tokens)
    new = out[:, text["input_ids"].shape[1] :]
    return [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]


@dataclass
class Encoder:
    """The stock work of an image encoder, done once for each batch of images.

    Attributes:
        tower: the module; layer: the hidden state that the model reads.
        looked_into: attention modules that some method captures.
        memory: for each batch the tower's output and the calls of those attention modules.
    """

    tower: Any
    layer: int
    looked_into: list[Any]
    memory: dict[int, tuple[Any, list[tuple[tuple, dict[str, Any]]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, methods: Sequence[Method]) -> Encoder | None:
        """The encoder of a model as these methods see it; None where it cannot be remembered."""
        vision = locate(model).vision
        layer = getattr(model.config, "vision_feature_layer", None)
        if not isinstance(layer, int) or "forward" in vars(vision.tower):
            return None
        depth = len(vision.blocks)
        wanted = {i % depth for m in methods if leaves_encoder_alone(m) for i in m.captures(depth)}
        return cls(vision.tower, layer, [vision.blocks[i].attn for i in sorted(wanted)])

    @contextmanager
    def remembered(self, key: int) -> Iterator[None]:
        """Inside the block the tower's output comes from memory, or goes there if it is new.

        Hooks on the tower, on the captured attention modules and behind the tower see no
        difference; hooks on its blocks do not run.
        """
        forward = self.tower.forward

        @functools.wraps(forward)
        def recall(*args: Any, **kwargs: Any) -> Any:
            if key not in self.memory:
                calls: list[tuple[tuple, dict[str, Any]]] = []
                hooks = [
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs: calls.append((args, kwargs)),
                        with_kwargs=True,
                        prepend=True,
                    )
                    for module in self.looked_into
                ]
                try:
                    out = forward(*args, **kwargs)
                finally:
                    for hook in hooks:
                        hook.remove()
                if out.hidden_states is None:
                    return out
                wanted = self.layer % len(out.hidden_states)
                states = tuple(h if i == wanted else None for i, h in enumerate(out.hidden_states))
                stored = type(out)(last_hidden_state=out.last_hidden_state, hidden_states=states)
                self.memory[key] = stored, calls
            else:
                for module, (given, named) in zip(self.looked_into, self.memory[key][1]):
                    if module._forward_pre_hooks:
                        module(*given, **named)
            return copy.copy(self.memory[key][0])

        self.tower.forward = recall
        try:
            yield
        finally:
            del self.tower.forward


def leaves_encoder_alone(method: Method) -> bool:
    """Whether a method leaves the encoder's work as it is."""
    return not method.stages & {"pixels", "vision"}


def evaluate(
    model: Any,
    processor: Any,
    batches: Sequence[Batch],
    score: Callable[[str, str], float],
    max_new_tokens: int,
    tick: Callable[[], None] = lambda: None,
    encoder: Encoder | None = None,
) -> tuple[list[str], np.ndarray]:
    """Answers and their scores, in the order of the batches."""
    answers: list[str] = []
    for i, batch in enumerate(batches):
        with nullcontext() if encoder is None else encoder.remembered(i):
            answers += answer_batch(model, processor, batch, max_new_tokens)
        tick()
    items = [item for batch in batches for item in batch.items]
    scores = [float(score(a, item.answer)) for a, item in zip(answers, items)]
    return answers, np.asarray(scores)


def bootstrap(
    scores: np.ndarray, groups: Sequence[Any], seed: int, draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of the mean score, drawing images rather than questions.

    Questions about one image stand and fall together, so they are drawn together.
    """
    names = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    index = np.asarray([names[g] for g in groups])
    total, count = np.bincount(index, weights=scores), np.bincount(index)
    pick = np.random.default_rng(seed).integers(0, len(total), (draws, len(total)))
    means = total[pick].sum(1) / count[pick].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


# ---- time and memory ---------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(cache: Any) -> int:
    """Bytes that a KV cache really holds: its storages, each counted once."""
    seen: dict[int, int] = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            if tensor is not None and tensor.numel():
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


@torch.no_grad()
def timed_prefill(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Milliseconds from pixels to the first logits, and bytes of the cache left behind."""
    synchronize(model.device)
    start = time.perf_counter()
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    synchronize(model.device)
    return 1e3 * (time.perf_counter() - start), cache_bytes(out.past_key_values)


def measure(
    model: Any,
    inputs: dict[str, torch.Tensor],
    configurations: Sequence[Method | Chain | None],
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Prefill times and reports of several configurations (None: the stock model), in turns.

    Returns:
        For each configuration its median times, KV bytes and the `vtc.Report` of one forward.
    """
    samples: list[list[dict[str, float]]] = [[] for _ in configurations]
    results: list[dict[str, Any]] = [{} for _ in configurations]
    for round_ in range(repeats + 1):
        for i, method in enumerate(configurations):
            if method is None:
                if round_ == 0:  # for the token counts; never timed with hooks
                    with observe(model) as session:
                        timed_prefill(model, inputs)
                        results[i]["report"] = session.report()
                ms, kv = timed_prefill(model, inputs)
                sample = {"prefill_ms": ms}
            else:
                with compressing(model, method) as session:
                    ms, kv = timed_prefill(model, inputs)
                    if model.device.type == "cuda":  # parts need waits, which slow the whole
                        session.synchronize()
                        timed_prefill(model, inputs)
                    report = session.report()
                results[i]["report"] = report
                parts = {"vision_ms": report.vision_ms, "llm_prefill_ms": report.prefill_ms}
                parts["method_ms"] = report.method_ms
                sample = {"prefill_ms": ms, **{k: v for k, v in parts.items() if v is not None}}
            results[i]["kv_bytes"] = kv
            if round_ > 0:
                samples[i].append(sample)
        tick()
    for result, taken in zip(results, samples):
        for name in ("prefill_ms", "vision_ms", "llm_prefill_ms", "method_ms"):
            values = [s[name] for s in taken if name in s]
            result[name] = statistics.median(values) if values else None
    return results


# ---- the whole table ---------------------------------------------------------------------------


def parse_keep(text: str) -> Fraction | int:
    """A budget from "0.33" or "2/9" (a share) or from "128" (tokens).

    The roundings 0.33, 0.22 and 0.11 mean the thirds and ninths of the literature.

    Raises:
        ValueError: neither a share in (0, 1] nor a count.
    """
    try:
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'"{text}" is no budget; give 0.33, 1/3 or a token count') from None
    if value > 1 and value.denominator == 1:
        return int(value)
    near = value.limit_denominator(9)
    if near and abs(near - value) < Fraction(4, 1000):
        value = near
    if not 0 < value <= 1:
        raise ValueError(f"a share of tokens lies in (0, 1]; got {text}")
    return value


def token_budgets(keep: Sequence[Fraction | int], total: int) -> dict[int, Fraction | int]:
    """Budgets by the tokens that they leave of ``total``, below it, largest first."""
    counts = {k if isinstance(k, int) else max(1, round(total * k)): k for k in keep}
    return {c: counts[c] for c in sorted(counts, reverse=True) if c < total}


def seeded(name: str, keep: Fraction | int | None, seed: int) -> Method:
    """The method with a budget (None: as it comes), and the seed if it takes one."""
    budget: dict[str, Any] = {}
    if keep is not None:
        budget = {"keep_tokens": keep} if isinstance(keep, int) else {"keep_ratio": float(keep)}
    (method,) = resolve(name, **budget, **VARIANTS.get(name, {}))
    takes_seed = any(f.name == "seed" for f in fields(method))
    return replace(method, seed=seed) if takes_seed else method  # type: ignore[call-arg]


def plan(
    model: Any, inputs: dict[str, torch.Tensor], total: int, settings: Settings
) -> list[tuple[Row, Method | None]]:
    """A row for each configuration to run, and its method; None where it cannot be made.

    Methods that take no budget run once, as they come.
    """
    plans: list[tuple[Row, Method | None]] = []
    for name in settings.methods:
        plain = seeded(name, None, settings.seed)
        stages: list[str] = sorted(plain.stages)
        budgets = token_budgets(settings.keep, total) if settings.flops is None else {None: None}
        for tokens, keep in budgets.items():
            row, method = Row(name, stages, tokens), None
            try:
                if settings.flops is None:
                    method = seeded(name, keep, settings.seed)
                else:
                    how: dict[str, Any] = {"model": model, "inputs": inputs, "which": "llm"}
                    how["tolerance"] = max(0.01, 1 / total)  # no finer than a token
                    (method,) = resolve(match([plain], flops=settings.flops, **how)[name])
            except ValueError as error:  # out of reach, or it takes no budget
                row.error = str(error)
            plans.append((row, method))
        if settings.flops is None and plans[-1][1] is None:
            del plans[-len(budgets) :]
            plans.append((Row(name, stages, None), plain))
    for row, method in plans:
        row.parameters = "" if method is None else str(method)
    return plans


def run(
    model: Any,
    processor: Any,
    task: str,
    items: Sequence[Any],
    score: Callable[[str, str], float],
    settings: Settings,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Benchmark all methods and budgets on one task.

    Args:
        model: a LLaVA-type model, not wrapped; processor: its processor.
        items: with image, question, answer and kind; score: (prediction, answer) -> 0..1.

    Returns:
        The result, ready for JSON: task, settings, versions, machine and one row for each
        configuration, the uncompressed model first.

    Raises:
        ValueError: no items, or an unknown method.
    """
    if not items:
        raise ValueError(f'task "{task}" gave no questions')
    began = time.perf_counter()
    batches = make_batches(processor, items, settings.batch_size)
    ordered = [item for batch in batches for item in batch.items]
    groups = [image_key(item.image) for item in ordered]
    report_progress = progress or (lambda text, done, total: None)

    inputs = make_batches(processor, [ordered[0]], 1)[0].inputs(model)
    with observe(model) as session:
        timed_prefill(model, inputs)
        total = round(session.report().visual_tokens)

    made = plan(model, inputs, total, settings)
    rows = [Row(BASELINE, [], total), *(row for row, _ in made)]
    plans: list[Method | None] = [None, *(method for _, method in made)]
    encoder = Encoder.of(model, [m for m in plans if m is not None])

    steps = len(batches) * (len(plans) + 1) + settings.repeats + 1
    done = 0

    def ticker(text: str) -> Callable[[], None]:
        def tick() -> None:
            nonlocal done
            done += 1
            report_progress(text, min(done, steps), steps)

        report_progress(text, min(done, steps), steps)
        return tick

    def assess(row: Row, label: str, share_encoder: bool) -> list[str]:
        answers, scores = evaluate(
            model,
            processor,
            batches,
            score,
            settings.max_new_tokens,
            ticker(label),
            encoder if share_encoder else None,
        )
        row.accuracy = float(scores.mean())
        row.accuracy_low, row.accuracy_high = bootstrap(scores, groups, settings.seed)
        kinds = np.asarray([str(item.kind) for item in ordered])
        row.accuracy_by_kind = {
            kind: float(scores[kinds == kind].mean()) for kind in sorted(set(kinds.tolist()))
        }
        return answers

    reference = assess(rows[0], BASELINE, True)
    blank = [_blanked(b) for b in batches]
    tick = ticker("blank image")
    _, scores = evaluate(model, processor, blank, score, settings.max_new_tokens, tick)
    rows[0].blank_accuracy, rows[0].agreement = float(scores.mean()), 1.0

    for row, method in zip(rows[1:], plans[1:]):
        label = row.method if row.asked_tokens is None else f"{row.method}, {row.asked_tokens}"
        before = done
        if method is None:
            done += len(batches)
            continue
        try:
            with compressing(model, method):
                answers = assess(row, label, leaves_encoder_alone(method))
        except UnsupportedError as error:
            row.error = str(error)
            done = before + len(batches)
            continue
        same = [a == r for a, r in zip(answers, reference)]
        row.agreement = float(np.mean(same))

    alive = [i for i, row in enumerate(rows) if row.error is None]
    tick = ticker("timing")
    measured = measure(model, inputs, [plans[i] for i in alive], settings.repeats, tick)
    for i, facts in zip(alive, measured):
        _fill(rows[i], facts, measured[0])

    return {
        "task": task,
        "questions": len(items),
        "images": len(set(groups)),
        "visual_tokens": total,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
        "settings": {**asdict(settings), "keep": [str(k) for k in settings.keep]},
        "timing": {
            "prompts": 1,
            "batch": 1,
            "warmup_rounds": 1,
            "rounds": settings.repeats,
            "attention": getattr(model.config, "_attn_implementation", None),
            "prompt_tokens": int(inputs["input_ids"].shape[1]),
        },
        "model": describe_model(model),
        "versions": versions(),
        "machine": machine(model.device),
        "rows": [asdict(row) for row in rows],
    }


def _blanked(batch: Batch) -> Batch:
    """The same questions about images of the processor's mean colour, of the same sizes."""
    pixels = torch.zeros_like(batch.vision["pixel_values"])
    return replace(batch, vision={**batch.vision, "pixel_values": pixels})


def _fill(row: Row, facts: dict[str, Any], baseline: dict[str, Any]) -> None:
    """Copy what was measured into a row."""
    report = facts["report"]
    row.final_tokens, row.average_tokens = report.final_tokens, report.average_tokens
    row.flops_g, row.flops_all_g = _giga(report.flops), _giga(report.flops_all)
    row.flops_share = _over(report.flops, report.flops_full)
    row.flops_all_share = _over(report.flops_all, report.flops_all_full)
    for name in ("prefill_ms", "vision_ms", "llm_prefill_ms", "method_ms"):
        setattr(row, name, facts[name])
    row.prefill_ratio = _over(facts["prefill_ms"], baseline["prefill_ms"])
    row.kv_bytes = facts["kv_bytes"]
    row.kv_share = _over(facts["kv_bytes"], baseline["kv_bytes"])


def _giga(x: float | None) -> float | None:
    return None if x is None else x / 1e9


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


# ---- where it ran ------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import transformers

    from .. import __version__

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vtc": __version__,
        **({"commit": commit} if (commit := _commit()) else {}),
    }


def _commit() -> str | None:
    """The commit of this checkout, marked when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine(device: torch.device) -> dict[str, Any]:
    """CPU, cores and accelerator."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    except OSError:
        pass
    out: dict[str, Any] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        out["gpu"] = torch.cuda.get_device_name(device)
    return out


def describe_model(model: Any) -> dict[str, Any]:
    """Architecture, parameters and dtype."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return {
        "name": Path(name).name if Path(name).exists() else name,  # a hub id keeps its owner
        "class": type(model).__name__,
        "parameters_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def write_json(result: dict[str, Any], path: Path) -> Path:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def rows_of(result: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The rows of one method, largest budget first."""
    rows = [r for r in result["rows"] if r["method"] == method and r["error"] is None]
    return sorted(rows, key=lambda r: -(r["asked_tokens"] or 0))
