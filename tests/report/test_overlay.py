# SPDX-License-Identifier: Apache-2.0
"""Pictures: what is drawn on which pixels, from low-level functions and from reports."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
from typing import Any

import mini
import numpy as np
import pytest
import torch
from PIL import Image
from processors import CROPPED, PROCESSORS, features, model_of

import vtc
from vtc.benchmarks.support.mini_families import BREAK, END, EVERY, IMAGE
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor
from vtc.methods.divprune import DivPrune
from vtc.methods.fastv import FastV
from vtc.methods.pitome import PiToMe
from vtc.methods.prefixkv import PrefixKV
from vtc.methods.visionzip import VisionZip
from vtc.report.geometry import index_map
from vtc.report.overlay import contact_sheet, kept_overlay, merge_groups, score_map, viridis
from vtc.report.tiles import grid_boxes


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), 0 * x + 90]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def even(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    return grid_boxes((0, 0, *image.size), rows, columns)


# ---- drawing -------------------------------------------------------------------------------------


def test_kept_patches_are_untouched_and_the_rest_is_dimmed_not_black():
    image = gradient(120, 60)
    boxes, kept = even(image, 2, 3), np.isin(np.arange(6), [1, 5])
    out = kept_overlay(image, boxes, kept, size=120, line=0)
    before, after = np.asarray(image).astype(int), np.asarray(out).astype(int)
    clear = kept[index_map(boxes, image.size, np.arange(6))]
    assert out.size == image.size
    assert (after[clear] == before[clear]).all()
    assert (after[~clear] != before[~clear]).any(-1).all()
    assert after[~clear].min() > 30
    assert len(np.unique(after[~clear][:, 0])) > 10, "the picture still shows through"


def test_a_share_of_one_half_lies_between():
    image = gradient(60, 60)
    none, half, full = (
        np.asarray(kept_overlay(image, even(image, 1, 1), [share], size=60)).astype(int)
        for share in (0, 0.5, 1)
    )
    near, far = (np.abs(shown - full).sum(-1) for shown in (half, none))
    assert (near < far).mean() > 0.9 and (near > 0).mean() > 0.9


def test_pictures_scale():
    image = gradient(50, 100)
    boxes = even(image, 24, 24)
    assert kept_overlay(image, boxes, [True] * 576, size=300).size == (150, 300)
    assert kept_overlay(image, boxes, [True] * 576).size == (240, 480)
    assert kept_overlay(gradient(2000, 100), boxes, [True] * 576).size == (1600, 80)
    assert kept_overlay(gradient(64, 64).convert("L"), boxes, [False] * 576).mode == "RGB"
    everything = kept_overlay(image, even(image, 2, 2), [True] * 4, size=100, line=0)
    assert (np.asarray(everything) == np.asarray(image)).all()


def test_grid_lines_fall_between_patches():
    image = Image.new("RGB", (40, 40), (0, 0, 0))
    shown = kept_overlay(image, even(image, 2, 2), [True] * 4, size=40, line=1.0)
    out = np.asarray(shown)[..., 0]
    assert (out[:, 19] == 128).all()
    assert (out[19] == 128).all()
    assert (out[:19, :19] == 0).all()
    assert (out[20:, 20:] == 0).all()


def test_where_boxes_overlap_what_is_kept_lies_on_top():
    """A crop's patch over one of the thumbnail, unless only the latter is kept."""
    image = gradient(80, 40)
    boxes = np.array([[0, 0, 80, 40], [0, 0, 40, 40], [40, 0, 80, 40]], dtype=float)
    clear = np.asarray(kept_overlay(image, boxes, [1, 0, 0], size=80, line=0))
    assert (clear == np.asarray(image)).all()
    right = np.asarray(kept_overlay(image, boxes, [0, 0, 1], size=80, line=0))
    assert (right[:, 40:] == np.asarray(image)[:, 40:]).all()
    assert (right[:, :40] != np.asarray(image)[:, :40]).any(-1).all()
    scores = np.array([3.0, np.nan, 1.0])
    heat = np.asarray(score_map(image, boxes, scores, size=80, opacity=1, legend=False))
    assert (heat[:, :40] == viridis(np.array(1.0)).astype(int)).all()
    assert (heat[:, 40:] == viridis(np.array(0.0)).astype(int)).all()


