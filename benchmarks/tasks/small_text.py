# SPDX-License-Identifier: Apache-2.0
"""Pictures of small numbered signs: the answers need a model's high-resolution crops.

Each picture carries one or two round or square signs, each with a digit 13 to 16 pixels high, and
one to three shapes without one, all of different colours. Pictures are at most 336 pixels wide or
high, some of them strips. Cut into crops at full size the digits can be read; in a thumbnail of
112 x 112 pixels they are 3 to 8 pixels high or wide. A picture is fully determined by
(split, seed, index), and the splits draw from different random streams.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from math import hypot

import numpy as np
from PIL import Image

from . import scenes
from .items import Entry

SIZES = {
    (336, 224): 5,
    (224, 336): 5,
    (310, 190): 3,
    (190, 310): 3,
    (224, 224): 2,
    (330, 105): 1,
    (105, 330): 1,
}
"""(width, height) in pixels -> how often."""
SIGNS, PLAIN = ("circle", "square"), ("triangle", "star", "cross")
RADIUS = (15.0, 18.0)
QUESTIONS_PER_IMAGE = 2
KINDS = ("digit", "place")


@dataclass(frozen=True)
class Picture(scenes.Scene):
    """Signs and plain shapes, listed left to right, of different colours; size in pixels."""

    width: int
    height: int


def make_picture(
    index: int, split: str = "test", seed: int = 0, size: tuple[int, int] | None = None
) -> Picture:
    """Return picture number `index` of a split, of a drawn (width, height) if `size` is None."""
    if split not in scenes.SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(scenes.SPLITS)}")
    key = f"small-text/{split}/{seed}/{index}"
    rng = random.Random(key)
    drawn = rng.choices(tuple(SIZES), tuple(SIZES.values()))[0]
    width, height = size or drawn
    signs = rng.choice((1, 1, 2))
    wanted = signs + rng.randint(1, 3)
    colors = rng.sample(tuple(scenes.COLORS), wanted)
    objects: list[scenes.Obj] = []
    for _ in range(1000):
        r = rng.uniform(*RADIUS)
        x, y = rng.uniform(r + 4, width - r - 4), rng.uniform(r + 4, height - r - 4)
        if any(hypot(x - o.x, y - o.y) < 1.3 * (r + o.r) for o in objects):
            continue
        sign = len(objects) < signs
        objects.append(
            scenes.Obj(
                rng.choice(SIGNS if sign else PLAIN),
                colors[len(objects)],
                "small",
                rng.randrange(10) if sign else None,
                x,
                y,
                r,
                rng.uniform(-0.15, 0.15),
            )
        )
        if len(objects) == wanted:
            break
    objects.sort(key=lambda o: o.x)
    background = rng.choice(tuple(scenes.BACKGROUNDS))
    return Picture(
        "small-text", tuple(objects), background, rng.getrandbits(32), key, width, height
    )


def render(picture: Picture) -> Image.Image:
    """Return the picture as an RGB image of its own size."""
    rng = np.random.default_rng(picture.texture)
    image = scenes.backdrop(picture, rng).crop((0, 0, picture.width, picture.height))
    scenes.draw_objects(image, picture.objects, rng)
    return image


def signs(picture: Picture) -> list[scenes.Obj]:
    """Return the objects that carry a digit."""
    return [o for o in picture.objects if o.digit is not None]


def places(picture: Picture) -> dict[str, scenes.Obj]:
    """Return the sign at each place, such as "top left", that holds exactly one.

    A picture with a sign near the middle lines, by a tenth of its size, has no such places; one
    that is a strip has no top and bottom, or no left and right.
    """
    found: dict[str, list[scenes.Obj]] = {}
    for sign in signs(picture):
        words = []
        for share, low, high, short in (
            (sign.y / picture.height, "top", "bottom", 2 * picture.height < picture.width),
            (sign.x / picture.width, "left", "right", 2 * picture.width < picture.height),
        ):
            if short:
                continue
            if abs(share - 0.5) < 0.05:
                return {}
            words.append(low if share < 0.5 else high)
        found.setdefault(" ".join(words), []).append(sign)
    return {place: here[0] for place, here in found.items() if len(here) == 1}


def _digit(picture: Picture, rng: random.Random) -> tuple[str, str]:
    sign = rng.choice(signs(picture))
    phrase = rng.choice(scenes.references(picture, sign, "digit"))
    template = rng.choice(("what digit is on {}?", "which digit does {} show?"))
    return template.format(phrase), str(sign.digit)


def _place(picture: Picture, rng: random.Random) -> tuple[str, str] | None:
    options = places(picture)
    if not options:
        return None
    place = rng.choice(sorted(options))
    at = "on" if place in ("left", "right") else "at"
    return f"what digit is {at} the {place}?", str(options[place].digit)


_ASK = {"digit": _digit, "place": _place}


def ask(picture: Picture, n: int, rng: random.Random | None = None) -> list[tuple[str, str, str]]:
    """Return up to `n` different (question, answer, kind), the kinds in turn."""
    rng = rng or random.Random(picture.key + "/questions")
    found: dict[str, tuple[str, str, str]] = {}
    for turn in range(8 * n):
        kind = KINDS[turn % 2]
        asked = _ASK[kind](picture, rng)
        if asked:
            found.setdefault(asked[0], (*asked, kind))
        if len(found) == n:
            break
    return list(found.values())


def _load(index: int, split: str, seed: int) -> Image.Image:
    return render(make_picture(index, split, seed))


def entries(split: str, n: int | None, seed: int) -> list[Entry]:
    """Return `n` questions (500 if None), two per picture."""
    n = 500 if n is None else n
    result: list[Entry] = []
    index = 0
    while len(result) < n:
        picture = make_picture(index, split, seed)
        load = partial(_load, index, split, seed)
        result += [Entry(index, load, *qa) for qa in ask(picture, QUESTIONS_PER_IMAGE)]
        index += 1
    return result[:n]
