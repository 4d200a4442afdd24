# SPDX-License-Identifier: Apache-2.0
"""Files of reference outputs, as parameters of tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(os.environ.get("VTC_GOLDEN") or Path(__file__).parents[1] / "golden")


def cases(pattern, count):
    """One parameter for each file of that name; a single one that says why when there are none."""
    paths = sorted(FOLDER.glob(pattern))
    if len(paths) >= count:
        return [pytest.param(path, id=path.stem) for path in paths]
    return [pytest.param(None, id=f"{pattern}: {len(paths)} of {count} files in {FOLDER}")]


def load(path):
    if path is None:
        pytest.fail(f"no complete set of golden files in {FOLDER}")
    with np.load(path) as file:
        return {
            key: torch.from_numpy(file[key]) if file[key].ndim else file[key].item()
            for key in file.files
        }
