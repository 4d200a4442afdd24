# SPDX-License-Identifier: Apache-2.0
"""Properties of the Reduction algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reductions import valid_of, well_formed
from torch._subclasses.fake_tensor import FakeTensorMode

from vtc.reduction import Reduction, gather_tokens, marked, ranks, top_k


def random_map(generator, survivors, real, drops):
    """Targets (B, N): row b has that many survivors; the others fold or, with drops, may go.

    Args:
        survivors: a count for each row; real: (B, N) bool, what is no token is dropped.
    """
    target = torch.full(real.shape, -1)
    for row, k, there in zip(target, survivors, real, strict=True):
        order = there.nonzero()[:, 0]
        order = order[torch.randperm(len(order), generator=generator)]
        k = min(k, len(order))
        if k:
            row[order] = order[torch.randint(k, (len(order),), generator=generator)]
        row[order[:k]] = order[:k]
        if drops:
            gone = order[k:][torch.rand(len(order) - k, generator=generator) < 0.4]
            row[gone] = -1
    return target


@st.composite
def maps(draw, drops=None, source=None):
    """A Reduction that merges and, with drops, prunes, ragged or not; and a generator for data.

    Args:
        source: the Reduction whose slots it takes; None for a batch without padding.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if source is None:
        real = torch.ones(draw(st.integers(0, 3)), draw(st.integers(1, 12)), dtype=torch.bool)
    else:
        real = valid_of(source)
    batch, n = real.shape
    counts = st.integers(0, n)
    if draw(st.booleans()) and bool(real.all()):
        k = draw(counts)
        drops = drops or k == 0
        survivors = [k] * batch
    else:
        k, survivors = None, draw(st.lists(counts, min_size=batch, max_size=batch))
    drops = draw(st.booleans()) if drops is None else drops
    return Reduction.from_merge(random_map(generator, survivors, real, drops), k), generator


@st.composite
def chains(draw, length, drops=None):
    first, generator = draw(maps(drops=drops))
    chain = [first]
    while len(chain) < length:
        nxt, _ = draw(maps(drops=drops, source=chain[-1]))
        chain.append(nxt)
    return chain, generator


@st.composite
def masks(draw):
    batch, n = draw(st.integers(0, 4)), draw(st.integers(0, 10))
    rows = st.lists(st.booleans(), min_size=n, max_size=n)
    rows = draw(st.lists(rows, min_size=batch, max_size=batch))
    return torch.tensor(rows, dtype=torch.bool).reshape(batch, n)


def equal(a, b):
    """The same map: the same groups, and the same survivors where they are valid."""
    if not a.batch and not b.batch:  # without rows, nothing tells how many slots there are
        return a.source_count == b.source_count
    if a.keep.shape != b.keep.shape or not torch.equal(a.group, b.group):
        return False
    va, vb = valid_of(a), valid_of(b)
    return torch.equal(va, vb) and torch.equal(a.keep.where(va, -1), b.keep.where(vb, -1))


@given(maps())
def test_from_merge_is_well_formed(case):
    reduction, _ = case
    well_formed(reduction)
    assert reduction.counts.tolist() == [int(row.amax()) + 1 for row in reduction.group]


@given(maps())
def test_from_merge_counts_the_survivors_itself(case):
    reduction, _ = case
    n = reduction.source_count
    index = torch.arange(n).expand_as(reduction.group)
    target = reduction.expand(reduction.select(index)).where(reduction.group >= 0, -1)
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
def test_expand_composes(case):
    """Tokens dropped in either step come back as zeros."""
    (a, b), generator = case
    y = torch.randn(b.batch, b.count, 2, generator=generator)
    assert torch.equal(a.expand(b.expand(y)), a.then(b).expand(y))


