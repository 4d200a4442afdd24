# SPDX-License-Identifier: Apache-2.0
"""Rendered scenes of coloured shapes with questions whose answers are known.

A scene is fully determined by (level, split, seed, index); the splits draw from different random
streams, so training and test scenes never coincide. Level "default" has one to three larger
objects, level "hard" up to six small ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import cos, hypot, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .items import Entry

SIDE = 336
GRID = 24
PATCH = SIDE // GRID
QUESTIONS_PER_IMAGE = 5
SPLITS = ("train", "val", "test")
COLORS = {
    "red": (215, 35, 40),
    "green": (35, 155, 60),
    "blue": (40, 75, 220),
    "yellow": (245, 220, 40),
    "purple": (145, 45, 175),
    "orange": (245, 130, 25),
    "white": (248, 248, 248),
    "black": (22, 22, 22),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLURALS = {"cross": "crosses"}
KINDS = ("color", "shape", "digit", "count", "exist", "position", "size", "relation")
BACKGROUNDS = {
    "gray": (135, 135, 135),
    "brown": (140, 112, 90),
    "teal": (95, 140, 140),
    "pink": (185, 150, 160),
    "olive": (128, 132, 95),
}
# level -> object counts with weights, radius ranges of small and large objects in pixels
LEVELS = {
    "default": (((1, 2, 3), (2, 3, 4)), {"small": (29, 37), "large": (48, 60)}),
    "hard": (((3, 4, 5, 6), (2, 3, 3, 3)), {"small": (15, 19), "large": (25, 31)}),
}
DIGIT_SCALE = {"circle": 1.25, "square": 1.3, "triangle": 0.95, "star": 0.85, "cross": 0.85}
MARGIN = 24  # pixels by which "left of" and the like must hold


@dataclass(frozen=True)
class Obj:
    """One object: attributes, centre and radius in pixels, angle in radians."""

    shape: str
    color: str
    size: str
    digit: int | None
    x: float
    y: float
    r: float
    angle: float

    @property
    def words(self) -> str:
        """The object in words, such as "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects (listed left to right) and what the background is drawn from."""

    level: str
    objects: tuple[Obj, ...]
    background: str
    texture: int
    key: str


def make_scene(index: int, split: str = "test", seed: int = 0, level: str = "default") -> Scene:
    """Return scene number `index` of a split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; one of {', '.join(LEVELS)}")
    key = f"scenes/{level}/{split}/{seed}/{index}"
    rng = random.Random(key)
    (counts, weights), radii = LEVELS[level]
    count = rng.choices(counts, weights)[0]
    objects: list[Obj] = []
    while len(objects) < count:
        size = rng.choice(("small", "large"))
        r = rng.uniform(*radii[size])
        x, y = rng.uniform(r + 4, SIDE - r - 4), rng.uniform(r + 4, SIDE - r - 4)
        if any(hypot(x - o.x, y - o.y) < 1.08 * (r + o.r) + 4 for o in objects):
            continue
        # Repeated colours and shapes are what makes counting and telling apart worth asking.
        color = rng.choice(tuple(COLORS))
        shape = rng.choice(SHAPES)
        if objects and rng.random() < 0.25:
            color = rng.choice(objects).color
        elif objects and rng.random() < 0.25:
            shape = rng.choice(objects).shape
        if any((o.color, o.shape) == (color, shape) for o in objects) and rng.random() < 0.7:
            continue
        digit = rng.randrange(10) if rng.random() < 0.6 else None
        objects.append(Obj(shape, color, size, digit, x, y, r, rng.uniform(-0.25, 0.25)))
    objects.sort(key=lambda o: o.x)
    return Scene(level, tuple(objects), rng.choice(tuple(BACKGROUNDS)), rng.getrandbits(32), key)


# ------------------------------------------------------------------------------------ drawing


def _outline(shape: str, angle: float) -> list[tuple[float, float]]:
    """Return the polygon of a shape with radius 1 around the origin."""
    if shape == "square":
        points = [(0.86, 0.86), (-0.86, 0.86), (-0.86, -0.86), (0.86, -0.86)]
    elif shape == "triangle":
        points = [(1.1 * sin(k * 2 * pi / 3), 0.15 - 1.1 * cos(k * 2 * pi / 3)) for k in range(3)]
    elif shape == "star":
        points = [
            (
                (1.08 if k % 2 == 0 else 0.5) * sin(k * pi / 5),
                -(1.08 if k % 2 == 0 else 0.5) * cos(k * pi / 5),
            )
            for k in range(10)
        ]
    else:  # cross
        a, b = 1.0, 0.36
        points = [(b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a)]
        points += [(-x, -y) for x, y in points]
    c, s = cos(angle), sin(angle)
    return [(c * x - s * y, s * x + c * y) for x, y in points]


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _mask(obj: Obj) -> tuple[Image.Image, int, int]:
    """Return the object's antialiased mask and the pixel of its top left corner."""
    scale, half = 3, int(obj.r * 1.15) + 2
    left, top = int(obj.x) - half, int(obj.y) - half
    cx, cy = (obj.x - left) * scale, (obj.y - top) * scale
    mask = Image.new("L", (2 * half * scale, 2 * half * scale), 0)
    draw, r = ImageDraw.Draw(mask), obj.r * scale
    if obj.shape == "circle":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    else:
        draw.polygon(
            [(cx + r * x, cy + r * y) for x, y in _outline(obj.shape, obj.angle)], fill=255
        )
    return mask.reduce(scale), left, top


