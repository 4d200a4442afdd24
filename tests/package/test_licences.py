# SPDX-License-Identifier: Apache-2.0
"""Everything that an installation of vtc pulls in is under a licence that its users can live
with."""

from __future__ import annotations

import importlib.metadata as metadata
import re
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

PROJECT = tomllib.loads(
    (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text("utf-8")
)["project"]
USERS = ("timm", "open-clip", "bench", "data", "demo")
"""Extras for users; docs, lmms-eval and dev are tools that are run beside vtc."""

FREE = re.compile(
    r"MIT|BSD|Apache|PSF|Python Software Foundation|\bISC|MPL|Mozilla|Zlib|CC0|Unlicense|HPND|Historical"
)
COPYLEFT = re.compile(r"GPL|General Public|NonCommercial|CC-BY-NC")
KNOWN = {
    r"nvidia-.*|cuda-.*": "CUDA libraries, which PyTorch's own builds for GPUs require",
}
"""Distributions under other terms, and why they are there."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> dict[str, metadata.Distribution]:
    """Distributions of the core and of all extras for users, with all that they require."""
    requirements = pytest.importorskip("packaging.requirements")
    optional = PROJECT["optional-dependencies"]
    todo = [*PROJECT["dependencies"], *(r for extra in USERS for r in optional[extra])]
    queue = [(requirements.Requirement(r), frozenset({""})) for r in todo]
    found: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    while queue:
        wanted, extras = queue.pop()
        if wanted.marker and not any(wanted.marker.evaluate({"extra": e}) for e in extras):
            continue
        key = normal(wanted.name), frozenset(wanted.extras)
        if key in done:
            continue
        done.add(key)
        try:
            found[key[0]] = distribution = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{wanted.name} is not installed; make test installs all extras")
        own = key[1] | {""}
        queue += [(requirements.Requirement(r), own) for r in distribution.requires or []]
    return found


def licence(distribution: metadata.Distribution) -> str:
    """Licence in the metadata: expression, classifiers, the first line of the text."""
    facts = distribution.metadata
    named = [c for c in facts.get_all("Classifier") or [] if c.startswith("License ::")]
    text = (facts.get("License") or "").strip().splitlines()[:1]
    return "; ".join(filter(None, [facts.get("License-Expression"), *named, *text]))


def objection(name: str, terms: str) -> str | None:
    """Why these terms need a person's look; None if they do not."""
    if any(re.fullmatch(pattern, name) for pattern in KNOWN):
        return None
    if COPYLEFT.search(terms):
        return f"{name}: {terms}"
    return None if FREE.search(terms) else f"{name}: unknown licence {terms!r}"


def test_dependencies_are_under_permissive_licences():
    objections = [objection(name, licence(d)) for name, d in sorted(required().items())]
    assert [o for o in objections if o] == []


@pytest.mark.parametrize(
    ("name", "terms", "fine"),
    [
        ("a", "MIT", True),
        ("b", "License :: OSI Approved :: BSD License", True),
        ("c", "GPL-3.0-or-later", False),
        ("d", "", False),
        ("e", "License :: OSI Approved :: GNU Affero General Public License v3", False),
        ("f", "CC-BY-NC-4.0", False),
        ("g", "MIT AND GPL-3.0-or-later", False),
        ("nvidia-cudnn-cu13", "LicenseRef-NVIDIA-Proprietary", True),
    ],
)
def test_what_is_objected_to(name, terms, fine):
    assert (objection(name, terms) is None) == fine
