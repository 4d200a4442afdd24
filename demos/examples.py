# SPDX-License-Identifier: Apache-2.0
"""Example images of the demo, all drawn here: scenes, a plain shape, signs, a chart, a document.

The embedded models were trained on the first three kinds alone. Chart and document are there for
other models (``vtc demo --model``), and to see the embedded ones fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..benchmarks.tasks import scenes, small_text

INK, PAPER = (30, 35, 45), (250, 250, 247)


@dataclass(frozen=True)
class Example:
    """A question about an image that is drawn when it is needed.

    Attributes:
        loader: of the embedded model that was trained on such images; of the one to show it to,
            where none was.
        known: whether that model was trained on them.
    """

    kind: str
    draw: Callable[[], Image.Image]
    question: str
    answer: str
    loader: str
    known: bool = True


def _scene(index: int) -> Image.Image:
    return scenes.render(scenes.make_scene(index))


def _signs(index: int) -> Image.Image:
    return small_text.render(small_text.make_picture(index))


def shape() -> Image.Image:
    """One plain shape on a plain ground, as in easy-VQA."""
    image = Image.new("RGB", (256, 256), (238, 236, 225))
    ImageDraw.Draw(image).polygon([(70, 190), (190, 196), (136, 84)], fill=(40, 75, 220))
    return image


def chart() -> Image.Image:
    """A bar chart with four named bars."""
    image = Image.new("RGB", (480, 336), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    draw.text((240, 22), "Sales by season", fill=INK, font=ImageFont.load_default(22), anchor="mm")
    bars = {"spring": (35, 155, 60), "summer": (245, 130, 25), "autumn": (215, 35, 40)}
    bars["winter"] = (40, 75, 220)
    base = 290
    for i, (name, value) in enumerate(zip(bars, (12, 21, 16, 7), strict=True)):
        left, top = 70 + 100 * i, base - 10 * value
        draw.rectangle((left, top, left + 60, base), fill=bars[name])
        draw.text((left + 30, top - 12), str(value), fill=INK, font=font, anchor="mm")
        draw.text((left + 30, base + 18), name, fill=INK, font=font, anchor="mm")
    draw.line((50, base, 450, base), fill=INK, width=2)
    return image


def document() -> Image.Image:
    """A small invoice."""
    image = Image.new("RGB", (360, 480), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((30, 28), "INVOICE 2047", fill=INK, font=ImageFont.load_default(26))
    font = ImageFont.load_default(15)
    draw.text((30, 72), "12 May, to be paid in 14 days", fill=INK, font=font)
    rows = [("3 notebooks", "13.50"), ("1 desk lamp", "24.00"), ("10 pencils", "4.20")]
    for i, (what, price) in enumerate([*rows, ("Total", "41.70")]):
        y = 130 + 38 * i
        draw.text((30, y), what, fill=INK, font=font)
        draw.text((330, y), price, fill=INK, font=font, anchor="ra")
        draw.line((30, y + 26, 330, y + 26), fill=(200, 200, 200))
    return image


LLAVA, NEXT = "load_llava", "load_llava_next"
EXAMPLES = (
    Example("scene", lambda: _scene(0), "what digit is on the green star?", "8", LLAVA),
    Example("scene", lambda: _scene(12), "what shape has the digit 1?", "star", LLAVA),
    Example("scene", lambda: _scene(10), "what color is above the blue object?", "yellow", LLAVA),
    Example("shape", shape, "what color is the triangle?", "blue", LLAVA),
    Example("sign", lambda: _signs(9), "what digit is on the purple square?", "7", NEXT),
    Example("sign", lambda: _signs(2), "what digit is on the white circle?", "7", NEXT),
    Example("chart", chart, "which season has the tallest bar?", "summer", NEXT, known=False),
    Example("document", document, "what is the total?", "41.70", NEXT, known=False),
)
