# SPDX-License-Identifier: Apache-2.0
"""The package as strangers meet it: imports, folders, wheel, and nothing of our machines in it."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
        ".venv*",
        ".overlay-*",
        ".tiny",
        "results",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
    )
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=skip))


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A copy of the sources, the sdist made of it, and the wheel made of the sdist."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("built")
    source = copy_of_the_repository(folder / "source")
    hook = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", hook, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return source, sdist, wheel


@pytest.mark.slow
def test_sdist_and_wheel_carry_everything(built):
    source, sdist, wheel = built
    with tarfile.open(sdist) as archive:
        assert not any(m.issym() or m.islnk() for m in archive), "links are not unpacked everywhere"
    with zipfile.ZipFile(wheel) as archive:
        got = {n for n in archive.namelist() if ".dist-info/" not in n}
    wanted = {
        str(p.relative_to(source))
        for top in ("vtc", *(f"vtc/{name}" for name in LINKED))
        for p in (source / top).rglob("*")
        if p.is_file() and (p.suffix == ".py" or p.name == "py.typed" or "assets" in p.parts)
    }
    assert got == wanted  # no tests, and none of the linked folders at the top


@pytest.mark.slow
def test_the_page_of_the_package_points_at_nothing_that_is_not_there(built):
    _, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        head, _, page = archive.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert page.startswith("# vtc") and "vtc.wrap(model" in page
    assert not re.findall(r"!\[|\]\((?!https?:|#)", page)


@pytest.mark.slow
def test_the_wheel_answers_a_question_in_a_clean_environment(built, tmp_path):
    """A new environment with the wheel, and of this one nothing but the dependencies."""
    source, _, wheel = built
    run(sys.executable, "-m", "venv", "--without-pip", "clean", cwd=tmp_path)
    python = tmp_path / "clean" / "bin" / "python"
    if not python.exists():
        pytest.skip("environments look different on this system")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, cwd=tmp_path))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=tmp_path)
    # A line of a .pth file is put on sys.path and no more: an editable vtc there stays unseen.
    others = [p for p in sys.path if "site-packages" in p or "dist-packages" in p]
    (site / "dependencies.pth").write_text("\n".join(others))

    code = "import vtc; print(vtc.__file__, vtc.__version__)"
    version = re.search(r'__version__ = "(.+)"', (source / "vtc/__init__.py").read_text())[1]
    assert run(python, "-c", code, cwd=tmp_path) == f"{site / 'vtc/__init__.py'} {version}"
    command = tmp_path / "clean" / "bin" / "vtc"
    assert version in run(command, "version", cwd=tmp_path)
    assert "mustdrop" in run(command, "methods", cwd=tmp_path)
    if not (source / "vtc/assets/tiny-llava").exists():
        pytest.skip("this checkout lacks the embedded models")
    (tmp_path / "ask.py").write_text(ASK)
    assert run(python, "ask.py", cwd=tmp_path) == "576 144.0 True"


ASK = """
import vtc
from vtc.benchmarks.shared.prompts import prompt_of
from vtc.benchmarks.tasks.registry import open_task
from vtc.benchmarks.tiny.models import load_llava

model, processor = load_llava()
item = open_task("scenes", n=1)[0]
prompt = prompt_of(processor, item.question)
inputs = processor(images=item.image, text=prompt, return_tensors="pt")
stock = model.generate(**inputs, max_new_tokens=3, do_sample=False)
vtc.wrap(model, "fastv", keep_tokens=144)
model.generate(**inputs, max_new_tokens=3, do_sample=False)
report = model.vtc.report()
vtc.unwrap(model)
same = model.generate(**inputs, max_new_tokens=3, do_sample=False).equal(stock)
print(int((inputs["input_ids"] == model.config.image_token_id).sum()), report.final_tokens, same)
"""


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
