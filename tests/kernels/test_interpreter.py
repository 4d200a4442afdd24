# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on the CPU: each file of ``interpreted/`` in an interpreter of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(p.name for p in (HERE / "interpreted").glob("test_*.py"))

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the files are collected directly"
    ),
]


def start(*options: str) -> subprocess.Popen[str]:
    """Pytest in a process of one thread: the interpreter uses a single core."""
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options],
        cwd=HERE.parent.parent,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def passes(process: subprocess.Popen[str], timeout: int) -> None:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-6000:]
    print(output.splitlines()[-1])


@pytest.fixture(scope="module")
def runs():
    """All files at once."""
    processes = {name: start(str(HERE / "interpreted" / name)) for name in FILES}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", FILES)
def test_kernels_agree_with_their_formulas_under_the_interpreter(name, runs):
    passes(runs[name], 900)


@pytest.mark.soak
def test_larger_inputs_under_the_interpreter():
    passes(start("--soak", str(HERE / "interpreted")), 3600)
