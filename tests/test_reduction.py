# SPDX-License-Identifier: Apache-2.0
"""Properties of the Reduction algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtc.reduction import Reduction, gather_tokens, top_k


def random_map(generator, batch, n, k, drops):
    """Targets (batch, n) with k survivors in each row; the others fold or, with drops, may go."""
    target = torch.empty(batch, n, dtype=torch.int64)
    for row in target:
        order = torch.randperm(n, generator=generator)
        row.copy_(order[torch.randint(k, (n,), generator=generator)])
        row[order[:k]] = order[:k]
        if drops:
            gone = order[k:][torch.rand(n - k, generator=generator) < 0.4]
            row[gone] = -1
    return target


@st.composite
def maps(draw, drops=None, n=None, batch=None):
    """A Reduction that merges and, with drops, prunes; and a generator for data."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch = draw(st.integers(1, 3)) if batch is None else batch
    n = draw(st.integers(1, 12)) if n is None else n
    k = draw(st.integers(1, n))
    drops = draw(st.booleans()) if drops is None else drops
    return Reduction.from_merge(random_map(generator, batch, n, k, drops), k), generator


@st.composite
def chains(draw, length, drops=None):
    first, generator = draw(maps(drops=drops))
    chain = [first]
    while len(chain) < length:
        nxt, _ = draw(maps(drops=drops, n=chain[-1].count, batch=first.batch))
        chain.append(nxt)
    return chain, generator


@st.composite
def masks(draw):
    batch, n = draw(st.integers(1, 4)), draw(st.integers(1, 10))
    rows = st.lists(st.booleans(), min_size=n, max_size=n)
    return torch.tensor(draw(st.lists(rows, min_size=batch, max_size=batch)))


def equal(a, b):
    """The same map: the same groups, and the same survivors where they are valid."""
    if a.keep.shape != b.keep.shape or not torch.equal(a.group, b.group):
        return False
    ones = torch.ones_like(a.keep, dtype=torch.bool)
    va, vb = (ones if x.valid is None else x.valid for x in (a, b))
    return torch.equal(va, vb) and torch.equal(a.keep.where(va, -1), b.keep.where(vb, -1))


def well_formed(r):
    """What the docstring of Reduction promises."""
    valid = torch.ones_like(r.keep, dtype=torch.bool) if r.valid is None else r.valid
    for keep, group, alive in zip(r.keep, r.group, valid, strict=True):
        survivors = keep[alive]
        assert (survivors.diff() > 0).all()
        slots = torch.arange(r.count)[alive]
        assert group[survivors].tolist() == slots.tolist()
        assert set(group.tolist()) - {-1} == set(slots.tolist())


@given(maps())
def test_from_merge_is_well_formed(case):
    reduction, _ = case
    well_formed(reduction)
    assert reduction.counts.tolist() == [reduction.count] * reduction.batch


@given(maps())
def test_from_merge_counts_the_survivors_itself(case):
    reduction, _ = case
    target = reduction.keep.gather(1, reduction.group.clamp(min=0)).where(reduction.group >= 0, -1)
    assert equal(Reduction.from_merge(target), reduction)


@given(chains(3))
def test_then_is_associative(case):
    (a, b, c), _ = case
    assert equal(a.then(b).then(c), a.then(b.then(c)))
    well_formed(a.then(b).then(c))


@given(maps())
def test_identity_is_neutral(case):
    r, _ = case
    assert equal(Reduction.identity(r.batch, r.source_count).then(r), r)
    assert equal(r.then(Reduction.identity(r.batch, r.count)), r)


@given(chains(2))
def test_select_composes(case):
    (a, b), generator = case
    x = torch.randn(a.batch, a.source_count, 3, generator=generator)
    assert torch.equal(b.select(a.select(x)), a.then(b).select(x))


