# SPDX-License-Identifier: Apache-2.0
"""The CPU path, the registered operators, and that the methods get what they computed before."""

import subprocess
import sys

import mini
import pytest
import torch
from torch._subclasses import FakeTensorMode

import vtc
from tests.kernels import checks
from vtc.kernels import (
    attention_reduce,
    compact_tokens,
    dispatch,
    merge_tokens,
    similarity_reduce,
)
from vtc.kernels.attention_reduce import reference as attention
from vtc.kernels.compact_tokens import reference as compact
from vtc.kernels.merge_tokens import reference as merge
from vtc.kernels.similarity_reduce import reference as similarity
from vtc.methods import _matching, pitome
from vtc.methods._common import unit
from vtc.reduction import Reduction

F32, F16, BF16 = checks.DTYPES
SIZES = [
    (batch, n, c, dtype)
    for n, c, batch in (
        (1, 32, 3),
        (17, 72, 1),
        (63, 1024, 1),
        (64, 64, 3),
        (65, 80, 1),
        (576, 64, 1),
        (577, 1024, 3),
        (1000, 72, 1),
    )
    for dtype in checks.DTYPES
]


@pytest.mark.parametrize(("batch", "n", "c", "dtype"), SIZES)
def test_similarity(batch, n, c, dtype):
    for kind in ("elu", "paper", "sum"):
        checks.check_sum(similarity, kind, batch, n, c, dtype)
    checks.check_match(similarity, batch, n, c, dtype)
    checks.check_count(similarity, batch, n, c, dtype)


@pytest.mark.parametrize("n", [1, 65, 577])
def test_similarity_of_ragged_rows(n):
    checks.check_sum(similarity, "elu", 3, n, 64, F32, diag=True, ragged_=True)
    checks.check_match(similarity, 3, n, 64, F32, masked=True, ragged_=True)


