# SPDX-License-Identifier: Apache-2.0
"""Train the tiny LLaVA and the text tower on a frozen DINOv2-S/14.

    python -m vtc.benchmarks.tiny.train --tower dinov2.safetensors --work run --minutes 8

Three stages. *align*: the projector and the word embeddings learn to name the shape, colour and
digit of every patch. *llava*: projector and decoder learn to answer; several question-answer
pairs stand behind one image, each sees the image and itself only (block-diagonal mask) and
positions restart after the image. *text*: a text tower is trained contrastively on captions
against the frozen tower's pooled features. Stages end by wall-clock; the learning rate follows
the share of the time that has passed. An interrupted run continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, LlavaForConditionalGeneration

from ..tasks import scenes
from .data import LENGTH, ScenePool, easy_arrays
from .extract import build_tower
from .models import BOS, ImageProjection, llava_config, make_tokenizer, pool, text_config

PAIRS = 16  # pairs behind one image
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pairs_layout(prefix: int, pairs: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mask (S, S), True = visible, and positions (S,) of `pairs` blocks behind a
    prefix."""
    block = torch.cat([torch.zeros(prefix), 1 + torch.arange(pairs).repeat_interleave(length)])
    order = torch.arange(len(block))
    same = block[:, None] == block[None, :]
    mask = (order[:, None] >= order[None, :]) & (same | (block[None, :] == 0))
    inside = prefix + torch.arange(length)
    return mask, torch.cat([torch.arange(prefix), inside.repeat(pairs)])


