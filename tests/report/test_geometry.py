# SPDX-License-Identifier: Apache-2.0
"""Places of tokens in an image, by experiment: features that change with a spot have boxes on it.

Real image processors and real model code, with random weights and without attention in the encoder,
so that a feature depends on its own patches alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from mini_generic import FAMILIES
from PIL import Image
from processors import PROCESSORS, SQUARE, TILE, features, model_of

import vtc
from vtc.benchmarks.support.mini_families import BREAK, END, EVERY, IMAGE
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor
from vtc.report.geometry import index_map, patch_boxes
from vtc.report.tiles import grid_boxes, tiles

SIZES = [(127, 61), (58, 141), (90, 90)]


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def report_on(model: Any, family: str, inputs: dict[str, Any]) -> vtc.Report:
    out = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    n = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in out)
    ids = torch.tensor([[1, 7, BREAK, *[IMAGE] * n, END, 8, 9]])
    with vtc.observe(model) as session:
        model(input_ids=ids, **EVERY[family].extra(ids, torch.ones_like(ids)), **inputs)
        return session.report()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_tokens_that_change_lie_where_the_image_was_painted(name: str, size: tuple[int, int]):
    family, make = PROCESSORS[name]
    model, processor = model_of(family), make()

    def inputs(image: Image.Image) -> dict[str, Any]:
        given = processor(images=[image], return_tensors="pt")
        known = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
        return {k: v for k, v in given.items() if k in known and (k != "image_sizes" or sized)}

    sized = family in ("LLaVA-NeXT", "LLaVA-OneVision", "Mistral 3", "LLaVA, Pixtral")
    if family == "LLaVA-OneVision":
        model.config.vision_aspect_ratio = f"anyres_max_{4 if 'resampled' in name else 9}"
    image = noise(size, 0)
    before = features(model, inputs(image))
    report = report_on(model, family, inputs(image))
    patches = patch_boxes(report, image, processor)
    boxes = patches.boxes
    assert len(boxes) == len(before)
    assert patches.entries == len(report.kept)

    # Two pixels of the tile or of the image are what resampling smears.
    parts = tiles(processor, size)
    scale = max(
        max((t.box[2] - t.box[0]) / t.size[1], (t.box[3] - t.box[1]) / t.size[0]) for t in parts
    )
    slack = 2.2 * max(scale, 1)
    if "resampled" in name:
        assert any(layout.resampled for layout in report.layouts) == (size == (90, 90))
        slack += (boxes[-1, 2:] - boxes[-1, :2]).max()  # which blends neighbours
    rng = np.random.default_rng(1)
    for _ in range(3):
        edge = int(min(size) / 8)
        x, y = (int(rng.integers(0, length - edge)) for length in size)
        spot = image.copy()
        spot.paste(Image.eval(image.crop((x, y, x + edge, y + edge)), lambda v: 255 - v), (x, y))
        changed = (features(model, inputs(spot)) - before).abs().amax(1).numpy() > 1e-6

        def touches(by: float, x: int = x, y: int = y, edge: int = edge) -> np.ndarray:
            left, top, right, bottom = boxes.T
            across = np.minimum(right, x + edge + by) - np.maximum(left, x - by)
            down = np.minimum(bottom, y + edge + by) - np.maximum(top, y - by)
            return (across > 0) & (down > 0)

        assert not (changed & ~touches(slack)).any()
        assert not (touches(-0.5) & ~changed).any()
        assert changed.any() == touches(0).any()


def box_of(processor: Any, size: tuple[int, int]) -> np.ndarray:
    (tile,) = tiles(processor, size)
    return np.array(tile.box)


@pytest.mark.parametrize("size", [(640, 427), (300, 901), (97, 96), (2500, 1100)])
def test_boxes_are_exact_to_a_fraction_of_a_pixel(size: tuple[int, int]):
    """Against the arithmetic of CLIP's processor: the shorter edge to 336, then the centre."""
    width, height = size
    scale = 336 / min(size)
    resized = [336 if length == min(size) else int(length * scale) for length in size]
    left, top = ((edge - 336) // 2 for edge in resized)
    across, down = width / resized[0], height / resized[1]
    want = [left * across, top * down, (left + 336) * across, (top + 336) * down]
    crop = hf.CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    assert np.abs(box_of(crop, size) - want).max() < 0.15 * max(across, 1)
    squeeze = hf.SiglipImageProcessor(size={"height": 384, "width": 384})
    assert np.abs(box_of(squeeze, size) - [0, 0, *size]).max() < 0.15 * max(1, max(size) / 384)


def test_padding_reaches_beyond_the_image():
    """The square that LLaVA-1.5 was trained on, as a function from an image to pixel values."""

    def expand(image: Image.Image) -> torch.Tensor:
        edge = max(image.size)
        square = Image.new("RGB", (edge, edge), (122, 116, 104))
        square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
        return torch.tensor(np.array(square.resize((56, 56)))).permute(2, 0, 1) / 255 - 0.5

    assert np.abs(box_of(expand, (200, 100)) - [0, -50, 200, 150]).max() < 0.5
    # A strip of four pixels of the tile: as wide a step as along the other edge.
    assert np.abs(box_of(expand, (1400, 100)) - [0, -650, 1400, 750]).max() < 25


def test_crops_of_padding_alone_show_nothing():
    processor = hf.LlavaNextImageProcessor(
        image_grid_pinpoints=[[96, 96]], size={"shortest_edge": 32}, crop_size=SQUARE
    )
    boxes = [tile.box for tile in tiles(processor, (192, 40))]
    empty = [i for i, (left, _, right, _) in enumerate(boxes) if left == right]
    assert empty == [1, 2, 3, 7, 8, 9]  # behind the thumbnail the first row and the last
    assert np.abs(np.array(boxes[4]) - [0, -12, 64, 52]).max() < 0.5


def test_a_tile_of_a_few_pixels_shows_next_to_nothing():
    def corner(image: Image.Image) -> torch.Tensor:
        """All of the image, and its upper left corner beside padding."""
        small = torch.tensor(np.array(image.resize((40, 40)))).permute(2, 0, 1).float()
        out = torch.zeros(2, 3, 56, 56)
        out[0, :, :40, :40], out[1, :, :3, :3] = small, small[:, :3, :3]
        return out

    whole, piece = tiles(corner, (80, 60))
    assert np.abs(np.array(whole.box) - [0, 0, 112, 84]).max() < 0.5
    assert piece.box == (0, 0, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (5, 4), (300, 2)])
