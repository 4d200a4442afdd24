# SPDX-License-Identifier: Apache-2.0
"""Environments that do not fit end in a sentence, and constraints.txt holds for every Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from vtc import cli
from vtc.cli import common, ending

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parents[2]
REPORT = '"vtc --traceback COMMAND ...", or VTC_TRACEBACK=1, shows the traceback for a bug report'
INSTALL = '"pip install -c constraints.txt ." in a checkout of vtc installs releases that fit'


# ---- what a command says -----------------------------------------------------------------------


@pytest.fixture
def end(monkeypatch, capsys):
    """Run ``vtc ...`` with an app that raises an error; the lines on the standard error."""

    def run(error, *args, misfits=()):
        def app():
            raise error

        monkeypatch.setattr(cli, "app", app, raising=False)
        monkeypatch.setattr(ending, "misfits", lambda: list(misfits))
        monkeypatch.setattr(sys, "argv", ["vtc", *args])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 1
        said = capsys.readouterr()
        assert said.out == ""
        return said.err.splitlines()

    monkeypatch.delenv("VTC_TRACEBACK", raising=False)
    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("\n size 304 \nmust match\n"), "error: RuntimeError: size 304"),
        (MemoryError(), "error: MemoryError"),
        (KeyError("x" * 400), f"error: KeyError: '{'x' * 295} ..."),
    ],
    ids=["first line", "no message", "long message"],
)
def test_an_unexpected_error_is_two_lines(end, error, line):
    assert end(error, "bench") == [line, REPORT]


def test_what_does_not_fit_is_told(end):
    lines = end(RuntimeError("broken"), misfits=["transformers 5.99 is installed, and ..."])
    assert lines == ["error: RuntimeError: broken", "transformers 5.99 is installed, and ..."] + [
        INSTALL,
        REPORT,
    ]


def test_a_lazy_import_names_what_broke(end):
    """As transformers says it of a torchvision that was built for another torch."""
    nms = RuntimeError("operator torchvision::nms does not exist")
    inner = ImportError("in between")
    inner.__cause__ = nms
    outer = ModuleNotFoundError("Could not import module 'CLIPModel'.")
    outer.__cause__ = inner
    assert end(outer) == [
        "error: ModuleNotFoundError: Could not import module 'CLIPModel', because of RuntimeError: "
        "operator torchvision::nms does not exist",
        INSTALL,
        REPORT,
    ]


def test_a_broken_environment_may_break_the_search_for_what_does_not_fit(end, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "packaging.requirements", None)
        with pytest.raises(ImportError):
            ending.misfits()

    def broken():
        raise OSError("metadata cannot be read")

    monkeypatch.setattr(ending, "misfits", broken)
    assert ending.sentences(RuntimeError("x")) == ["error: RuntimeError: x", REPORT]


@pytest.mark.parametrize(
    ("args", "variable", "shown"),
    [
        (["--traceback", "bench"], None, True),
        (["bench"], "1", True),
        (["bench"], "0", False),
        (["bench", "--traceback"], None, True),
    ],
)
def test_the_traceback_is_shown_on_request(end, monkeypatch, args, variable, shown):
    monkeypatch.setenv("VTC_TRACEBACK", variable or "0")  # also what ``main`` sets is taken back
    lines = end(RuntimeError("broken"), *args)
    assert (lines[0] == "Traceback (most recent call last):") == shown
    assert lines[-2:] == ["error: RuntimeError: broken", REPORT]


@pytest.mark.parametrize("wanted", [False, True])
def test_a_refusal_has_a_traceback_on_request(monkeypatch, capsys, wanted):
    """It stays one line with exit code 2, and so does an extra that is missing."""
    from typer.testing import CliRunner

    from vtc import inspection

    monkeypatch.setenv("VTC_TRACEBACK", str(int(wanted)))
    for error, says in (
        (inspection.UnsupportedError("no such model"), "error: no such model\n"),
        (ImportError("x needs: pip install y"), "error: x needs: pip install y\n"),
        (ModuleNotFoundError("no timm", name="timm"), "error: timm is missing; pip install"),
    ):

        def look(model, error=error):
            raise error

        monkeypatch.setattr(inspection, "inspect", look)
        done = CliRunner().invoke(cli.app, ["--traceback", "inspect", "some-model"])
        assert done.exit_code == 2
        assert done.stderr.startswith("Traceback" if wanted else says)
        assert says in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libc10.so: cannot open shared object file", name="torchvision._C"),
        ModuleNotFoundError("Could not import module 'CLIPModel'."),  # as transformers says it
    ],
    ids=["broken", "lazy"],
)
def test_a_library_that_is_broken_is_no_mistake_of_the_caller(monkeypatch, error):
    from typer.testing import CliRunner

    from vtc import inspection

    def look(model):
        raise error

    monkeypatch.setattr(inspection, "inspect", look)
    done = CliRunner().invoke(cli.app, ["inspect", "some-model"])
    assert done.exception is error
    assert done.output == ""


def distribution(folder, name, version, requires=(), extras=()):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {r}" for r in requires] + [f"Provides-Extra: {e}" for e in extras]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_misfits(tmp_path, monkeypatch):
    """Of vtc, of its extras and of its libraries; an extra may be missing."""
    requires = [
        "transformers<5.25,>=5.5",
        "vtc-core-of-nothing",
        "vtc-nightly>=2",
        'vtc-extra-of-nothing; extra == "bench"',
        'vtc-picture>=2; extra == "bench"',
        'vtc-never<1; python_version < "3"',
        'visual-token-compression[bench]; extra == "all"',
    ]
    distribution(tmp_path, "visual-token-compression", "0.1.0", requires, ["bench", "all"])
    distribution(tmp_path, "transformers", "5.99.0rc1", ["vtc-hub>=2", 'absent; extra == "x"'])
    distribution(tmp_path, "vtc-picture", "1.0")
    distribution(tmp_path, "vtc-nightly", "3.0.dev1")
    distribution(tmp_path, "vtc-hub", "1.5", ["transformers"])
    distribution(tmp_path, "vtc-never", "2.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ending.misfits() == [
        "transformers 5.99.0rc1 is installed, and vtc is tested with >=5.5, <5.25",
        "vtc-core-of-nothing is not installed, and vtc needs it",
        "vtc-picture 1.0 is installed, and vtc is tested with >=2",
        "vtc-hub 1.5 is installed, and transformers needs >=2",
    ]
    monkeypatch.setattr(ending, "DISTRIBUTION", "vtc-that-is-not-installed")
    assert ending.misfits() == []


def command(folder, *args):
    """``python -m vtc.cli`` with a folder in front of all others."""
    hidden = ("VTC_TRACEBACK", "PYTHONPATH")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env["PYTHONPATH"] = os.pathsep.join((str(folder), str(ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "vtc.cli", *args],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("module", "raises", "says"),
    [
        ("typer", "ModuleNotFoundError(\"No module named 'typer'\")", "No module named 'typer'"),
        ("torch", "OSError('libcudart.so: cannot open')", "error: OSError: libcudart.so: cannot"),
        ("torchvision", "RuntimeError('operator torchvision::nms does not exist')", "::nms does"),
    ],
)
def test_a_library_that_cannot_be_imported_is_a_sentence(tmp_path, module, raises, says):
    (tmp_path / f"{module}.py").write_text(f"raise {raises}\n")
    done = command(tmp_path, "version")
    assert done.returncode == 1
    assert done.stdout == ""
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert says in first
    assert last == REPORT
    assert "Traceback" not in done.stderr


def test_an_old_python_is_a_sentence(monkeypatch):
    monkeypatch.setattr(
        ending, "sys", SimpleNamespace(version_info=(3, 9), version="3.9.18 (main)", exit=sys.exit)
    )
    with pytest.raises(SystemExit, match=r"^error: vtc needs Python 3.10 or newer, this is 3.9.18"):
        ending.main()


def test_the_command_is_imported_when_it_runs():
    code = "import sys, vtc.cli; print([m for m in ('typer', 'rich', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
    assert cli.common is common
    with pytest.raises(AttributeError, match="nothing"):
        _ = cli.nothing


# ---- what make says ----------------------------------------------------------------------------


def make(folder, python, target="run"):
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    done = subprocess.run(
        ["make", "-s", f"PYTHON={python}", f"VENV={folder / 'venv'}", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert not (folder / "venv/bin/python").exists()
    return done.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("stub", "says"),
    [
        ("sys.version_info = (3, 9, 18)", "is too old: Python 3.10 or newer is needed"),
        ("sys.modules['ensurepip'] = None", "lacks venv or ensurepip"),
        ("if '-m' in sys.argv: sys.exit(1)", "cannot create"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="a script with #!")
def test_an_interpreter_that_does_not_fit_is_a_sentence(tmp_path, stub, says):
    python = tmp_path / "python-stub"
    python.write_text(f"#!{sys.executable}\nimport sys\n{stub}\nexec(sys.argv[2])\n")
    python.chmod(0o755)
    assert says in make(tmp_path, python)


def test_no_interpreter_is_a_sentence(tmp_path):
    assert make(tmp_path, "python-of-nobody", "test").startswith("There is no python-of-nobody. ")


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("WARNING: Retrying (Retry(total=0, connect=None\nERROR: None", "cannot be reached"),
        ("ERROR: ResolutionImpossible: for help", "excludes each other"),
        ("ERROR: No matching distribution found for torch", "no release for this Python"),
        ("No module named pip", "has no pip"),
        ("Traceback\nERROR: something else", "pip has failed"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_failure_of_pip_is_a_sentence(tmp_path, said, means):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(f"#!/bin/sh\ncat <<'.'\n{said}\n.\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", ROOT / ".ci/install", tmp_path, "torch"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"Nothing is ready in {tmp_path}: ")
    assert means in last
    assert "Traceback" not in done.stderr
    assert (tmp_path / "install.log").read_text() == f"{said}\n"


# ---- the releases that are installed -----------------------------------------------------------


def pins():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [Requirement(line.split("#")[0]) for line in lines if line and line[0] != "#"]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_name_releases_and_nothing_else():
    assert not re.search(r"://|^-|^\.|@", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert all(re.fullmatch(r"==[\w.+]+", str(pin.specifier)) for pin in pins())


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_constraints_hold_one_release_of_each_dependency(python):
    """Those that pyproject.toml asks for, on every Python that it allows."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    held = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate(environment):
            assert normal(pin.name) not in held, f"two releases of {pin.name}"
            held[normal(pin.name)] = next(iter(pin.specifier)).version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(held[normal(requirement.name)]), requirement
