# SPDX-License-Identifier: Apache-2.0
"""The header of a result file, which says where it comes from: as it is written and read."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from ... import __version__


def header(benchmark: str, device: Any, command: str = "", **more: Any) -> dict[str, Any]:
    """What every result begins with: benchmark, date, command, versions and machine.

    Args:
        more: of the machine.
    """
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "versions": versions(),
        "machine": {**machine(torch.device(device)), **more},
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
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


# ---- files of any age ----------------------------------------------------------------------------


def kind_of(result: dict[str, Any]) -> str:
    """Which benchmark wrote a result; "task" of files from before they said so."""
    return str(result.get("benchmark", "task" if "task" in result else ""))


def part_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    """The model or the machine of a result, empty where it does not say."""
    found = result.get(name)
    return found if isinstance(found, dict) else {}


def chip(result: dict[str, Any]) -> str:
    """What a result was measured on: the GPU, else the CPU."""
    where = part_of(result, "machine")
    return str(where.get("gpu", where.get("cpu", "")))


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a result comes from: command, date, model, machine, versions, settings."""
    out = [("command", str(result.get("command") or "not recorded"))]
    out += [(k, str(result[k])) for k in ("date", "metric") if result.get(k)]
    counts = [
        f"{result[k]} {k.replace('_', ' ')}"
        for k in ("questions", "images", "captions", "classes", "visual_tokens")
        if result.get(k)
    ]
    if counts:
        out.append(("asked", ", ".join(counts)))
    if result.get("seconds"):
        out.append(("took", f"{result['seconds']} s"))
    for name in ("model", "machine", "versions", "settings", "timing"):
        if isinstance(result.get(name), dict):
            shown = {k: v for k, v in result[name].items() if v not in (None, [], {}, "")}
            out.append((name, ", ".join(f"{k} {_plain(v)}" for k, v in shown.items())))
    return out


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
