# SPDX-License-Identifier: Apache-2.0
"""Images with captions, for retrieval, and folders of classes, for classification."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from ..metrics.scores import RECALL
from . import hub, scenes
from .files import FORMATS
from .images import find_file, open_image
from .items import Entry, Questions
from .parquet import ParquetFile
from .rows import DataRow, FindImage, json_lines, sample, text_of

SCENES = 200
"""Embedded scenes where no number is asked for."""
ACCURACY = "top-1"
"""The metric of a folder of classes."""


def open_captions(spec: str | Path, n: int | None = None, seed: int = 0) -> Questions:
    """Open images with captions: items whose ``answers`` are the captions of their image.

    Args:
        spec: "scenes"; the path of a .jsonl or .parquet file whose rows have an "image" and its
            "captions", a list of strings; or a data set of the hub that has captions.
        n: as many images, drawn with ``seed``; None for all (200 scenes).

    Raises:
        ValueError: no such data, or not one row that can be used; the first three say why.
    """
    if spec == "scenes":
        return _captioned_scenes(n or SCENES, seed)
    path = Path(spec).expanduser()
    if path.suffix in FORMATS:
        return _captioned_file(path, n, seed)
    captioned = [name for name, known in hub.SETS.items() if known.metric == RECALL]
    if spec not in captioned:
        names = ", ".join(["scenes", *captioned])
        raise ValueError(
            f"no captions called {spec}; take {names} or a {' or '.join(FORMATS)} file"
        )
    return hub.open_set(str(spec), n, seed)


def _captioned_file(path: Path, n: int | None, seed: int) -> Questions:
    """Rows of one image, by its path, are joined to one entry."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    find_image: FindImage
    if path.suffix == ".parquet":
        table = ParquetFile(path)
        rows, find_image = table.rows(("captions",)), table.find_image
    else:
        rows, find_image = json_lines(path), partial(find_file, path, "image")
    entries: dict[Hashable, Entry] = {}
    problems = []
    for number, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            key, load = find_image(number, row)
            captions = _captions(row)
        except ValueError as error:
            problems.append((f"{path.name}:{number}", str(error)))
            continue
        if key in entries:
            captions = entries[key].answers + captions
        entries[key] = Entry(key, load, "", captions[0], "caption", captions, id=str(key))
    if not entries:
        first = "; ".join(f"{where}: {why}" for where, why in problems[:3])
        raise ValueError(f"{path}: no row can be used. {first or 'It is empty'}")
    chosen = sample(list(entries.values()), n, seed, path.stem)
    return Questions(path.stem, chosen, RECALL, seed, problems)


def _captions(row: DataRow) -> tuple[str, ...]:
    values = row.get("captions")
    if not isinstance(values, list) or not values:
        raise ValueError(f'"captions" must be a list of strings, not {values!r:.60}')
    return tuple(text_of({"captions": value}, "captions") for value in values)


def _captioned_scenes(n: int, seed: int) -> Questions:
    """The first ``n`` scenes of the split "test", which no model of ours was trained on."""
    entries = []
    for i in range(n):
        scene = scenes.make_scene(i, "test", seed)
        load = partial(scenes.render, scene)
        entries.append(Entry(i, load, "", scenes.caption(scene), "caption"))
    return Questions("scenes", entries, RECALL, seed)


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
        entries = []
        for name, path in found:
            where = path.relative_to(root).as_posix()
            load = partial(open_image, path, where)
            entries.append(Entry(where, load, "", name, "class", id=where))
        title = root.resolve().name
        super().__init__(title, sample(entries, n, seed, title), ACCURACY, seed, problems)


def _mapping(file: str | Path, classes: Sequence[str]) -> dict[str, str | int]:
    """Value of each class in a .json file; a text file has a line for each, in their order."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        made = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError, RecursionError) as error:
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
    """Names of the classes in prompts.

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
    """Output of a classifier for each class.

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