def test_images_of_a_few_pixels(size: tuple[int, int]):
    assert np.allclose(box_of(hf.SiglipImageProcessor(), size), [0, 0, *size], atol=1)


def test_a_processor_that_distorts_is_refused():
    def flip(image: Image.Image) -> torch.Tensor:
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((56, 56))
        return torch.tensor(np.array(mirrored)).permute(2, 0, 1).float()

    def blank(image: Image.Image) -> torch.Tensor:
        return torch.zeros(3, 56, 56)

    for transform, problem in ((flip, "resize, crop"), (blank, "nothing of the image")):
        with pytest.raises(ValueError, match=problem):
            tiles(transform, (80, 60))
    with pytest.raises(ValueError, match="dimensions"):
        tiles(lambda image: torch.zeros(4, 12), (80, 60))
    with pytest.raises(ValueError, match="function from an image"):
        tiles(3, (80, 60))


def test_settings_of_the_whole_processor_count():
    """A LLaVA processor, and settings that are given with the call."""
    processor = mini_processor(mini_llava())
    assert np.abs(box_of(processor, (120, 60)) - [30, 0, 90, 60]).max() < 0.3
    whole = functools.partial(processor, do_center_crop=False, size={"height": 56, "width": 56})
    assert np.abs(box_of(whole, (120, 60)) - [0, 0, 120, 60]).max() < 0.3