def test_merged_groups_have_one_colour_and_one_outline():
    image = gradient(80, 40)  # 2 x 4 patches of 20 x 20
    boxes, group = even(image, 2, 4), [0, 0, 1, -1, 0, 0, 2, -1]
    shown = merge_groups(image, boxes, group, size=80, fill=1, dim=1.0, outline=(255, 0, 255))
    out, before = np.asarray(shown), np.asarray(image)
    assert (out[:, :39] == out[5, 5]).all(), "no line inside a group"
    assert np.abs(out[5, 5] - before[:, :40].mean((0, 1))).max() < 0.4 * 255
    assert (out[:18, 41:58] == before[:18, 41:58]).all(), "a patch by itself stays as it is"
    assert (out[:, 61:] == out[5, 70]).all(), "dropped"
    assert (out[:, 39] != out[:, 38]).any(), "between the groups"
    assert (out[19, 41:58] != out[18, 41:58]).any()
    apart = np.asarray(merge_groups(image, boxes, [0, 1, 0, 1, 2, 3, 2, 3], size=80, fill=1))
    assert (apart[5, 5] == apart[5, 45]).all() and (apart[5, 5] != apart[5, 25]).any()


def test_score_map_has_a_colour_for_each_rank_and_a_legend():
    image = gradient(80, 20)
    scores = np.array([0.5, 1000.0, -2.0, np.nan])
    out = score_map(image, even(image, 1, 4), scores, size=400, opacity=1)
    pixels = np.asarray(out).astype(int)
    assert out.width == 400 and out.height > 100 + 12
    for x, share in ((50, 0.5), (150, 1.0), (250, 0.0)):
        assert np.abs(pixels[50, x] - viridis(np.array(share))).max() <= 1
    assert len(set(pixels[50, 350])) > 1 or pixels[50, 350].max() < 200, "grey, no score"
    bar = pixels[100 + 12, 6:394]
    assert np.abs(bar[0] - viridis(np.array(0.0))).max() <= 2
    assert np.abs(bar[-1] - viridis(np.array(1.0))).max() <= 2
    assert (pixels[-15:] < 100).any(), "the numbers below"
    score_map(image, even(image, 1, 4), [np.nan] * 4)  # nothing to tell
    score_map(image, even(image, 1, 4), [1.0] * 4)
    score_map(image, even(image, 1, 4), [np.inf, 0, 1, -np.inf])


def test_colours_grow_lighter():
    light = viridis(np.linspace(0, 1, 50)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(light) > 0).all()


def test_contact_sheet_holds_all_tiles():
    tiles = [(gradient(60, 30), f"method {i}\nanswer") for i in range(5)]
    sheet = contact_sheet(tiles, columns=3, title="which?", width=100)
    assert sheet.width == 12 + 3 * 112
    assert sheet.height > 2 * 50


# ---- from reports --------------------------------------------------------------------------------


@functools.cache
def llava() -> tuple[Any, Any]:
    model = mini_llava()
    return model, mini_processor(model)


@torch.no_grad()
def report_of(method: Any, images: list[Image.Image]) -> vtc.Report:
    model, processor = llava()
    text = ["<image> is there a red circle ?", "USER: <image> what <image> yes"]
    text = text[:1] if len(images) == 1 else text
    inputs = processor(text=text, images=images, return_tensors="pt", padding=True)
    with vtc.compressing(model, method) as session:
        model(**inputs, use_cache=True)
        return session.report()


def clear_pixels(picture: Image.Image, image: Image.Image) -> np.ndarray:
    """(H, W) bool, where a picture of the same size shows the image as it is."""
    return (np.asarray(picture) == np.asarray(image)).all(-1)


def inner(box: np.ndarray) -> tuple[slice, slice]:
    """Pixels well inside a box."""
    left, top, right, bottom = box
    return slice(int(top) + 2, int(bottom) - 2), slice(int(left) + 2, int(right) - 2)