def backdrop(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Return a gradient with coarse and fine noise and a few muted blots and lines."""
    side = SIDE // 2  # drawn at half size and enlarged: backgrounds are soft, and it is quick
    base = np.array(BACKGROUNDS[scene.background], np.float32)
    slope = np.linspace(-1, 1, side, dtype=np.float32)
    a, b = rng.uniform(-22, 22, 2).astype(np.float32)
    cells = int(rng.integers(4, 13))
    noise = 128 + rng.normal(0, rng.uniform(2, 11), (cells, cells, 3))
    coarse = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    image = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32) - 128
    image += base + rng.normal(0, 8, 3).astype(np.float32)
    fine = rng.standard_normal((side, side), dtype=np.float32) * np.float32(rng.uniform(0, 7))
    image += (a * slope[:, None] + b * slope[None, :] + fine)[..., None]
    result = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(result)
    for _ in range(int(rng.integers(0, 10))):
        tone = tuple(int(v) for v in (base + rng.normal(0, 16, 3)).clip(60, 205))
        x, y = rng.uniform(0, side, 2)
        if rng.random() < 0.5:
            dx, dy = rng.normal(0, 45, 2)
            draw.line((x, y, x + dx, y + dy), fill=tone, width=int(rng.integers(1, 3)))
        else:
            w, h = rng.uniform(3, 22, 2)
            draw.ellipse((x - w, y - h, x + w, y + h), fill=tone)
    return result.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def draw_objects(image: Image.Image, objects: Sequence[Obj], rng: np.random.Generator) -> None:
    """Draw objects and their digits onto an image."""
    for obj in objects:
        mask, left, top = _mask(obj)
        jitter = rng.integers(-14, 15, 3)
        fill = tuple(int(v) for v in np.clip(np.array(COLORS[obj.color]) + jitter, 0, 255))
        image.paste(fill, (left, top), mask)
        if obj.digit is not None:
            light = obj.color in ("yellow", "white", "orange")
            drop = 0.12 * obj.r if obj.shape == "triangle" else 0
            ImageDraw.Draw(image).text(
                (obj.x, obj.y + drop),
                str(obj.digit),
                fill=(15, 15, 15) if light else (250, 250, 250),
                font=_font(max(8, round(DIGIT_SCALE[obj.shape] * obj.r))),
                anchor="mm",
                stroke_width=1 if obj.r > 24 else 0,
            )


def render(scene: Scene) -> Image.Image:
    """Return the scene as an RGB image of 336 x 336 pixels."""
    rng = np.random.default_rng(scene.texture)
    image = backdrop(scene, rng)
    draw_objects(image, scene.objects, rng)
    return image


def coverage(scene: Scene) -> np.ndarray:
    """Return the share of every patch that each object covers, (objects, 24, 24) in [0, 1]."""
    shares = np.zeros((len(scene.objects), GRID, GRID), np.float32)
    for share, obj in zip(shares, scene.objects, strict=True):
        mask, left, top = _mask(obj)
        canvas = Image.new("L", (SIDE, SIDE), 0)
        canvas.paste(mask, (left, top))
        share[:] = (
            np.asarray(canvas, np.float32).reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)) / 255
        )
    return shares


def patches(scene: Scene, share: float = 0.5) -> list[np.ndarray]:
    """Return for every object the flat indices (0..575) of the patches it covers to `share`."""
    return [np.flatnonzero(c >= share) for c in coverage(scene)]


# ---------------------------------------------------------------------------------- questions


def references(scene: Scene, obj: Obj, without: str) -> list[str]:
    """Return the phrases that single out `obj` and do not mention the attribute `without`."""
    others = [o for o in scene.objects if o is not obj]
    found = []
    if without not in ("color", "shape") and all(o.words != obj.words for o in others):
        found += [f"the {obj.words}"] * 2
    if without != "shape" and all(o.shape != obj.shape for o in others):
        found.append(f"the {obj.shape}")
    if without != "color" and all(o.color != obj.color for o in others):
        found.append(f"the {obj.color} object")
    if without != "digit" and obj.digit is not None and all(o.digit != obj.digit for o in others):
        found.append(f"the object with the digit {obj.digit}")
    return found


def _about(
    scene: Scene, rng: random.Random, without: str, among: Sequence[Obj] | None = None
) -> tuple[Obj, str] | None:
    """Return an object of `among` and a phrase for it, or None where no phrase is unambiguous."""
    objects = list(scene.objects if among is None else among)
    rng.shuffle(objects)
    for obj in objects:
        refs = references(scene, obj, without)
        if refs:
            return obj, rng.choice(refs)
    return None


Asked = tuple[str, str] | None  # question and answer, where the scene has one


def _color(scene: Scene, rng: random.Random) -> Asked:
    about = _about(scene, rng, "color")
    if about is None:
        return None
    template = rng.choice(("what color is {}?", "what is the color of {}?"))
    return template.format(about[1]), about[0].color


def _shape(scene: Scene, rng: random.Random) -> Asked:
    about = _about(scene, rng, "shape")
    if about is None:
        return None
    template = rng.choice(("what shape is {}?", "what is the shape of {}?"))
    return template.format(about[1]), about[0].shape


def _digit(scene: Scene, rng: random.Random) -> Asked:
    about = _about(scene, rng, "digit", [o for o in scene.objects if o.digit is not None])
    if about is None:
        return None
    template = rng.choice(("what digit is on {}?", "which digit does {} show?"))
    return template.format(about[1]), str(about[0].digit)


def _count(scene: Scene, rng: random.Random) -> Asked:
    which = rng.randrange(3)
    if which == 0:
        noun, count = "objects", len(scene.objects)
    elif which == 1:
        present = [o.color for o in scene.objects]
        color = rng.choice(present if rng.random() < 0.7 else tuple(COLORS))
        noun, count = f"{color} objects", present.count(color)
    else:
        present = [o.shape for o in scene.objects]
        shape = rng.choice(present if rng.random() < 0.7 else SHAPES)
        noun, count = PLURALS.get(shape, shape + "s"), present.count(shape)
    return f"how many {noun} are there?", str(count)


def _exist(scene: Scene, rng: random.Random) -> Asked:
    kind, wanted = rng.randrange(3), rng.random() < 0.5
    pairs = [(c, s) for c in COLORS for s in SHAPES]
    if kind == 0:
        present = {(o.color, o.shape) for o in scene.objects}
        # A "no" about a colour or a shape that is there, in another combination, is the hard one.
        near = [
            p for p in pairs if p not in present and any(p[0] == c or p[1] == s for c, s in present)
        ]
        far = [p for p in pairs if p not in present]
        options = sorted(present) if wanted else (near if rng.random() < 0.7 else far)
        noun = " ".join(rng.choice(options))
    elif kind == 1:
        colors = {o.color for o in scene.objects}
        named = sorted(colors) if wanted else [c for c in COLORS if c not in colors]
        noun = f"{rng.choice(named)} object"
    else:
        shapes = {o.shape for o in scene.objects}
        choices = sorted(shapes) if wanted else [s for s in SHAPES if s not in shapes]
        if not choices:
            return None
        noun = rng.choice(choices)
    article = "an" if noun[0] in "aeiou" else "a"
    return f"is there {article} {noun}?", "yes" if wanted else "no"


def _position(scene: Scene, rng: random.Random) -> Asked:
    axis = rng.choice("xy")
    far = [o for o in scene.objects if abs(getattr(o, axis) - SIDE / 2) >= MARGIN]
    about = _about(scene, rng, "position", far)
    if about is None:
        return None
    obj, ref = about
    if axis == "x":
        return f"is {ref} on the left or right?", "left" if obj.x < SIDE / 2 else "right"
    return f"is {ref} at the top or bottom?", "top" if obj.y < SIDE / 2 else "bottom"


def _size(scene: Scene, rng: random.Random) -> Asked:
    about = _about(scene, rng, "size")
    if about is None:
        return None
    template = rng.choice(("is {} small or large?", "what size is {}?"))
    return template.format(about[1]), about[0].size


RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def _relation(scene: Scene, rng: random.Random) -> Asked:
    options = []
    for anchor in scene.objects:
        for phrase, (dx, dy) in RELATIONS.items():
            ahead = {o: dx * (o.x - anchor.x) + dy * (o.y - anchor.y) for o in scene.objects}
            ahead.pop(anchor)
            clear = all(abs(d) >= MARGIN for d in ahead.values())
            targets = [o for o, d in ahead.items() if d >= MARGIN]
            if clear and len(targets) == 1:
                options.append((anchor, phrase, targets[0]))
    rng.shuffle(options)
    for anchor, phrase, target in options:
        refs = references(scene, anchor, "position")
        if refs:
            asked = rng.choice(("shape", "color"))
            return f"what {asked} is {phrase} {rng.choice(refs)}?", getattr(target, asked)
    return None


_ASK = {
    "color": _color,
    "shape": _shape,
    "digit": _digit,
    "count": _count,
    "exist": _exist,
    "position": _position,
    "size": _size,
    "relation": _relation,
}


def ask(scene: Scene, n: int, rng: random.Random | None = None) -> list[tuple[str, str, str]]:
    """Return up to `n` different (question, answer, kind) about a scene, kinds drawn evenly."""
    rng = rng or random.Random(scene.key + "/questions")
    found: dict[str, tuple[str, str, str]] = {}
    order: list[str] = []
    for _ in range(4 * n):
        if not order:
            order = list(KINDS)
            rng.shuffle(order)
        kind = order.pop()
        asked = _ASK[kind](scene, rng)
        if asked:
            found.setdefault(asked[0], (*asked, kind))
        if len(found) == n:
            break
    return list(found.values())


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Return a sentence naming every object (left to right, or shuffled by `rng`) and the
    background."""
    parts = []
    for obj in scene.objects:
        digit = "" if obj.digit is None else f" with the digit {obj.digit}"
        row = "top" if obj.y < SIDE / 2 else "bottom"
        column = "left" if obj.x < SIDE / 2 else "right"
        parts.append(f"a {obj.size} {obj.words}{digit} at the {row} {column}")
    if rng:
        rng.shuffle(parts)
    return f"{' and '.join(parts)} on a {scene.background} background"


def _load(index: int, split: str, seed: int, level: str) -> Image.Image:
    return render(make_scene(index, split, seed, level))


def entries(split: str, n: int | None, seed: int, level: str = "default") -> list[Entry]:
    """Return `n` questions (500 if None), five per scene."""
    n = 500 if n is None else n
    result: list[Entry] = []
    index = 0
    while len(result) < n:
        scene = make_scene(index, split, seed, level)
        load = partial(_load, index, split, seed, level)
        result += [Entry(index, load, *qa) for qa in ask(scene, QUESTIONS_PER_IMAGE)]
        index += 1
    return result[:n]