def test_defaults_of_the_processor_count_more_than_those_of_its_image_processor():
    """InternVL's cuts tiles, which its image processor by itself does not."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ("<pad>", "<img>", "</img>", "<ctx>", "<vid>", "what")
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<ctx>",
            "video_token": "<vid>",
        },
    )
    images = hf.GotOcr2ImageProcessor(size=TILE, min_patches=1, max_patches=6)
    videos = hf.InternVLVideoProcessor()
    processor = hf.InternVLProcessor(images, tokenizer, videos, image_seq_length=16)
    assert len(tiles(images, (200, 100))) == 1
    assert len(tiles(processor, (200, 100))) == 3  # two side by side and a thumbnail
    assert tiles(processor, (200, 100))[2].shows_all((200, 100))
    settled = functools.partial(processor, crop_to_patches=False)
    assert len(tiles(settled, (200, 100))) == 1


def report_of(size: tuple[int, int]) -> tuple[vtc.Report, Any]:
    model = mini_llava()
    processor = mini_processor(model)
    inputs = processor(text=["<image> is"], images=[noise(size, 0)], return_tensors="pt")
    with torch.no_grad(), vtc.observe(model) as session:
        model(**inputs)
        return session.report(), processor


def test_an_image_or_a_processor_of_another_report_is_refused():
    report, processor = report_of((120, 60))
    larger = functools.partial(
        processor, size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}
    )
    with pytest.raises(ValueError, match="8 x 8 patches"):
        patch_boxes(report, noise((120, 60), 0), larger)
    with pytest.raises(ValueError, match="no image 1"):
        patch_boxes(report, noise((120, 60), 0), processor, 1)
    report.kinds = ["video"]
    with pytest.raises(ValueError, match="video"):
        patch_boxes(report, noise((120, 60), 0), processor)

    model = model_of("LLaVA-NeXT")
    anyres = PROCESSORS["LLaVA-NeXT"][1]()
    inputs = dict(anyres(images=[noise((64, 96), 0)], return_tensors="pt"))
    with torch.no_grad():
        report = report_on(model, "LLaVA-NeXT", inputs)
    with pytest.raises(ValueError, match="64 x 96"):
        patch_boxes(report, noise((96, 64), 0), anyres)
    whole = functools.partial(anyres, image_grid_pinpoints=[[32, 32]])
    with pytest.raises(ValueError, match=r"makes 2 tiles of the image and the report has 10; give"):
        patch_boxes(report, noise((64, 96), 0), whole)


def test_a_model_that_tells_the_number_of_its_tokens_alone():
    """One that only the generic adapter knows: a square image is a square of tokens."""
    family = next(f for f in FAMILIES if f.name.startswith("Cohere2Vision"))
    model = family.build()
    with torch.no_grad(), vtc.observe(model) as session:
        model(**family.inputs(model, [1]))
        report = session.report()

    def squeezed(size: tuple[int, int]) -> Callable[[Image.Image], torch.Tensor]:
        return lambda image: torch.tensor(np.array(image.resize(size))).permute(2, 0, 1).float()

    assert report.grid == (0, 0)
    image = noise((80, 60), 0)
    boxes = patch_boxes(report, image, squeezed((32, 32))).boxes
    assert np.abs(boxes - grid_boxes((0, 0, 80, 60), 2, 2)).max() < 0.1
    with pytest.raises(ValueError, match="how this model lays out the 4 tokens of an image"):
        patch_boxes(report, image, squeezed((64, 32)))


def test_index_map_paints_boxes_in_order():
    boxes = np.concatenate([grid_boxes((0, 0, 4, 2), 1, 2), grid_boxes((-1, 0, 2, 1), 1, 3)])
    below = index_map(boxes, (5, 3), np.arange(5))
    assert below.tolist() == [[3, 4, 1, 1, -1], [0, 0, 1, 1, -1], [-1] * 5]
    above = index_map(boxes, (5, 3), np.array([2, 3, 4, 0, 1]))
    assert above.tolist() == [[0, 0, 1, 1, -1], [0, 0, 1, 1, -1], [-1] * 5]