def test_kept_patches_of_a_centre_crop_are_clear():
    """The model sees the centre of a wide image; the rest is dimmed like what was dropped."""
    images = [gradient(480, 240), gradient(240, 240), gradient(240, 480)]
    report = report_of(FastV(keep_tokens=5), images)
    for index, image in enumerate(images):
        middle = ((image.width - 240) / 2, (image.height - 240) / 2)
        boxes = grid_boxes((*middle, middle[0] + 240, middle[1] + 240), 4, 4)
        for layer, kept in ((None, report.kept[index].tolist()), (1, range(16))):
            picture = vtc.overlay(
                report, image, processor=llava()[1], index=index, layer=layer, size=max(image.size)
            )
            clear = clear_pixels(picture, image)
            for patch, box in enumerate(boxes):
                assert clear[inner(box)].mean() == (patch in kept)
            assert not clear[:, : max(int(middle[0]) - 2, 0)].any()
    label = report.stages()[0][0]
    last, step = (
        vtc.overlay(report, images[0], processor=llava()[1], layer=layer) for layer in (None, label)
    )
    assert (np.asarray(last) == np.asarray(step)).all()


def test_the_end_of_an_evicting_method_shows_shares():
    image = gradient(240, 240)
    report = report_of(PrefixKV(ratios=(0.2, 0.4, 0.6, 0.8)), [image])
    share = report.stage().share
    assert len(set(share.tolist())) > 2, "no teeth"
    shown = np.asarray(vtc.overlay(report, image, processor=llava()[1], size=240)).astype(int)
    off = np.abs(shown - np.asarray(image)).sum(-1)
    boxes = grid_boxes((0, 0, 240, 240), 4, 4)
    distance = [off[inner(box)].mean() for box in boxes]
    full = [d for d, s in zip(distance, share, strict=True) if s == 1]
    part = [d for d, s in zip(distance, share, strict=True) if 0 < s < 0.5]
    assert (not full or max(full) == 0) and min(part) > 1


def test_groups_and_scores_of_a_report():
    image = gradient(240, 240)
    processor = llava()[1]
    report = report_of(VisionZip(keep_tokens=6), [image])
    boxes = grid_boxes((0, 0, 240, 240), 4, 4)
    groups = np.asarray(vtc.overlay(report, image, processor=processor, kind="groups", size=240))
    want = merge_groups(image, boxes, report.stage().owner.numpy(), size=240)
    assert (groups == np.asarray(want)).mean() > 0.99
    scores = np.asarray(vtc.overlay(report, image, processor=processor, kind="scores", size=240))
    want = score_map(image, boxes, report.scores().numpy(), size=240)
    assert (scores == np.asarray(want)).mean() > 0.99


def test_the_same_report_gives_the_same_bytes():
    image = gradient(130, 77)
    files = []
    for _ in range(2):
        report = report_of(vtc.chain(PiToMe(keep_tokens=8), FastV(keep_tokens=4)), [image])
        for kind in ("kept", "groups", "scores"):
            out = io.BytesIO()
            vtc.overlay(report, image, processor=llava()[1], kind=kind).save(out, "PNG")
            files.append(out.getvalue())
    assert files[:3] == files[3:] and len(set(files)) == 3


@torch.no_grad()
def on_family(name: str, method: Any, images: list[Image.Image]) -> tuple[vtc.Report, Any, Any]:
    """A report on a row of images, the processor, and how many tokens each image has."""
    family, make = PROCESSORS[name]
    model, processor, ids, parts, counts = model_of(family), make(), [1, 7], {}, []
    for image in images:
        given = processor(images=[image], return_tensors="pt")
        known = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
        given = {k: v for k, v in given.items() if k in known}
        packed = model.model.get_image_features(**given, return_dict=True).pooler_output
        ids += [BREAK, *[IMAGE] * sum(p.reshape(-1, p.shape[-1]).shape[0] for p in packed), END]
        counts.append(len(features(model, given)))
        for key, value in given.items():
            parts.setdefault(key, []).append(value)
    inputs = {k: torch.cat(v) for k, v in parts.items()}
    tokens = torch.tensor([[*ids, 8, 9]])
    more = EVERY[family].extra(tokens, torch.ones_like(tokens))
    with vtc.compressing(model, method) as session:
        model(input_ids=tokens, **more, **inputs)
        return session.report(), processor, counts