@given(maps())
def test_expand_gives_each_token_the_value_of_its_survivor(case):
    """expand(select(x)): what survives is unchanged, what was folded gets its slot's, else zero."""
    r, generator = case
    x = torch.randn(r.batch, r.source_count, 2, generator=generator)
    back = r.expand(r.select(x))
    for b in range(r.batch):
        for i, slot in enumerate(r.group[b].tolist()):
            assert torch.equal(back[b, i], x[b, r.keep[b, slot]] if slot >= 0 else x[b, i] * 0)


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
    real = valid_of(r)
    torch.testing.assert_close(r.merge(r.expand(y))[0], y * real[..., None])
    assert torch.equal(r.select(r.expand(y))[real], y[real])


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
            mean = (x[b, inside] * weight[:, None]).sum(0) / weight.sum().clamp(min=0.1)
            torch.testing.assert_close(merged[b, slot], mean)  # zeros on padding
            torch.testing.assert_close(sizes[b, slot], weight.sum())


@given(maps(), st.sampled_from(["float16", "bfloat16"]))
def test_half_precision_is_accumulated_in_fp32(case, dtype):
    """Means and sums are those of fp64, rounded once."""
    r, generator = case
    dtype = getattr(torch, dtype)
    x = (torch.randn(r.batch, r.source_count, 2, generator=generator) * 100).to(dtype)
    size = torch.randint(1, 300, x.shape[:2], generator=generator).float()
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-3}
    merged, sizes = r.merge(x, size)
    assert merged.dtype == dtype and sizes.dtype == torch.float32
    exact, total = r.merge(x.double(), size.double())
    torch.testing.assert_close(merged.double(), exact, **close)
    assert torch.equal(sizes.double(), total)
    torch.testing.assert_close(r.sum(x).double(), r.sum(x.double()), **close)


@given(maps())
def test_sums_and_sizes_conserve_mass(case):
    """Tokens that are not dropped are all there, once; padding slots hold nothing."""
    r, generator = case
    x = torch.randint(-9, 9, (r.batch, r.source_count, 2), generator=generator)
    size = torch.randint(1, 9, (r.batch, r.source_count), generator=generator).float()
    alive = r.group >= 0
    assert torch.equal(r.sum(x).sum(1), (x * alive[..., None]).sum(1))
    _, sizes = r.merge(x.float(), size)
    assert torch.equal(sizes.sum(1), (size * alive).sum(1))
    assert torch.equal(r.merge(x.float())[1].sum(1), alive.sum(1).float())
    assert not r.sum(x)[~valid_of(r)].any() and not sizes[~valid_of(r)].any()


@given(maps(), st.data())
def test_a_row_alone(case, data):
    """`row` and `to` keep everything; a row does not depend on the others."""
    r, generator = case
    scores = torch.rand(r.batch, r.source_count, generator=generator)
    r = r.ranked(scores)
    same = r.to("cpu")
    assert equal(same, r) and torch.equal(same.scores, scores)
    if not r.batch:
        return
    i = data.draw(st.integers(0, r.batch - 1))
    row = r.row(i)
    well_formed(row)
    assert row.batch == 1 and torch.equal(row.group, r.group[i : i + 1])
    assert torch.equal(row.scores, scores[i : i + 1])
    x = torch.randn(r.batch, r.source_count, 2, generator=generator)
    for whole, alone in zip(r.merge(x), row.merge(x[i : i + 1]), strict=True):
        torch.testing.assert_close(alone, whole[i : i + 1])


@given(maps())
def test_expand_gives_zeros_where_tokens_were_dropped(case):
    r, generator = case
    y = torch.randn(r.batch, r.count, 2, generator=generator)
    y[:, :1] = torch.nan  # must not leak into dropped tokens
    back = r.expand(y)
    assert (back[r.group < 0] == 0).all()
    assert back[r.group == 0].isnan().all()


@given(masks())
def test_from_mask(mask):
    r = Reduction.from_mask(mask)
    well_formed(r)
    assert torch.equal(r.group >= 0, mask)
    assert torch.equal(r.counts, mask.sum(1))
    assert (r.valid is None) == (mask.sum(1).unique().numel() <= 1)


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


@given(chains(2))
def test_then_keeps_padding_out(case):
    (a, b), _ = case
    both = a.then(b)
    well_formed(both)
    assert torch.equal(both.counts, b.counts)
    # A second map that keeps everything does not bring padding back.
    everything = a.then(Reduction.identity(a.batch, a.count))
    assert torch.equal(everything.counts, a.counts)


