# SPDX-License-Identifier: Apache-2.0
"""The package as strangers meet it: imports, folders, wheel, and nothing of our machines in it."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("adapters", "kernels", "benchmarks", "demos")


def python(code: str, cwd: Path, *path: Path) -> str:
    """Run code in a fresh interpreter with cwd first on sys.path, then the given folders."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_import_adds_less_than_a_second_to_torch():
    code = "import torch, time; t = time.perf_counter(); import vtc; print(time.perf_counter() - t)"
    assert statistics.median(float(python(code, ROOT)) for _ in range(3)) < 1.0


def test_import_pulls_in_no_model_library():
    code = "import sys, vtc; print([m for m in ('transformers', 'timm', 'open_clip') if m in sys.modules])"
    assert python(code, ROOT) == "[]"


def test_linked_folders_are_not_packages():
    for name in LINKED:
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/ must stay a namespace folder"
        link = ROOT / "vtc" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


IMPORT_LLAVA = "from transformers import LlavaForConditionalGeneration, LlamaForCausalLM"


def test_transformers_imports_from_the_repository_root():
    python(IMPORT_LLAVA, ROOT)
    python(f"{IMPORT_LLAVA}; import vtc, vtc.adapters.base", ROOT)


@pytest.mark.parametrize("accepted", [True, False])
def test_transformers_imports_beside_the_pypi_package_kernels(tmp_path, accepted):
    """transformers imports names from any `kernels` it can find; it must find the real one."""
    import_utils = pytest.importorskip("transformers.utils.import_utils")
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2") if accepted else "0.0.1"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        f"__version__ = {version!r}\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    decorate = lambda self, target=None, *a, **k: target\n"
        "    parts = {'__init__': lambda self, *a, **k: None, '__call__': decorate}\n"
        "    return Anything(name, (), parts)\n"
        "class Anything(type):\n"
        "    def __getattr__(cls, name): return cls\n"  # the flags of older releases, Mode.TRAINING
        "    def __or__(cls, other): return cls\n"
    )
    info = tmp_path / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    code = f"{IMPORT_LLAVA}; import kernels, vtc; print(kernels.__file__)"
    found = Path(python(code, ROOT, tmp_path))
    assert found == tmp_path / "kernels" / "__init__.py"


def copy_of_the_repository(to: Path) -> Path:
    skip = shutil.ignore_patterns(
        ".git",
        ".venv",
        ".tiny",
        "results",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
    )
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=skip))


@pytest.mark.slow
def test_wheel_carries_everything_and_works_from_another_folder(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = copy_of_the_repository(tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(list(map(str, build)), check=True, cwd=tmp_path, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [*pip, "install", "--no-deps", "--target", site, wheel]
    subprocess.run(list(map(str, install)), check=True, cwd=tmp_path, timeout=300)

    assert not any(p.is_symlink() for p in site.rglob("*"))
    for name in ("adapters", "kernels", "benchmarks", "demos", "tests"):
        assert not (site / name).exists(), f"{name} must not be a top-level package"
    for folder in ("vtc/methods", *(f"vtc/{name}" for name in LINKED)):
        wanted = {p.relative_to(source / folder) for p in (source / folder).rglob("*.py")}
        got = {p.relative_to(site / folder) for p in (site / folder).rglob("*.py")}
        assert got == wanted, folder
    assets = {p.relative_to(source) for p in (source / "vtc/assets").rglob("*") if p.is_file()}
    assert assets == {p.relative_to(site) for p in (site / "vtc/assets").rglob("*") if p.is_file()}

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import transformers, vtc, vtc.adapters.base, vtc.benchmarks.runner, vtc.cli\n"
        "from vtc.method import known_methods\n"
        "known_methods()\n"
        "print(vtc.__file__)"
    )
    assert Path(python(code, elsewhere, site)) == site / "vtc" / "__init__.py"
    if assets:
        code = (
            "from vtc.benchmarks.tiny.models import load_llava\n"
            "model, processor = load_llava('cpu')\n"
            "print(model.config.model_type)"
        )
        assert python(code, elsewhere, site) == "llava"


def tracked_files() -> list[Path]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(
        [git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    paths = [ROOT / name for name in names.decode().split("\0") if name]
    return [p for p in paths if p.is_file() and not p.is_symlink()]


def test_no_tracked_file_names_a_machine_path_or_a_registry():
    # Built from parts, so that this file does not match itself.
    folders = "|".join(("work", "root", "tmp", "opt", "home"))
    hosts = "|".join(("files.python" + "hosted", "--index" + "-url", "--extra-index" + "-url"))
    forbidden = re.compile(rf"(?<![\w.~:/-])/({folders})/|{hosts}")
    found = []
    for path in tracked_files():
        if path.suffix in (".safetensors", ".png", ".npz"):
            continue
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if forbidden.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_every_source_file_names_its_licence():
    tag = "SPDX-" + "License-Identifier: Apache-2.0"
    missing = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if path.suffix == ".py" and path.stat().st_size and tag not in path.read_text("utf-8")[:200]
    ]
    assert not missing, missing