@pytest.mark.parametrize("name", ["InternVL", "Gemma 3 crops", "Qwen2-VL", "LLaVA-NeXT"])
def test_several_images_of_other_families(name: str):
    """The index of an image is that of its first tile, where tiles are images to the model."""
    images = [gradient(96, 33), gradient(60, 64)]
    if name == "LLaVA-NeXT":  # which takes as many crops of each
        images = [gradient(96, 60), gradient(90, 60)]
    report, processor, counts = on_family(name, DivPrune(keep_ratio=0.3), images)
    index = 0
    for image, n in zip(images, counts, strict=True):
        kept, entries = 0, 0
        while sum(len(report.stage(index + i).owner) for i in range(entries)) < n:
            kept += int(report.stage(index + entries).kept.sum())
            entries += 1
        size = max(image.size)
        picture = vtc.overlay(report, image, processor=processor, index=index, size=size)
        share = clear_pixels(picture, image).mean()
        assert 0 < kept < n
        assert 0.05 < share < 0.95
        index += entries
    assert index == len(report.kept)
    with pytest.raises(ValueError, match="no image"):
        vtc.overlay(report, images[0], processor=processor, index=index)


def test_thumbnail_and_crops_apart():
    image = gradient(300, 200)
    report, processor, _ = on_family("LLaVA-NeXT", DivPrune(keep_ratio=0.3), [image])
    draw = functools.partial(vtc.overlay, report, image, processor=processor, size=300)
    both, crops, thumbnail = (
        clear_pixels(draw(view=view), image) for view in ("all", "crops", "thumbnail")
    )
    lines = 0.9  # between patches
    assert ((crops | thumbnail) <= both).mean() > lines
    assert (both <= (crops | thumbnail)).mean() > lines
    assert 0 < crops.mean() < both.mean() and 0 < thumbnail.mean() < both.mean()
    square = report_of(FastV(keep_tokens=4), [gradient(60, 60)])
    with pytest.raises(ValueError, match="no thumbnail"):
        vtc.overlay(square, gradient(60, 60), processor=llava()[1], view="thumbnail")


def test_an_encoder_alone_with_a_function_for_a_processor():
    encoder, image = mini.ENCODERS["hf-clip"](), gradient(320, 320)

    def transform(picture: Image.Image) -> torch.Tensor:
        small = picture.resize((mini.SIZE, mini.SIZE))
        return torch.tensor(np.array(small)).permute(2, 0, 1) / 127.5 - 1

    with torch.no_grad(), vtc.compressing(encoder, PiToMe(keep_ratio=0.5)) as session:
        encoder(pixel_values=transform(image)[None])
        report = session.report()
    boxes = grid_boxes((0, 0, 320, 320), mini.GRID, mini.GRID)
    for layer, kept in ((None, report.kept[0]), (0, report.stage(0, 0).kept.nonzero()[:, 0])):
        picture = vtc.overlay(report, image, processor=transform, layer=layer, size=320)
        clear = clear_pixels(picture, image)
        shown = [i for i, box in enumerate(boxes) if clear[inner(box)].all()]
        assert shown == kept.tolist()


def test_what_cannot_be_drawn():
    image, processor = gradient(60, 60), llava()[1]
    report = report_of(DivPrune(keep_tokens=4), [image])
    with pytest.raises(ValueError, match="processor=processor"):
        vtc.overlay(report, image)
    for problem, how in {
        "kind is one of": {"kind": "heat"},
        "view is one of": {"view": "left"},
        "the steps are": {"layer": "lunch"},
        "no LLM layer 9": {"layer": 9},
        "no image 2": {"index": 2},
        "ranks tokens by": {"kind": "scores"},
    }.items():
        with pytest.raises(ValueError, match=problem):
            vtc.overlay(report, image, processor=processor, **how)
    other = functools.partial(processor, **CROPPED)
    with pytest.raises(ValueError, match="2 x 2 patches"):
        vtc.overlay(report, image, processor=other)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, vtc; vtc.overlay; import vtc.report.overlay;"
        "bad = {'gradio', 'matplotlib', 'torchvision'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