@given(maps(), st.data())
def test_padding_that_a_second_map_keeps_is_still_padding(case, data):
    a, _ = case
    size = a.batch * a.count
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    mask = mask.bool().reshape(a.batch, a.count)
    both = a.then(Reduction.from_mask(mask))
    well_formed(both)
    assert torch.equal(both.counts, (mask & valid_of(a)).sum(1))


@given(masks(), st.integers(0, 2**31), st.lists(st.integers(0, 12), min_size=4, max_size=4))
def test_from_scores_takes_the_best(valid, seed, counts):
    """As many as each row asks for, of its tokens; ties go to the lower index."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, valid.shape, generator=generator).float()
    scores[scores == -2] = -torch.inf  # a legal score, still ahead of what is not a token
    k = torch.tensor(counts[: len(scores)])
    r = Reduction.from_scores(scores, k, valid)
    well_formed(r)
    for b in range(len(scores)):
        ranked = sorted(torch.nonzero(valid[b])[:, 0].tolist(), key=lambda i: (-scores[b, i], i))
        assert torch.nonzero(r.group[b] >= 0)[:, 0].tolist() == sorted(ranked[: counts[b]])
    same = torch.full_like(k, counts[0])
    assert equal(
        Reduction.from_scores(scores, counts[0], valid), r.from_scores(scores, same, valid)
    )
    every = torch.ones_like(valid)
    assert equal(Reduction.from_scores(scores, counts[0]), r.from_scores(scores, same, every))
    assert torch.equal(r.scores, scores)


@given(masks(), st.integers(0, 2**31))
def test_constructors_agree_on_plain_pruning(mask, seed):
    """top-k, its mask, its keep list and its merge targets are one map."""
    batch, n = mask.shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (batch, n), generator=generator).float()
    k = seed % (n + 1)
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


def test_half_precision_does_not_saturate():
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


def test_no_negative_count():
    with pytest.raises(ValueError, match=r"k counts tokens.*got -1"):
        Reduction.from_scores(torch.zeros(1, 3), -1)


def test_then_says_which_lengths_do_not_fit():
    with pytest.raises(ValueError, match="leaves 4 tokens, the second takes 5"):
        Reduction.identity(1, 4).then(Reduction.identity(1, 5))


def test_gradients_flow_through_merge_select_and_expand():
    r = Reduction.from_merge(torch.tensor([[0, 0, 2, -1]]))
    x = torch.randn(1, 4, 2, requires_grad=True)
    (r.merge(x)[0].sum() + r.select(x).sum() + r.expand(r.select(x)).sum()).backward()
    assert x.grad[0, :, 0].tolist() == [0.5 + 1 + 2, 0.5, 1 + 1 + 1, 0]


def test_sums_of_whole_numbers_are_exact_and_keep_their_dtype():
    r = Reduction.from_merge(torch.tensor([[0, 0, 2]]))
    total = r.sum(torch.tensor([[2**53, 1, 7]]))
    assert total.dtype == torch.int64
    assert total.tolist() == [[2**53 + 1, 7]]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert r.sum(torch.ones(1, 3, dtype=dtype)).dtype == dtype


def test_ranks_of_many_equal_scores_are_in_their_order():
    assert torch.equal(ranks(torch.zeros(2, 5000)), torch.arange(5000).expand(2, -1))


def test_nothing_is_made_on_another_device():
    """On fake tensors of a device that this machine need not have; two devices at once raise."""
    with FakeTensorMode():
        scores, x = torch.empty(2, 6, device="cuda"), torch.empty(2, 6, 4, device="cuda")
        target = torch.empty(2, 6, dtype=torch.int64, device="cuda")
        merged, kept = Reduction.from_merge(target, 3), Reduction.from_scores(scores, 3)
        made = [
            merged.then(Reduction.from_scores(scores[:, :3], 1)).group,
            *(kept.keep, kept.group, merged.keep, merged.group, merged.counts),
            *(merged.sum(x), *merged.merge(x), merged.expand(merged.select(x))),
            *(ranks(scores), ranks(scores, scores > 0), marked(kept.keep, 6), top_k(scores, 2)),
            Reduction.identity(2, 6, "cuda").keep,
        ]
        assert {str(tensor.device) for tensor in made} == {"cuda:0"}
