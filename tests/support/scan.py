# SPDX-License-Identifier: Apache-2.0
"""Calls that shipped code must not make, read from its syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

CALLS = {
    "pickle.load": "reads pickles, which run code",
    "pickle.loads": "reads pickles, which run code",
    "pickle.Unpickler": "reads pickles, which run code",
    "dill.load": "reads pickles, which run code",
    "joblib.load": "reads pickles, which run code",
    "marshal.loads": "reads code",
    "yaml.load": "makes objects of any class; use yaml.safe_load",
    "eval": "runs code",
    "exec": "runs code",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
}


def _name(node: ast.expr) -> str:
    """The dotted name of what is called, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def objections(source: str, file: str = "snippet.py") -> list[str]:
    """Calls that no shipped code may have, as "file:line: what and why"."""
    tree = ast.parse(source)
    full: dict[str, str] = {}  # of imported names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _name(node.func)
        first, dot, rest = name.partition(".")
        name = full.get(first, first) + dot + rest
        given = {k.arg: getattr(k.value, "value", k.value) for k in node.keywords}
        why = CALLS.get(name)
        if name == "torch.load" and given.get("weights_only") is not True:
            why = "reads pickles; give weights_only=True"
        if given.get("trust_remote_code") is True:
            why = "runs code of a checkpoint without being asked to"
        if given.get("shell") is True:
            why = "runs a shell"
        if given.get("allow_pickle") is True:
            why = "reads pickles, which run code"
        own = name.rpartition(".")[0].rpartition(".")[2]
        loads = name.endswith(".from_pretrained") and own.startswith("AutoModel")
        if loads and given.get("use_safetensors") is not True:
            why = "may read pickled weights; give use_safetensors=True"
        if why is not None:
            found.append(f"{file}:{node.lineno}: {name} {why}")
    return found


def shipped(root: Path) -> list[Path]:
    """Python files that go into the wheel."""
    folders = ("vtc", "adapters", "kernels", "benchmarks", "demos")
    return [f for folder in folders for f in sorted((root / folder).rglob("*.py"))]
