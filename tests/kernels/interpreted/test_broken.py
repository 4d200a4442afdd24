# SPDX-License-Identifier: Apache-2.0
"""Kernels broken on purpose: the checks must notice."""

import importlib.util
from pathlib import Path

import pytest

from tests.kernels import checks
from vtc.kernels import dispatch

ROOT = Path(dispatch.__file__).parent
F32, F16, BF16 = checks.DTYPES
pytestmark = pytest.mark.usefixtures("poisoned")

BROKEN = [
    ("similarity_reduce", "value > best", "value >= best", lambda k, d: checks.check_match(k, 1, 130, 32, F32, d)),
    ("similarity_reduce", "column_ok = columns < m", "column_ok = columns < M", lambda k, d: checks.check_sum(k, "elu", 3, 65, 32, F32, d, ragged_=True)),
    ("similarity_reduce", "mask=rows < N)", "mask=rows < N - 1)", lambda k, d: checks.check_sum(k, "elu", 1, 17, 32, F32, d)),
    ("similarity_reduce", "in range(splits)", "in range(1)", lambda k, d: checks.check_sum(k, "elu", 1, 130, 32, F32, d)),
    ("attention_reduce", "+ (TK - TQ))", ")", lambda k, d: checks.check_attention(k, 1, 20, 40, 32, F32, d, causal=True)),
    ("attention_reduce", "head // GROUP * k_head_stride", "0", lambda k, d: checks.check_attention(k, 1, 17, 17, 32, F32, d)),
    ("merge_tokens", "new_size += size", "new_size += 1.0", lambda k, d: checks.check_merge(k, 1, 17, 32, F32, d)),
    ("merge_tokens", "total += x * size[:, None]", "total += x", lambda k, d: checks.check_merge(k, 1, 17, 32, F32, d)),
    ("compact_tokens", "mask=inside & live[:, None]", "mask=inside & target_ok[:, None]", lambda k, d: checks.check_compact(k, 3, 17, 32, F32, d)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "right", "wrong", "check"), BROKEN, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_broken_kernel_fails(op, right, wrong, check, tmp_path, device):
    source = (ROOT / op / "triton.py").read_text()
    assert right in source
    source = source.replace(right, wrong).replace("from ..", "from vtc.kernels.")
    path = tmp_path / "broken.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("broken", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError):
        check(module, device)
