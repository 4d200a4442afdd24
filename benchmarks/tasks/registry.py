# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: of this package, of the hub, or your own data by its path."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..metrics.scores import metric as find_metric
from . import files, hub
from .items import Questions

# name -> module with `entries(split, n, seed, **options)`, options
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "easy-vqa": ("easy_vqa", {}),
    "scenes": ("scenes", {"level": "default"}),
    "scenes-hard": ("scenes", {"level": "hard"}),
    "small-text": ("small_text", {}),
}


class Task(Questions):
    """`n` items (all of them if None) of a task of this package."""

    def __init__(self, name: str, split: str = "test", n: int | None = 500, seed: int = 0):
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; one of {', '.join(TASKS)}")
        module_name, options = TASKS[name]
        module = importlib.import_module(f"{__package__}.{module_name}")
        self.split = split
        super().__init__(name, module.entries(split, n, seed, **options), "one-word", seed)


def open_task(
    spec: str | Path,
    n: int | None = None,
    seed: int = 0,
    *,
    metric: str | None = None,
    split: str | None = None,
    suffix: str | None = None,
    data_dir: str | Path | None = None,
) -> Questions:
    """Open a task by its name, a data set of the hub by its name, or your own data by its path.

    Args:
        spec: a name of `TASKS` or of `hub.SETS`, or the path of a .jsonl or .parquet file or of an
            image folder. A name wins over a path; write ./scenes for a folder called so.
        n: as many questions, drawn with `seed`; None for all (500 of a rendered task). Of files
            and hub sets, all if there are no more.
        metric: a name of `scores.METRICS` in place of the task's.
        split: of a named task; its own if None.
        suffix: what is put behind the questions of a hub set, in place of its own.
        data_dir: a local copy of a hub set, laid out as the hub has it.

    Raises:
        ValueError: nothing of this name, nothing that can be asked, an option that does not apply.
    """
    name, path = str(spec), Path(spec).expanduser()
    if metric is not None:
        find_metric(metric)
    unused = {"suffix": suffix, "data_dir": data_dir}
    if name in hub.SETS:
        return hub.open_set(name, n, seed, metric, split, suffix, data_dir)
    if name in TASKS:
        task: Questions = Task(name, split or "test", n, seed)
        task.metric = metric or task.metric
    elif path.suffix in files.FORMATS or path.is_dir():
        task = files.open_path(path, n, seed, metric)
        unused["split"] = split
    else:
        raise ValueError(
            f"unknown task {name!r}: neither a name ({', '.join([*TASKS, *hub.SETS])}) nor a "
            f"{', '.join(files.FORMATS)} file or an image folder"
        )
    if given := [option for option, value in unused.items() if value is not None]:
        raise ValueError(f"{name} takes no {' and no '.join(given)}: that is for hub data sets")
    return task