@given(chains(2))
def test_merges_compose_with_sizes(case):
    (a, b), generator = case
    x = torch.randn(a.batch, a.source_count, 3, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 5, x.shape[:2], generator=generator).double()
    stepwise = b.merge(*a.merge(x, size))
    at_once = a.then(b).merge(x, size)
    torch.testing.assert_close(stepwise[0], at_once[0])
    torch.testing.assert_close(stepwise[1], at_once[1], rtol=0, atol=0)


@given(maps(drops=False))
def test_merge_undoes_expand(case):
    r, generator = case
    y = torch.randn(r.batch, r.count, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(r.merge(r.expand(y))[0], y)
    assert torch.equal(r.select(r.expand(y)), y)


@given(maps())
def test_merge_is_the_weighted_mean_of_each_group(case):
    r, generator = case
    x = torch.randn(r.batch, r.source_count, 2, generator=generator, dtype=torch.float64)
    size = torch.rand(r.batch, r.source_count, generator=generator, dtype=torch.float64) + 0.1
    merged, sizes = r.merge(x, size)
    for b in range(r.batch):
        for slot in range(r.count):
            inside = r.group[b] == slot
            weight = size[b, inside]
            mean = (x[b, inside] * weight[:, None]).sum(0) / weight.sum()
            torch.testing.assert_close(merged[b, slot], mean)
            torch.testing.assert_close(sizes[b, slot], weight.sum())


@given(maps())
def test_sizes_conserve_the_count(case):
    r, generator = case
    x = torch.randn(r.batch, r.source_count, 2, generator=generator)
    _, size = r.merge(x)
    assert torch.equal(size.sum(1), (r.group >= 0).sum(1).float())


@given(maps())
def test_expand_gives_zeros_where_tokens_were_dropped(case):
    r, generator = case
    y = torch.randn(r.batch, r.count, 2, generator=generator)
    y[:, 0] = torch.nan  # must not leak into dropped tokens
    back = r.expand(y)
    assert (back[r.group < 0] == 0).all()
    assert back[r.group == 0].isnan().all()


@given(masks())
def test_from_mask(mask):
    r = Reduction.from_mask(mask)
    well_formed(r)
    assert torch.equal(r.group >= 0, mask)
    assert torch.equal(r.counts, mask.sum(1))
    assert (r.valid is None) == (mask.sum(1).unique().numel() == 1)


@given(masks(), st.integers(0, 2**31))
def test_ragged_rows_do_not_mix(mask, seed):
    """Every row behaves as if it were alone, and its padding slots hold zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*mask.shape, 2, generator=generator)
    r = Reduction.from_mask(mask)
    merged, size = r.merge(x)
    for b, k in enumerate(r.counts.tolist()):
        alone = Reduction.from_mask(mask[b : b + 1])
        assert torch.equal(r.keep[b, :k], alone.keep[0])
        assert torch.equal(r.group[b], alone.group[0])
        assert torch.equal(r.select(x)[b, :k], x[b, mask[b]])
        assert torch.equal(merged[b, :k], x[b, mask[b]])
        assert (merged[b, k:] == 0).all()
        assert size[b].tolist() == [1.0] * k + [0.0] * (r.count - k)


@given(masks(), masks())
def test_ragged_then_keeps_padding_out(first, second):
    a = Reduction.from_mask(first)
    mask = torch.zeros(a.batch, a.count, dtype=torch.bool)
    rows, columns = min(len(second), len(mask)), min(second.shape[1], mask.shape[1])
    mask[:rows, :columns] = second[:rows, :columns]
    real = torch.arange(a.count) < a.counts[:, None]
    b = Reduction.from_mask(mask & real)
    well_formed(a.then(b))
    assert torch.equal(a.then(b).counts, (mask & real).sum(1))
    # A second map that keeps everything does not bring padding back.
    everything = a.then(Reduction.identity(a.batch, a.count))
    assert torch.equal(everything.counts, a.counts)


@given(masks(), st.integers(0, 2**31), st.integers(0, 12))
def test_from_scores_takes_the_best(valid, seed, k):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, valid.shape, generator=generator).float()
    scores[scores == -2] = -torch.inf  # a legal score, still ahead of what is not a token
    r = Reduction.from_scores(scores, k, valid)
    well_formed(r)
    for b in range(len(scores)):
        ranked = sorted(torch.nonzero(valid[b])[:, 0].tolist(), key=lambda i: (-scores[b, i], i))
        assert torch.nonzero(r.group[b] >= 0)[:, 0].tolist() == sorted(ranked[:k])
    per_row = Reduction.from_scores(scores, torch.full((len(scores),), k), valid)
    assert equal(per_row, r)


@given(masks(), st.integers(0, 2**31))
def test_constructors_agree_on_plain_pruning(mask, seed):
    """top-k, its mask, its keep list and its merge targets are one map."""
    batch, n = mask.shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (batch, n), generator=generator).float()
    k = 1 + seed % n
    r = Reduction.from_scores(scores, k)
    kept = r.group >= 0
    assert r.valid is None and r.count == k
    assert equal(Reduction.from_mask(kept), r)
    assert equal(Reduction.from_keep(r.keep, n), r)
    assert equal(Reduction.from_merge(torch.arange(n).where(kept, -1), k), r)


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 2, 2, 1, 2, 1]])
    assert top_k(scores, 2).tolist() == [[1, 2]]
    assert top_k(scores, 4).tolist() == [[0, 1, 2, 4]]
    assert top_k(torch.zeros(2, 700), 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_half_precision_is_ranked_and_summed_in_fp32():
    x = torch.ones(1, 1000, 2, dtype=torch.bfloat16)
    one = Reduction(torch.tensor([[0]]), torch.zeros(1, 1000, dtype=torch.int64))
    merged, size = one.merge(x)
    assert merged.dtype == torch.bfloat16 and merged.tolist() == [[[1.0, 1.0]]]
    assert size.dtype == torch.float32 and size.tolist() == [[1000.0]]
    assert one.sum(x)[0, 0, 0] == torch.tensor(1000.0).bfloat16()


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 3), (2, 6, 3, 4)])
def test_any_number_of_trailing_dimensions(shape):
    x = torch.randn(shape)
    r = Reduction.from_merge(torch.tensor([[0, 0, 2, 2, 4, 4], [1, 1, 1, 3, 3, 5]]))
    assert r.select(x).shape == (2, 3, *shape[2:])
    assert torch.equal(r.select(x)[1], x[1, [1, 3, 5]])
    torch.testing.assert_close(r.sum(x)[1, 0], x[1, :3].sum(0))
    assert torch.equal(r.expand(r.select(x))[0], x[0, [0, 0, 2, 2, 4, 4]])
    assert torch.equal(gather_tokens(x, r.keep), r.select(x))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(r.sum(strided), r.sum(x))


def test_a_row_may_lose_everything():
    r = Reduction.from_mask(torch.zeros(2, 3, dtype=torch.bool))
    x = torch.randn(2, 3, 4)
    assert r.count == 0 and r.counts.tolist() == [0, 0]
    assert r.select(x).shape == r.merge(x)[0].shape == (2, 0, 4)
    assert torch.equal(r.expand(r.select(x)), torch.zeros(2, 3, 4))
    assert equal(r.then(Reduction.identity(2, 0)), r)


def test_then_says_which_lengths_do_not_fit():
    with pytest.raises(ValueError, match="leaves 4 tokens, the second takes 5"):
        Reduction.identity(1, 4).then(Reduction.identity(1, 5))


def test_gradients_flow_through_merge_select_and_expand():
    r = Reduction.from_merge(torch.tensor([[0, 0, 2, -1]]))
    x = torch.randn(1, 4, 2, requires_grad=True)
    (r.merge(x)[0].sum() + r.select(x).sum() + r.expand(r.select(x)).sum()).backward()
    assert x.grad[0, :, 0].tolist() == [0.5 + 1 + 2, 0.5, 1 + 1 + 1, 0]
