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


@pytest.fixture(scope="module")
def runs():
    """All files at once, one thread each: the interpreter uses a single core."""
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    processes = {
        name: subprocess.Popen(
            [*command, str(HERE / "interpreted" / name)],
            cwd=HERE.parent.parent,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in FILES
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", FILES)
def test_kernels_agree_with_their_formulas_under_the_interpreter(name, runs):
    output, _ = runs[name].communicate(timeout=900)
    assert runs[name].returncode == 0, output[-6000:]
    print(output.splitlines()[-1])
