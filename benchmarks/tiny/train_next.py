# SPDX-License-Identifier: Apache-2.0
"""Train the tiny LLaVA-NeXT, starting from the tiny LLaVA, on pictures of small numbered signs.

    python -m vtc.benchmarks.tiny.train_next --tower dinov2.safetensors \\
        --init run/llava.safetensors --work next

The tower is frozen. Training starts on small pictures, of two or three views. Every step encodes
a few new pictures of one size, adds their features to a pool and trains on a draw from it, so that
features are used several times and pictures never run out. Images go through the stock processor
and `pack_image_features`. Towards the end the decoder sees, in a share of the steps, a uniform
random subset of the image tokens, or the thumbnail alone.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration

from ..tasks import scenes, small_text
from .data import PairTokenizer
from .export import make_next_processor
from .extract import build_tower
from .models import VIEW, llava_next_config
from .train import Loop, load_trained, pairs_layout, save_half, trained

PAIRS = 4  # pairs behind one image
START = ((224, 112), (112, 224), (112, 112))
"""Sizes of the small pictures that the decoder starts with."""
SCENE = (scenes.SIDE, scenes.SIDE)
GRAY = (128, 128, 128)


@dataclass
class Sample:
    """One encoded image.

    features (V, 64, 384) fp16 of thumbnail and crops, labels (T, 3) int8 of its T tokens, tokens
    (PAIRS, L) int16 and starts (PAIRS,) int8.
    """

    features: torch.Tensor
    labels: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor


class NextTrainer(Loop):
    """The LLaVA-NeXT, its pool of encoded images and the one stage."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        torch.manual_seed(args.seed)
        model = LlavaNextForConditionalGeneration(llava_next_config())
        load_trained(model, args.init, fresh=("image_newline",))
        model.requires_grad_(True)
        model.model.vision_tower = build_tower(load_file(args.tower), VIEW)
        model.model.vision_tower.requires_grad_(False)
        self.model = model.to(self.device)
        self.words = model.model.language_model.embed_tokens.weight
        self.encoder, self.image_processor = PairTokenizer(), make_next_processor().image_processor
        self.pool: dict[tuple[int, int], list[Sample]] = {}
        self.made = 0
        self.elapsed = {"llava": 0.0}

    # ---------------------------------------------------------------------------------- data

    @torch.no_grad()
    def encode(self, images: list[Image.Image]) -> torch.Tensor:
        """Return features of layer -2 of images of one size, (B, V, 64, 384) fp16."""
        pixels = self.image_processor(images, return_tensors="pt").pixel_values.to(self.device)
        with self.autocast():
            out = self.model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True)
        return out.hidden_states[-2][:, 1:].unflatten(0, pixels.shape[:2]).half()

    def flatten(
        self, features: torch.Tensor, size: tuple[int, int], newline: torch.Tensor
    ) -> torch.Tensor:
        """Return the image tokens (B, T, D) of features (B, V, 64, D), as the stock model joins
        them; size: (width, height)."""
        sizes = torch.tensor([size[::-1]]).expand(len(features), -1)
        joined, _ = self.model.model.pack_image_features(
            list(features), sizes, "default", image_newline=newline
        )
        return torch.stack(list(joined))

    def centres(self, size: tuple[int, int]) -> np.ndarray:
        """Return centre and size (x, y, w, h) of every image token in pixels of the image, (T, 4).

        Rows of newlines are nan.
        """
        width, height = size
        blank = self.image_processor(Image.new("RGB", size), return_tensors="pt").pixel_values[0]
        grid = VIEW // 14
        best = self.best_grid(size)
        step = 14 / min(best[1] * VIEW / width, best[0] * VIEW / height)
        left = (width - best[1] * grid * step) / 2
        top = (height - best[0] * grid * step) / 2
        views = [(0.0, 0.0, width / grid, height / grid)]
        for row in range(best[0]):
            for column in range(best[1]):
                x, y = left + column * grid * step, top + row * grid * step
                views.append((x, y, step, step))
        if len(views) != len(blank):
            raise RuntimeError(f"expected {len(views)} views of {size}, got {len(blank)}")
        i, j = np.divmod(np.arange(grid * grid), grid)
        table = [
            np.stack([x + (j + 0.5) * w, y + (i + 0.5) * h, 0 * i + w, 0 * i + h], -1)
            for x, y, w, h in views
        ]
        coordinates = torch.from_numpy(np.stack(table))[None].float()
        return self.flatten(coordinates, size, torch.full((4,), torch.nan))[0].numpy()

    @staticmethod
    def best_grid(size: tuple[int, int]) -> tuple[int, int]:
        """Return the (rows, columns) of crops of an image of (width, height) pixels."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        pinpoints = llava_next_config().image_grid_pinpoints
        return get_anyres_image_grid_shape(size[::-1], pinpoints, VIEW)

    def label(self, objects, size: tuple[int, int]) -> torch.Tensor:
        """Return shape (5 = background), colour and digit of every token, (T, 3); -1 = none."""
        x, y, w, h = self.centres(size).T
        labels = np.full((len(x), 3), -1, np.int8)
        labels[~np.isnan(x), 0] = len(scenes.SHAPES)
        for obj in objects:
            dx, dy = np.abs(x - obj.x), np.abs(y - obj.y)
            inside = (dx < np.maximum(0.7 * obj.r, w / 2)) & (dy < np.maximum(0.7 * obj.r, h / 2))
            labels[inside, 0] = scenes.SHAPES.index(obj.shape)
            labels[inside, 1] = list(scenes.COLORS).index(obj.color)
            if obj.digit is not None:
                near = (dx < 0.55 * np.maximum(w, 0.7 * obj.r)) & (dy < 0.55 * np.maximum(h, obj.r))
                labels[near & (np.arange(len(x)) >= 64), 2] = obj.digit
        return torch.from_numpy(labels)

    def make(self, indices, split: str, size: tuple[int, int]) -> list[Sample]:
        """Render and encode images of one size: scenes for 336 x 336, else small-text."""
        images, rows = [], []
        picture: Any
        ask: Any
        for index in indices:
            if size == SCENE:
                picture = scenes.make_scene(index, split, self.args.seed)
                images.append(scenes.render(picture))
                ask = scenes.ask
            else:
                picture = small_text.make_picture(index, split, self.args.seed, size)
                images.append(small_text.render(picture))
                ask = small_text.ask
            rng = random.Random(picture.key + "/training")
            asked = ask(picture, PAIRS, rng)
            asked += rng.choices(asked, k=PAIRS - len(asked))
            pairs = [self.encoder.pair(q, a) for q, a, _ in asked]
            rows.append(
                (
                    self.label(picture.objects, size),
                    torch.tensor([t for t, _ in pairs], dtype=torch.int16),
                    torch.tensor([s for _, s in pairs], dtype=torch.int8),
                )
            )
        return [Sample(f, *row) for f, row in zip(self.encode(images), rows, strict=True)]

    def add(self, size: tuple[int, int], count: int) -> list[Sample]:
        """Return new images of a size; they join the pool when the caller has used them."""
        numbers = range(self.made, self.made + count)
        self.made += count
        return self.make(numbers, "train", size)

    def batch(self, size: tuple[int, int]) -> list[Sample]:
        """Return a draw from the pool of a size, after adding new images to it."""
        new = self.add(size, self.args.fresh if size in self.pool else 2 * self.args.batch)
        pool = self.pool.setdefault(size, [])
        chosen = new + [pool[i] for i in self.rng.integers(0, max(1, len(pool)), len(new)) if pool]
        while pool and len(chosen) < self.args.batch:
            chosen.append(pool[self.rng.integers(len(pool))])
        pool += new
        return chosen[: self.args.batch]

    # ---------------------------------------------------------------------------------- model

    def logits(
        self,
        samples: list[Sample],
        size: tuple[int, int],
        keep: torch.Tensor | None = None,
        compact: bool = False,
        features: torch.Tensor | None = None,
    ):
        """Return logits and targets of `answer_logits`, and all projected image tokens (B, T, D).

        The decoder sees the tokens `keep` (B, K), sorted, at their own positions or, if
        `compact`, without gaps.
        """
        if features is None:
            features = torch.stack([s.features for s in samples])
        with self.autocast():
            projected = self.model.model.multi_modal_projector(features.float())
        image = self.flatten(projected, size, self.model.model.image_newline.to(projected.dtype))
        tokens = torch.stack([s.tokens for s in samples]).long()
        tokens = tokens[..., : int((tokens != 0).sum(-1).max())]
        starts = torch.stack([s.starts for s in samples]).long()
        before, total, seen = len(self.prefix_ids), image.shape[1], image
        if keep is not None:
            seen = image.gather(1, keep[..., None].expand(-1, -1, image.shape[-1]))
        mask, positions = pairs_layout(before + seen.shape[1], *tokens.shape[1:])
        positions = positions.expand(len(image), -1).clone()
        if keep is not None and not compact:
            positions[:, before : before + seen.shape[1]] = before + keep
            positions[:, before + seen.shape[1] :] += total - seen.shape[1]
        logits, targets = self.answer_logits(seen, tokens, starts, mask[None, None], positions)
        return logits, targets, image

    def subset(self, count: int, total: int) -> torch.Tensor | None:
        """Return the kept tokens of this step, (B, K), or None for all."""
        drawn = self.rng.random()
        if drawn < self.args.thumbnails:
            return torch.arange(64).expand(count, -1)
        if drawn < self.args.thumbnails + self.args.subsets:
            kept = max(8, round(total * self.rng.uniform(self.args.least, 1)))
            return torch.from_numpy(self.rng.random((count, total)).argsort(1)[:, :kept]).sort(1)[0]
        return None

    # ---------------------------------------------------------------------------------- stage

    def draw_size(self, share: float = 1.0) -> tuple[int, int]:
        """Return the size of a step's images, `share` of the stage's time having passed."""
        if share < self.args.start:
            return START[self.rng.choice(len(START))]
        sizes = [*small_text.SIZES, SCENE]
        weights = np.array([*small_text.SIZES.values(), 0.0])
        weights[-1] = self.args.scenes / (1 - self.args.scenes) * weights.sum()
        return sizes[self.rng.choice(len(sizes), p=weights / weights.sum())]

    def train(self) -> None:
        """Train projector, newline and decoder to answer."""
        args, saved, model = self.args, self.resume(), self.model.model
        optimizer = self.optimizer(
            [model.multi_modal_projector, model.language_model], args.lr, 0.05
        )
        optimizer.add_param_group({"params": [model.image_newline], "weight_decay": 0.0})
        if saved:
            optimizer.load_state_dict(saved["optimizer"])
            self.made = 100_000 * (1 + self.step)  # the pool is gone; pictures are not repeated
        params = [p for group in optimizer.param_groups for p in group["params"]]
        checked, began, first = time.perf_counter(), time.perf_counter(), self.step
        right: list[float] = []
        for step, share in self.ticks("llava", args.minutes * 60, optimizer, args.lr, 50):
            size = self.draw_size(share)
            samples = self.batch(size)
            total = len(samples[0].labels)
            keep = self.subset(len(samples), total) if share > args.whole else None
            compact = bool(self.rng.random() < 0.5)
            logits, targets, image = self.logits(samples, size, keep, compact)
            loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
            labels = torch.stack([s.labels for s in samples]).long()
            named, right_patches = self.patch_loss(image, labels)
            (loss + args.patch_weight * named).backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if keep is None and size != SCENE:
                right.append((logits.argmax(-1) == targets).all(-1).float().mean().item())
            if step % 25 == 0:
                self.log(stage="llava", step=step, share=share, loss=loss.item(),
                         patches=[round(r.item(), 3) for r in right_patches],
                         right=float(np.mean(right or [0])), pool=self.made,
                         step_s=(time.perf_counter() - began) / (step + 1 - first))  # fmt: skip
                right.clear()
            if time.perf_counter() - checked > args.check_every:
                self.check()
                checked = time.perf_counter()
        self.check()

    @torch.no_grad()
    def check(self) -> None:
        """Log accuracies of pairs on validation images, and write the weights."""
        result: dict[str, float] = {}
        for name, sizes in {"small": list(small_text.SIZES), "scenes": [SCENE]}.items():
            right: dict[str, list[float]] = {}
            for size in sizes:
                first = self.args.val * sizes.index(size)
                samples = self.make(range(first, first + self.args.val), "val", size)
                blank = self.encode([Image.new("RGB", size, GRAY)]).expand(len(samples), -1, -1, -1)
                total = len(samples[0].labels)
                third = torch.rand(len(samples), total).argsort(1)[:, : total // 3].sort(1)[0]
                thumbnail = torch.arange(64).expand(len(samples), -1)
                for view, keep, features in (
                    ("all", None, None),
                    ("thumbnail", thumbnail, None),
                    ("third", third, None),
                    ("blank", None, blank),
                ):
                    logits, targets, _ = self.logits(samples, size, keep, True, features)
                    rows = (logits.argmax(-1) == targets).all(-1).float().mean().item()
                    right.setdefault(view, []).append(rows)
            weights = [small_text.SIZES.get(s, 1) for s in sizes]
            for view, rows in right.items():
                result[f"{name}_{view}"] = float(np.average(rows, weights=weights))
        self.log(stage="check", step=self.step, **result)
        save_half(trained(self.model), self.args.work / "llava_next.safetensors")


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", type=Path, required=True, help="output of extract.py")
    parser.add_argument("--init", type=Path, required=True, help="llava.safetensors of train.py")
    parser.add_argument("--work", type=Path, required=True, help="checkpoint, log and weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--start", type=float, default=0.35, help="share on small pictures")
    parser.add_argument("--whole", type=float, default=0.6, help="share without subsets")
    parser.add_argument("--batch", type=int, default=12, help="images per step")
    parser.add_argument("--fresh", type=int, default=6, help="of them new ones")
    parser.add_argument("--scenes", type=float, default=0.07, help="share of steps on scenes")
    parser.add_argument("--thumbnails", type=float, default=0.1, help="share without crops")
    parser.add_argument("--subsets", type=float, default=0.3, help="share with random tokens")
    parser.add_argument("--least", type=float, default=0.2, help="smallest subset, a share")
    parser.add_argument("--patch-weight", type=float, default=0.3)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--val", type=int, default=12, help="validation images of each size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-every", type=float, default=300.0, help="seconds")
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    NextTrainer(args).train()


if __name__ == "__main__":
    main()
