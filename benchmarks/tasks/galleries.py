# SPDX-License-Identifier: Apache-2.0
"""Images with captions, for retrieval, and folders of classes, for classification."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from . import scenes
from .base import BadItem, Entry, Questions

CAPTIONS = 200
"""Embedded scenes where no number is asked for."""


def captioned_scenes(n: int | None = None, seed: int = 0) -> Questions:
    """The first ``n`` (200) held-out scenes, each with its caption."""
    entries = []
    for i in range(n or CAPTIONS):
        caption = scenes.caption(scenes.make_scene(i, "test", seed))
        load = partial(_render, i, seed)
        entries.append(Entry(i, load, "", caption, "caption"))
    return Questions("scenes", entries, "", seed)


def _render(index: int, seed: int) -> Image.Image:
    return scenes.render(scenes.make_scene(index, "test", seed))


class ClassFolder(Questions):
    """A folder with a subfolder of images for each class, as ImageNet's validation set is unpacked.

    The answer of an item is the name of its subfolder.

    Attributes:
        classes: names of the subfolders, sorted: the order that torchvision and timm train with.

    Args:
        folder: its subfolders are searched at any depth for files that Pillow can open by their
            ending; other files are passed over.
        n: as many images, drawn with ``seed``; None for all.

    Raises:
        ValueError: no subfolder, or no image.
    """

    def __init__(self, folder: str | Path, n: int | None = None, seed: int = 0) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"{root} is no folder; give one with a subfolder for each class")
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
        if not self.classes:
            raise ValueError(f"{root} has no subfolders; images of a class go into one of its name")
        known = set(Image.registered_extensions())
        found: list[tuple[str, Path]] = []
        problems = []
        for name in self.classes:
            images = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in known)
            found += [(name, p) for p in images]
            if not images:
                problems.append((name, "a class without images"))
        if not found:
            raise ValueError(f"{root}: no images in its {len(self.classes)} subfolders")
        if n is not None and n < len(found):
            found = sorted(random.Random(f"classes/{seed}").sample(found, n))
        entries = []
        for name, path in found:
            where = path.relative_to(root).as_posix()
            entries.append(Entry(where, partial(_open, path, where), "", name, "class", id=where))
        super().__init__(root.name, entries, "", seed, problems)


def _open(path: Path, where: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadItem(f"{where}: {error}") from error


def _mapping(file: str | Path, classes: Sequence[str]) -> dict[str, str | int]:
    """What a .json file maps each class to; a text file has a line for each, in their order."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        made = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if made is None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) != len(classes):
            raise ValueError(
                f"{path} has {len(lines)} names and there are {len(classes)} class folders; it "
                "needs one a line, in the order of the sorted folders"
            )
        return dict(zip(classes, lines))
    if not isinstance(made, dict):
        raise ValueError(f'{path} must hold an object, such as {{"n01440764": "tench"}}')
    missing = [name for name in classes if name not in made]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} class folders; the first is {missing[0]}")
    return {name: made[name] for name in classes}


def class_names(classes: Sequence[str], file: str | Path | None = None) -> list[str]:
    """What the classes are called in prompts.

    Args:
        classes: folder names, sorted; without a file, they are the names, "_" being a blank.
        file: a text file with a name a line, in their order, or a .json file, folder -> name.

    Raises:
        ValueError: a file that does not name every class.
    """
    if file is None:
        return [name.replace("_", " ") for name in classes]
    names = _mapping(file, classes)
    for folder, name in names.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{file}: {folder} is mapped to {name!r}; a two-tower model needs names"
            )
    return [str(name) for name in names.values()]


def class_outputs(
    classes: Sequence[str], outputs: int, file: str | Path | None = None
) -> dict[str, int]:
    """Which output of a classifier each class is.

    Args:
        classes: folder names, sorted; without a file they are the outputs in this order.
        outputs: how many the classifier has.
        file: a .json file, folder -> output counted from 0; the folders may be some of them.

    Raises:
        ValueError: counts that differ, or a file that is incomplete or out of range.
    """
    if file is None:
        if len(classes) != outputs:
            raise ValueError(
                f"{len(classes)} class folders and a classifier of {outputs} outputs; give a "
                ".json file that maps each folder to its output, counted from 0"
            )
        return {name: i for i, name in enumerate(classes)}
    made: dict[str, int] = {}
    for folder, output in _mapping(file, classes).items():
        whole = isinstance(output, int) and not isinstance(output, bool)
        if not whole or not 0 <= int(output) < outputs:
            raise ValueError(
                f"{file}: {folder} is mapped to {output!r}; it needs an output of the classifier, "
                f"0 to {outputs - 1}"
            )
        if output in made.values():
            raise ValueError(f"{file}: two folders are mapped to output {output}")
        made[folder] = int(output)
    return made


def open_captions(spec: str, n: int | None = None, seed: int = 0) -> Questions:
    if spec == "scenes":
        return captioned_scenes(n, seed)
    raise ValueError("todo")