@pytest.mark.parametrize("block", [1 << 10, 1 << 14])
def test_blocks_do_not_change_a_similarity(block, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK", block)
    checks.check_sum(similarity, "paper", 2, 130, 64, F32, diag=True)
    checks.check_match(similarity, 2, 130, 64, F32, masked=True)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("block", [1 << 8, 1 << 20])
def test_attention(block, dtype, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    for tq, tk, causal in ((1, 17, True), (65, 65, True), (64, 80, False), (70, 40, True)):
        for flag in (False, True):
            flags = {"causal": causal, "masked": flag, "weighted": flag}
            checks.check_attention(attention, 2, tq, tk, 72, dtype, **flags)


@pytest.mark.parametrize(("batch", "n", "c", "dtype"), SIZES)
def test_tokens(batch, n, c, dtype):
    checks.check_merge(merge, batch, n, c, dtype)
    checks.check_merge(merge, batch, n, c, dtype, sized=False)
    checks.check_compact(compact, batch, n, c, dtype)


# ---- registration --------------------------------------------------------------------------------


def samples():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 8, generator=g)
    y = torch.randn(2, 5, 8, generator=g)
    lengths = torch.tensor([9, 4])
    q, k = torch.randn(2, 4, 9, 8, generator=g), torch.randn(2, 2, 12, 8, generator=g)
    group = torch.randint(-1, 4, (2, 9), generator=g)
    keep = torch.tensor([[0, 3, 8], [1, 2, 0]])
    places = torch.tensor([[0, 1, 2], [3, 4, -1]])
    ops = torch.ops.vtc
    leaf = x.clone().requires_grad_()
    size = (torch.rand(2, 9, generator=g) + 0.5).requires_grad_()
    return [
        (ops.similarity_sum.default, (x, None, "elu", 0.5, 1.0, True, False, lengths, None)),
        (ops.similarity_sum.default, (x, y, "count", 0.5, 1.0, False, False, None, None)),
        (ops.best_match.default, (x, y, True, False, None, None, lengths, None)),
        (ops.attention_row_lse.default, (q, k, 0.3, True, None)),
        (ops.attention_column_sums.default, (q, k, None, None, 0.3, True, None, None)),
        (ops.merge_tokens.default, (leaf, size, group, 4)),
        (ops.merge_tokens.default, (leaf, None, group, 4)),
        (ops.compact_tokens.default, ([leaf, group], keep, None, 6, False)),
        (ops.compact_tokens.default, ([leaf, group], keep, places, 6, False)),
        (ops.compact_tokens.default, ([leaf, group], keep, places, 5, True)),
    ]


@pytest.mark.parametrize("index", range(10))
def test_operators_are_registered_as_torch_expects(index):
    op, args = samples()[index]
    torch.library.opcheck(op, args)


def test_gradients_of_merged_tokens():
    """Against finite differences and against the gradients of the indexed sum, in float64."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 3, dtype=torch.float64, generator=g).requires_grad_()
    size = (torch.rand(2, 7, dtype=torch.float64, generator=g) + 0.5).requires_grad_()
    group = torch.tensor([[0, 1, 1, -1, 3, 0, 0], [2, 2, 2, 2, 2, 2, -1]])
    assert torch.autograd.gradcheck(lambda x, s: merge_tokens.merge(x, s, group, 4), (x, size))
    assert torch.autograd.gradcheck(lambda x: merge_tokens.merge(x, None, group, 4)[0], (x,))


def test_gradients_of_compacted_tokens():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=g).requires_grad_()
    y = torch.randn(2, 6, dtype=torch.float64, generator=g).requires_grad_()
    keep = torch.tensor([[0, 2, 5], [1, 4, 0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    for live in (None, valid):
        assert torch.autograd.gradcheck(
            lambda x, y, live=live: tuple(compact_tokens.compact([x, y], keep, live)), (x, y)
        )
    assert torch.autograd.gradcheck(
        lambda x, y: tuple(compact_tokens.compact_flat([x, y], keep, valid)[0]), (x, y)
    )


def test_gradients_where_no_token_is_or_none_is_asked_for():
    x, y = torch.randn(1, 3, 2, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    first, _ = compact_tokens.compact([x, y], torch.tensor([[2, 0]]))
    first.sum().backward()
    assert x.grad.tolist() == [[[1, 1], [0, 0], [1, 1]]]
    assert y.grad is None or not y.grad.any()
    none = torch.randn(2, 0, 3, requires_grad=True)
    keep, valid = torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.bool)
    (padding,) = compact_tokens.compact([none], keep, valid)
    assert torch.equal(padding, torch.zeros(2, 4, 3))
    padding.sum().backward()
    assert none.grad is None or none.grad.shape == (2, 0, 3)
    (flat,), boundaries = compact_tokens.compact_flat([none.detach()], keep, valid)
    assert flat.shape == (0, 3) and boundaries.tolist() == [0, 0, 0]


def test_flat_rows_and_their_boundaries():
    x = torch.arange(12).view(2, 6)
    keep = torch.tensor([[0, 2, 5], [1, 4, 0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    (flat,), boundaries = compact_tokens.compact_flat([x], keep, valid)
    assert flat.tolist() == [0, 2, 5, 7, 10] and boundaries.tolist() == [0, 3, 5]
    (flat,), boundaries = compact_tokens.compact_flat([x], keep)
    assert flat.tolist() == [0, 2, 5, 7, 10, 6] and boundaries.tolist() == [0, 3, 6]
    (padded,) = compact_tokens.compact([x], keep, valid)
    assert padded.tolist() == [[0, 2, 5], [7, 10, 0]]


def step(x, size):
    energy = similarity_reduce.energy(x, 0.5)
    edge, partner = similarity_reduce.best_match(x[:, 0::2], x[:, 1::2])
    group = energy.argsort(dim=1) % 4
    merged, new_size = merge_tokens.merge(x, size, group, 4)
    return merged, new_size, edge, partner


def test_a_merge_step_compiles_in_one_graph_and_exports():
    x, size = torch.randn(2, 10, 8), torch.rand(2, 10) + 0.5
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, size), step(x, size)):
        assert torch.equal(a, b)

    class Step(torch.nn.Module):
        def forward(self, x, size):
            return step(x, size)

    program = torch.export.export(Step(), (x, size))
    for a, b in zip(program.module()(x, size), step(x, size)):
        assert torch.equal(a, b)


def test_calls_that_something_looks_into_go_through_the_registered_operator():
    x = torch.randn(2, 10, 8)
    assert dispatch.unseen(x, None)
    assert not dispatch.unseen(x.clone().requires_grad_())
    with torch.no_grad():
        assert dispatch.unseen(x.clone().requires_grad_())
    with FakeTensorMode():  # an implementation that ran here would give other numbers than none
        fake = torch.empty(2, 10, 8)
        assert not dispatch.unseen(fake)
        energy = similarity_reduce.energy(fake, 0.5)
        merged, _ = merge_tokens.merge(fake, None, torch.zeros(2, 10, dtype=torch.long), 4)
        heads = fake[:, None]
        rows = attention_reduce.row_lse(heads, heads[:, :, :7])
        columns = attention_reduce.column_sums(heads, heads[:, :, :7])
    assert energy.shape == (2, 10) and merged.shape == (2, 4, 8)
    assert rows.shape == (2, 1, 10) and columns.shape == (2, 1, 7)


def test_methods_and_engine_call_the_operators():
    """The graph of a compiled encoder under PiToMe holds the three operators of a merge step."""
    names: set[str] = set()

    def look(graph, inputs):
        names.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model, pixels = mini.ENCODERS["timm-vit"](), mini.images()
    torch._dynamo.reset()
    with torch.no_grad(), vtc.compressing(model, "pitome", keep_ratio=0.5):
        torch.compile(model, backend=look, fullgraph=True)(pixels)
    torch._dynamo.reset()
    for op in ("similarity_sum", "best_match", "merge_tokens"):
        assert any(op in name for name in names)


def test_scores_do_not_carry_gradients():
    x = torch.randn(1, 6, 4, requires_grad=True)
    assert not similarity_reduce.energy(x, 0.5).requires_grad
    assert not attention_reduce.column_sums(x[None], x[None]).requires_grad


def test_heads_must_divide():
    for reduce in (attention_reduce.column_sums, attention_reduce.row_lse):
        with pytest.raises(ValueError, match="multiple"):
            reduce(torch.randn(1, 3, 4, 8), torch.randn(1, 2, 4, 8))


def test_rows_of_attention():
    """Of grouped heads, with padding and without: d^-0.5 is the scale unless another is given."""
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 5, 16)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3)
    torch.testing.assert_close(attention_reduce.row_lse(q, k), (scores / 4).logsumexp(3))
    real = torch.tensor([[False, True, True, True, False]])
    got = attention_reduce.row_lse(q, k, scale=0.5, causal=True, key_mask=real)
    seen = real[0] & torch.ones(3, 5, dtype=torch.bool).tril(2)
    want = (scores / 2).masked_fill(~seen, -torch.inf).logsumexp(3)
    torch.testing.assert_close(got, want)


def test_nobody_to_attend_to():
    q = torch.randn(1, 2, 3, 8)
    assert attention_reduce.column_sums(q, q[:, :, :0]).shape == (1, 2, 0)
    assert attention_reduce.row_lse(q, q[:, :, :0]).eq(-torch.inf).all()


def test_sum_and_count_of_similarities():
    x, y = torch.randn(2, 6, 8), torch.randn(2, 4, 8)
    s = unit(x) @ unit(y).transpose(1, 2)
    torch.testing.assert_close(similarity_reduce.similarity_sum(x, y), s.sum(2))
    counted = similarity_reduce.similarity_count(x, y, threshold=0.1)
    assert torch.equal(counted, (s > 0.1).sum(2))
    own = (unit(x) @ unit(x).transpose(1, 2)).sum(2)
    torch.testing.assert_close(similarity_reduce.similarity_sum(x, exclude_diag=True), own - 1)
    with pytest.raises(ValueError, match=r"kind is \"elu\" or \"paper\"; got 'relu'"):
        similarity_reduce.energy(x, 0.5, kind="relu")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_vtc_does_not_import_triton():
    done = python(
        "import sys, vtc, vtc.kernels.similarity_reduce; assert 'triton' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_everything_but_the_gpu_works_without_triton():
    done = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from vtc.kernels import similarity_reduce, attention_reduce, merge_tokens, compact_tokens\n"
        "from vtc.kernels.dispatch import has_triton\n"
        "assert not has_triton()\n"
        "x = torch.randn(2, 9, 8)\n"
        "similarity_reduce.energy(x, .5); similarity_reduce.best_match(x, x)\n"
        "attention_reduce.column_sums(x[:, None], x[:, None])\n"
        "merge_tokens.merge(x, None, torch.zeros(2, 9, dtype=torch.long), 1)\n"
        "compact_tokens.compact([x], torch.zeros(2, 1, dtype=torch.long))\n"
    )
    assert done.returncode == 0, done.stderr


# ---- the methods' formulas -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["elu", "paper"])
@pytest.mark.parametrize("n", [17, 64, 577])
def test_energy_is_that_of_pitome(n, kind):
    x = checks.features(2, n, 64, F32, "cpu")
    s = unit(x)
    s = s @ s.transpose(1, 2) - 0.4
    expected = torch.where(s > 0, s, s.exp() - 1).mean(2)
    if kind == "paper":
        expected = expected + 0.4 * (s >= 0).float().mean(2)
    torch.testing.assert_close(
        similarity_reduce.energy(x, 0.4, kind=kind), expected, rtol=0, atol=2e-6
    )


def match_by_matrix(x, a, b, r, barred=None):
    """`tome.match` over the whole matrix of cosines."""
    rows = torch.arange(len(x))[:, None]
    x = unit(x)
    similarity = x[rows, a] @ x[rows, b].transpose(1, 2)
    if barred is not None:
        similarity.masked_fill_(barred[b][:, None] | barred[a][..., None], -torch.inf)
    edge, partner = similarity.max(2)
    best = edge.argsort(dim=1, descending=True, stable=True)[:, :r]
    a, partner = a.gather(1, best), partner.gather(1, best)
    target = torch.arange(x.shape[1]).repeat(len(x), 1)
    return target.scatter_(1, a, b.gather(1, partner))


@pytest.mark.parametrize("n", [18, 64, 577])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_matching_is_that_of_the_matrix(n, prefix):
    x = checks.features(2, n, 64, F32, "cpu")
    index = torch.arange(n)
    a, b = index[0::2].expand(2, -1), index[1::2].expand(2, -1)
    expected = match_by_matrix(x, a, b, n // 5, index < prefix if prefix else None)
    assert torch.equal(_matching.match_parity(x, n // 5, prefix), expected)
    energy = similarity_reduce.energy(x, 0.4)
    order = energy.argsort(dim=1, descending=True, stable=True)[:, : 2 * (n // 5)]
    expected = match_by_matrix(x, order[:, 0::2], order[:, 1::2], n // 5)
    assert torch.equal(pitome.match_energy(x, energy, n // 5), expected)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_merging_and_selecting_are_those_of_the_formulas(dtype):
    x = checks.features(3, 65, 24, dtype, "cpu")
    size = torch.rand(3, 65) + 0.5
    reduction = Reduction.from_merge(_matching.match_parity(x, 20, 1))
    for weights in (None, size):
        merged, new_size = reduction.merge(x, weights)
        m = torch.ones(3, 65) if weights is None else weights
        mine = torch.nn.functional.one_hot(reduction.group, reduction.count) * m[..., None]
        assert merged.dtype == dtype and new_size.dtype == F32
        torch.testing.assert_close(new_size, mine.sum(1))
        mean = (mine / mine.sum(1, keepdim=True)).transpose(1, 2) @ x.float()
        tolerance = checks.MERGE_TOLERANCE[dtype]
        torch.testing.assert_close(merged.float(), mean, rtol=tolerance, atol=max(tolerance, 1e-6))
    (kept,) = compact_tokens.compact([x], reduction.keep)
    assert torch.equal(kept, reduction.select(x))
