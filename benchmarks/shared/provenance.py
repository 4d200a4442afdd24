# SPDX-License-Identifier: Apache-2.0
"""Provenance of a result: versions, machine and model."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import transformers

    from ... import __version__

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vtc": __version__,
        **({"commit": commit} if (commit := _commit()) else {}),
    }


def _commit() -> str | None:
    """The commit of this checkout, marked when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine(device: torch.device) -> dict[str, Any]:
    """CPU, cores and accelerator."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    except OSError:
        pass
    out: dict[str, Any] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        out["gpu"] = torch.cuda.get_device_name(device)
    return out


def describe_model(model: Any) -> dict[str, Any]:
    """Architecture, parameters and dtype."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return {
        "name": Path(name).name if Path(name).exists() else name,  # a hub id keeps its owner
        "class": type(model).__name__,
        "parameters_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