def load_trained(model: nn.Module, path: Path, fresh: tuple[str, ...] = ()) -> None:
    """Load trained weights into `model`: all but the tower and what `fresh` names."""
    state = {k: v.float() for k, v in load_file(path).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    absent = ("vision_tower", "lm_head", *fresh)
    missing = [k for k in missing if not any(name in k for name in absent)]
    if missing or unexpected:
        raise ValueError(f"{path} does not fit: missing {missing}, unexpected {unexpected}")


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained weights of a LLaVA (no tower, no tied copy)."""
    return {
        k: v
        for k, v in model.state_dict().items()
        if "vision_tower" not in k and not k.startswith("lm_head")
    }


def save_half(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write the floating-point tensors of `state` in fp16."""
    half = {
        k: v.detach().half().cpu().contiguous() for k, v in state.items() if v.is_floating_point()
    }
    save_file(half, path)


class Loop:
    """Parts of every run: a LLaVA, an optimizer on a clock, a log, the losses.

    Subclasses set `model`, `words` (the word embeddings) and `elapsed` (seconds by stage).
    """

    model: Any
    words: nn.Parameter
    elapsed: dict[str, float]

    def __init__(self, args: argparse.Namespace):
        self.args, self.device, self.step = args, torch.device(args.device), 0
        self.rng = np.random.default_rng(args.seed)
        vocab = make_tokenizer().get_vocab()
        self.classes = [
            torch.tensor([vocab[w] for w in names], device=self.device)
            for names in (
                [*scenes.SHAPES, "background"],
                list(scenes.COLORS),
                [str(d) for d in range(10)],
            )
        ]
        self.prefix_ids = torch.tensor([BOS, *(vocab[w] for w in ("user", ":"))])
        self.prefix_ids = self.prefix_ids.to(self.device)
        self.run_decoder: Callable[..., torch.Tensor] = self._run_decoder

    def autocast(self):
        """Return the bf16 autocast context."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def optimizer(self, modules, lr: float, decay: float) -> torch.optim.AdamW:
        """Return AdamW over the modules' parameters; no decay of vectors and embeddings."""
        params = list(
            {id(p): p for m in modules for p in m.parameters() if p.requires_grad}.values()
        )
        matrices = [p for p in params if p.ndim > 1 and p is not self.words]
        rest = [p for p in params if p.ndim <= 1 or p is self.words]
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=self.device.type == "cuda")

    def ticks(self, stage: str, seconds: float, optimizer, lr: float, warmup: int = 200):
        """Yield (step, share of the stage's time), setting the learning rate, saving now and
        then."""
        start = time.perf_counter() - self.elapsed[stage]
        saved, first = time.perf_counter(), self.step
        while (time.perf_counter() - start) < seconds:
            share = (time.perf_counter() - start) / seconds
            rate = lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (self.step + 1 - first) / warmup)
            yield self.step, share
            self.step += 1
            self.elapsed[stage] = time.perf_counter() - start
            if time.perf_counter() - saved > self.args.save_every:
                self.save(stage, optimizer)
                saved = time.perf_counter()

    def log(self, **values) -> None:
        """Print one line and append it to the log."""
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        print(json.dumps(row), flush=True)
        with (self.args.work / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def state(self) -> dict[str, Any]:
        """Return everything that is trained."""
        return {"llava": trained(self.model)}

    def save(self, stage: str, optimizer) -> None:
        """Write a checkpoint with everything that a continued run needs."""
        torch.save(
            {
                **self.state(),
                "stage": stage,
                "step": self.step,
                "elapsed": self.elapsed,
                "optimizer": optimizer.state_dict(),
                "torch_rng": torch.get_rng_state(),
                "numpy_rng": self.rng.bit_generator.state,
            },
            self.args.work / "checkpoint.tmp",
        )
        (self.args.work / "checkpoint.tmp").replace(self.args.work / "checkpoint.pt")

    def resume(self) -> dict[str, Any] | None:
        """Load the checkpoint of an interrupted run, where there is one, and return it."""
        path = self.args.work / "checkpoint.pt"
        if not path.exists():
            return None
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved["llava"], strict=False)
        self.step, self.elapsed = saved["step"], saved["elapsed"]
        torch.set_rng_state(saved["torch_rng"])
        self.rng.bit_generator.state = saved["numpy_rng"]
        return saved

    def patch_loss(
        self, image: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, list[Any]]:
        """Cross-entropy of naming shape, colour and digit (B, N, 3; -1 = none) of every patch.

        Projected patches (B, N, D) are compared with the word embeddings by cosine. Also returns
        the three accuracies over the patches of objects.
        """
        patches, right = F.normalize(image.float(), dim=-1), []
        loss = patches.new_zeros(())
        for k, ids in enumerate(self.classes):
            target = labels[..., k]
            logits = 16.0 * patches @ F.normalize(self.words[ids], dim=-1).T
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1)
            objects = target >= 0
            if k == 0:
                objects = objects & (target < len(scenes.SHAPES))
            right.append((logits.argmax(-1) == target)[objects].float().mean())
            if k == 0:  # objects are a small part of the patches
                loss = loss + F.cross_entropy(logits[objects], target[objects])
        return loss, right

    def _run_decoder(self, embeds, mask, positions) -> torch.Tensor:
        # (B, S, D)
        return self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def answer_logits(
        self, image, tokens, starts, mask, positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, P, 2, V) and targets (B, P, 2) of answer and </s>.

        `image` (B, N, D) are the projected patches, `tokens` (B, P, L) the pairs, `starts` (B, P)
        where their answers stand; `mask` and `positions` are those of `pairs_layout`.
        """
        batch, pairs, length = tokens.shape
        embed = self.model.model.language_model.embed_tokens
        with self.autocast():
            before = embed(self.prefix_ids).expand(batch, -1, -1)
            asked = embed(tokens).flatten(1, 2)
            embeds = torch.cat([before.to(image.dtype), image, asked.to(image.dtype)], dim=1)
            hidden = self.run_decoder(embeds, mask, positions)[:, -pairs * length :]
            hidden = hidden.unflatten(1, (pairs, length))
            where = torch.stack([starts - 1, starts], -1)
            hidden = hidden.gather(2, where[..., None].expand(-1, -1, -1, hidden.shape[-1]))
            logits = self.model.lm_head(hidden)
        return logits.float(), tokens.gather(2, where + 1)


class Trainer(Loop):
    """Models, data and the three stages."""

    def __init__(self, args: argparse.Namespace):
        # Forked before the accelerator is touched.
        self.scenes = ScenePool(args.scenes, "train", args.seed, True, args.workers)
        self.val = ScenePool(args.val, "val", args.seed, False, min(2, args.workers))
        super().__init__(args)
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.easy = [torch.from_numpy(a) for a in easy_arrays("train")]
        self.easy_val = [torch.from_numpy(a[: args.val]) for a in easy_arrays("test")]
        self.easy[0] = self.easy[0].to(self.device)

        model = LlavaForConditionalGeneration(llava_config())
        model.model.vision_tower = build_tower(load_file(args.tower))
        model.requires_grad_(True)
        model.model.vision_tower.requires_grad_(False)
        with torch.no_grad():
            model.model.language_model.embed_tokens.weight.normal_(0, 0.06)
        if args.init:
            load_trained(model, args.init)
        self.model = model.to(self.device)
        self.tower = model.model.vision_tower.eval()
        self.projector, self.decoder = model.model.multi_modal_projector, model.model.language_model
        self.words = self.decoder.embed_tokens.weight
        if model.lm_head.weight is not self.words:
            raise RuntimeError("word embeddings and output layer are not tied")
        self.text = CLIPTextModelWithProjection(text_config()).to(self.device)
        self.visual = ImageProjection().to(self.device)
        self.log_scale = nn.Parameter(torch.tensor(3.0, device=self.device))
        self.features = np.zeros((args.scenes, 768), np.float16)
        self.seen = np.zeros(args.scenes, bool)

        mask, positions = pairs_layout(len(self.prefix_ids) + scenes.GRID**2, PAIRS, LENGTH)
        self.mask, self.positions = (
            mask[None, None].to(self.device),
            positions[None].to(self.device),
        )
        self.pixel_mean = torch.tensor(MEAN, device=self.device)[None, :, None, None]
        self.pixel_std = torch.tensor(STD, device=self.device)[None, :, None, None]
        self.run_tower = torch.compile(self._run_tower) if args.compile else self._run_tower
        if args.compile:
            self.run_decoder = torch.compile(self._run_decoder)
        self.elapsed = {"align": 0.0, "llava": 0.0, "text": 0.0}

    # ---------------------------------------------------------------------------------- data

    def easy_pixels(self, images: torch.Tensor, augment: bool) -> torch.Tensor:
        """Return (B, 64, 64, 3) uint8 as (B, 3, 336, 336) in 0..255, mirrored and shifted at
        random."""
        images = images.to(self.device)
        if augment:
            count, side = len(images), images.shape[1]
            step = torch.arange(side, device=self.device)
            rows = (step + torch.randint(-6, 7, (count, 1), device=self.device)).clamp(0, side - 1)
            cols = (step + torch.randint(-6, 7, (count, 1), device=self.device)).clamp(0, side - 1)
            cols = torch.where(torch.rand(count, 1, device=self.device) < 0.5, cols.flip(1), cols)
            batch = torch.arange(count, device=self.device)[:, None, None]
            images = images[batch, rows[:, :, None], cols[:, None, :]]
        pixels = images.permute(0, 3, 1, 2).float()
        size = (scenes.SIDE, scenes.SIDE)
        return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255).round()

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """Return (B, 336, 336, 3) uint8 as (B, 3, 336, 336) in 0..255, in one memory layout."""
        return torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float().contiguous()

    def batch(self, count: int, easy: int) -> tuple[Any, ...]:
        """Return pixels, tokens (B, PAIRS, LENGTH), starts (B, PAIRS) and the scenes' indices."""
        index = self.rng.integers(0, max(1, self.scenes.filled()), count - easy)
        pixels = self.pixels(self.scenes.images[index])
        tokens = torch.from_numpy(self.scenes.tokens[index])
        starts = torch.from_numpy(self.scenes.starts[index])
        if easy:
            which = torch.from_numpy(self.rng.integers(0, len(self.easy[0]), easy))
            images = self.easy[0][which.to(self.device)]
            pixels = torch.cat([pixels, self.easy_pixels(images, augment=True)])
            tokens = torch.cat([tokens, self.easy[1][which]])
            starts = torch.cat([starts, self.easy[2][which]])
        chosen = torch.from_numpy(self.rng.random(starts.shape).argsort(1)[:, :PAIRS])
        tokens = tokens.gather(1, chosen[..., None].expand(-1, -1, LENGTH)).long().to(self.device)
        return pixels, tokens, starts.gather(1, chosen).long().to(self.device), index

    def ahead(self, count: int, easy: int):
        """Yield batches that a thread prepares while the last one is trained on."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.batch, count, easy)
            while True:
                batch = coming.result()
                coming = pool.submit(self.batch, count, easy)
                yield batch

    # ---------------------------------------------------------------------------------- models

    def _run_tower(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.tower(pixel_values=pixels, output_hidden_states=True)
        return out.hidden_states[-2][:, 1:], pool(out.last_hidden_state)

    def tower_features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return patch features of layer -2, (B, 576, 384), and pooled features, (B, 768)."""
        with torch.no_grad(), self.autocast():
            return self.run_tower((pixels / 255 - self.pixel_mean) / self.pixel_std)

    def pair_logits(self, image, tokens, starts) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `answer_logits` of all 576 patches and PAIRS pairs."""
        return self.answer_logits(image, tokens, starts, self.mask, self.positions)

    def labels(self, index: np.ndarray) -> torch.Tensor:
        """Return the patch labels of scenes, (B, 576, 3)."""
        labels = torch.from_numpy(self.scenes.labels[index]).to(self.device)
        return labels.flatten(1, 2).long()

    # ---------------------------------------------------------------------------------- stages

    def align(self, seconds: float, optimizer) -> None:
        """Train projector and word embeddings to name what every patch shows."""
        for step, share in self.ticks("align", seconds, optimizer, 2e-3, 50):
            index = self.rng.integers(0, max(1, self.scenes.filled()), self.args.batch)
            features, pooled = self.tower_features(self.pixels(self.scenes.images[index]))
            self.remember(index, pooled)
            loss, right = self.patch_loss(self.projector(features.float()), self.labels(index))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                self.log(stage="align", step=step, share=share, loss=loss.item(),
                         shape=right[0].item(), color=right[1].item(), digit=right[2].item(),
                         filled=self.scenes.filled())  # fmt: skip
        with torch.no_grad():  # bring patches to the scale of the words
            norm = self.projector(features.float()).norm(dim=-1).mean()
            ratio = self.words.norm(dim=-1).mean() / norm
            self.projector.linear_2.weight *= ratio
            self.projector.linear_2.bias *= ratio

    def remember(self, index: np.ndarray, pooled: torch.Tensor) -> None:
        """Keep the pooled features of scenes for the text stage."""
        self.features[index] = pooled[: len(index)].half().cpu().numpy()
        self.seen[index] = True

    def llava(self, seconds: float, optimizer, params) -> None:
        """Train projector and decoder to answer."""
        easy = round(self.args.batch * self.args.easy)
        began, images, checked = time.perf_counter(), 0, time.perf_counter()
        batches = self.ahead(self.args.batch, easy)
        for step, share in self.ticks("llava", seconds, optimizer, self.args.lr):
            pixels, tokens, starts, index = next(batches)
            features, pooled = self.tower_features(pixels)
            self.remember(index, pooled)
            with self.autocast():
                image = self.projector(features)
            logits, targets = self.pair_logits(image, tokens, starts)
            loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
            named, right_patches = self.patch_loss(image[: len(index)], self.labels(index))
            loss = loss + self.args.patch_weight * named
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            images += self.args.batch
            if step % 100 == 0 or step < 3:
                right = (logits[:, :, 0].argmax(-1) == targets[..., 0]).float()
                self.log(stage="llava", step=step, share=share, loss=loss.item(),
                         patches=[round(r.item(), 3) for r in right_patches],
                         scenes=right[: len(right) - easy].mean().item(),
                         easy=right[len(right) - easy :].mean().item(),
                         images_s=images / (time.perf_counter() - began),
                         filled=self.scenes.filled())  # fmt: skip
            if time.perf_counter() - checked > self.args.check_every:
                self.log(stage="check", step=step, **self.check())
                checked = time.perf_counter()
        self.log(stage="check", step=self.step, images=images, **self.check())

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Return accuracies of pairs on validation scenes and easy-VQA test images, also blank."""
        result = {}
        while self.val.filled() < self.val.size:
            time.sleep(0.2)
        easy_images = self.easy_pixels(self.easy_val[0], augment=False).byte().permute(0, 2, 3, 1)
        sets = {
            "scenes": (self.val.images, self.val.tokens, self.val.starts),
            "easy": (easy_images.cpu().numpy(), self.easy_val[1].numpy(), self.easy_val[2].numpy()),
        }
        for name, (images, tokens, starts) in sets.items():
            for blank in (False, True):
                right = []
                for at in range(0, len(images), self.args.batch):
                    part = slice(at, at + self.args.batch)
                    pixels = self.pixels(images[part])
                    if blank:
                        pixels = torch.full_like(pixels, 128)
                    ids = torch.from_numpy(tokens[part, :PAIRS]).long().to(self.device)
                    start = torch.from_numpy(starts[part, :PAIRS]).long().to(self.device)
                    with self.autocast():
                        image = self.projector(self.tower_features(pixels)[0])
                    logits, targets = self.pair_logits(image, ids, start)
                    right.append((logits.argmax(-1) == targets).all(-1).float().flatten())
                result[name + ("_blank" if blank else "")] = torch.cat(right).mean().item()
        return result

    def train_text(self, seconds: float, optimizer) -> None:
        """Train the text tower and the image projection with a symmetric contrastive loss."""
        held, known = self.args.val, np.flatnonzero(self.seen)
        known, test = known[:-held] if len(known) > 4 * held else known, known[-held:]
        features = torch.from_numpy(self.features).to(self.device)
        captions = torch.from_numpy(self.scenes.captions)
        size = min(self.args.text_batch, len(known))

        def logits(index):
            ids = captions[index].long().to(self.device)
            ids = ids[:, : int((ids != 0).sum(1).max())]
            with self.autocast():
                text = self.text(input_ids=ids, attention_mask=(ids != 0).long()).text_embeds
                image = self.visual(features[torch.from_numpy(index).to(self.device)].float())
            text, image = F.normalize(text.float(), dim=-1), F.normalize(image.float(), dim=-1)
            return self.log_scale.clamp(max=4.6).exp() * image @ text.T

        for step, share in self.ticks("text", seconds, optimizer, 2e-3):
            scores = logits(self.rng.choice(known, size, replace=False))
            target = torch.arange(size, device=self.device)
            loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                self.log(stage="text", step=step, share=share, loss=loss.item(), known=len(known))
        with torch.no_grad():
            easy_ones = test[test % 5 != 4][:100]
            scores = logits(easy_ones)
            target = torch.arange(len(easy_ones), device=self.device)
            self.log(stage="text", i2t=(scores.argmax(1) == target).float().mean().item(),
                     t2i=(scores.argmax(0) == target).float().mean().item())  # fmt: skip

    # ---------------------------------------------------------------------------------- saving

    def export(self, stage: str) -> None:
        """Write the weights that the stage has trained, in fp16."""
        if stage == "text":
            states = {
                "text": self.text.state_dict(),
                "visual_projection": self.visual.state_dict(),
            }
        else:
            states = {"llava": trained(self.model)}
        for name, state in states.items():
            save_half(state, self.args.work / f"{name}.safetensors")

    def state(self) -> dict[str, Any]:
        """Return everything that is trained."""
        return {
            **super().state(),
            "text": self.text.state_dict(),
            "visual": self.visual.state_dict(),
            "log_scale": self.log_scale.detach(),
        }

    def warm_up(self) -> None:
        """Compile before the clock of a stage runs."""
        pixels, tokens, starts, _ = self.batch(self.args.batch, 0)
        with self.autocast():
            image = self.projector(self.tower_features(pixels)[0])
        logits, _ = self.pair_logits(image, tokens, starts)
        logits.sum().backward()
        self.model.zero_grad()

    def run(self) -> None:
        """Run the stages that are left."""
        args, resume = self.args, self.resume()
        if resume:
            self.text.load_state_dict(resume["text"])
            self.visual.load_state_dict(resume["visual"])
            self.log_scale.data.copy_(resume["log_scale"])
        while self.scenes.filled() < min(args.scenes, 8 * args.batch):
            time.sleep(0.2)
        if args.compile:
            self.warm_up()
        words = self.decoder.embed_tokens
        stages = {
            "align": (args.align, [self.projector, words]),
            "llava": (args.minutes * 60, [self.projector, self.decoder]),
            "text": (args.text, [self.text, self.visual]),
        }
        order = list(stages)
        for stage in order[order.index(resume["stage"]) if resume else 0 :]:
            seconds, modules = stages[stage]
            if seconds <= 0 or (args.init and stage == "align"):
                continue
            optimizer = self.optimizer(modules, args.lr, 0.05 if stage == "llava" else 0.01)
            if stage == "text":
                optimizer.add_param_group({"params": [self.log_scale], "weight_decay": 0.0})
            if resume and resume["stage"] == stage:
                optimizer.load_state_dict(resume["optimizer"])
            if stage == "align":
                self.align(seconds, optimizer)
            elif stage == "llava":
                self.llava(seconds, optimizer, [p for m in modules for p in m.parameters()])
            else:
                self.train_text(seconds, optimizer)
            self.export(stage)
        self.scenes.close()
        self.val.close()


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", type=Path, required=True, help="output of extract.py")
    parser.add_argument(
        "--work", type=Path, required=True, help="checkpoint, log and weights go here"
    )
    parser.add_argument(
        "--init", type=Path, help="trained llava.safetensors: continue, no align stage"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=7.0, help="time of the llava stage")
    parser.add_argument("--align", type=float, default=40.0, help="seconds of the align stage")
    parser.add_argument("--text", type=float, default=45.0, help="seconds of the text stage")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--text-batch", type=int, default=1024)
    parser.add_argument(
        "--easy", type=float, default=0.25, help="share of easy-VQA images in a batch"
    )
    parser.add_argument(
        "--patch-weight", type=float, default=0.2, help="of the align loss in the llava stage"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=200_000, help="338 KB of memory each")
    parser.add_argument("--val", type=int, default=200, help="validation images per task")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
