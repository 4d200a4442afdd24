# SPDX-License-Identifier: Apache-2.0
"""Result files, written as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(result: dict[str, Any], path: Path) -> Path:
    """Write a result file, as a whole or not at all."""
    write_whole(path, json.dumps(result, indent=1) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or, after a crash or on a full disk, as it was.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text)
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
