# SPDX-License-Identifier: Apache-2.0
"""Checks that every implementation of a kernel must pass, against N x N formulas in float64.

Each check takes the module under test: a reference, a Triton kernel, or one broken on purpose.
"""

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SUM_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}
"""Reductions come out in fp32 from exact products of the rounded inputs, whatever their dtype:
relative to the largest summand times the root of the number of summands, or to 1 for a mean."""
MERGE_TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Merged tokens come out in the dtype of the input: about one rounding of it, relative."""


def close(actual, expected, tolerance):
    """Equal up to the tolerance relative to the largest expected value, and nothing is NaN."""
    expected = expected.to(actual.device)
    assert actual.shape == expected.shape
    assert not actual.isnan().any(), "an output was not written"
    infinite = expected.isinf()
    assert torch.equal(actual.isinf(), infinite)
    gap = (actual.double() - expected.double()).masked_fill(infinite, 0).abs()
    scale = (
        max(1.0, float(expected.double().masked_fill(infinite, 0).abs().max()))
        if gap.numel()
        else 1
    )
    assert not gap.numel() or float(gap.max()) <= tolerance * scale, (
        f"off by {float(gap.max()):.2e}"
    )


def features(batch, n, c, dtype, device, seed=0, lengths=None):
    """Random tokens with a common direction; NaN beyond the lengths."""
    g = torch.Generator().manual_seed(seed + 7919 * n + c)
    x = torch.randn(batch, n, c, generator=g) + 0.7 * torch.randn(batch, 1, c, generator=g)
    if lengths is not None:
        x[torch.arange(n) >= lengths[:, None]] = torch.nan
    return x.to(dtype).to(device)


def ragged(batch, n):
    """Lengths with 0 and 1 among them."""
    return torch.tensor([[0, 1, n], [n, n // 2, 1]][n % 2])[:batch].clamp(max=n)


def cosine(x, y, normalize=True):
    x, y = x.double().cpu().nan_to_num(), y.double().cpu().nan_to_num()
    if normalize:
        x, y = (z / z.norm(dim=-1, keepdim=True).clamp(min=1e-6) for z in (x, y))
    return x @ y.transpose(1, 2)


def live(n, lengths):
    return torch.arange(n) < lengths[:, None]


def check_sum(
    impl, kind, batch, n, c, dtype, device="cpu", normalize=True, diag=False, ragged_=False
):
    """Energies and sums of tokens against themselves, and against others."""
    lengths = ragged(batch, n) if ragged_ else torch.full((batch,), n)
    margin, alpha = 0.35, 0.8
    for other in (False, True):
        m = n + 5 if other else n
        x = features(batch, n, c, dtype, device, lengths=lengths if ragged_ else None)
        others = lengths + 5 if other else lengths
        y = features(batch, m, c, dtype, device, 1, others if ragged_ else None) if other else x
        s = cosine(x, y, normalize)
        value = {
            "elu": torch.where(s > margin, s - margin, alpha * ((s - margin).exp() - 1)),
            "paper": torch.where(s >= margin, s, alpha * ((s - margin).exp() - 1)),
            "sum": s,
        }[kind]
        inside = live(n, lengths)[:, :, None] & live(m, others)[:, None, :]
        if diag:
            inside = inside & ~torch.eye(n, m, dtype=torch.bool)
        expected = (value * inside).sum(2)
        if kind != "sum":
            expected = expected / (others[:, None] - int(diag)).clamp(min=1)
        to = [w.to(device) if ragged_ else None for w in (lengths, others if other else lengths)]
        actual = impl.similarity_sum(
            x,
            y if other else None,
            kind,
            margin,
            alpha,
            normalize,
            diag,
            to[0],
            to[1] if other else None,
        )
        assert actual.dtype == torch.float32
        close(actual, expected, SUM_TOLERANCE[dtype])
        again = impl.similarity_sum(
            x,
            y if other else None,
            kind,
            margin,
            alpha,
            normalize,
            diag,
            to[0],
            to[1] if other else None,
        )
        assert torch.equal(actual, again), "a rerun differs"


def lattice(batch, n, c, dtype, device, seed):
    """Tokens with entries in {-1, 0, 1}: products are exact, ties are common."""
    g = torch.Generator().manual_seed(seed + n + c)
    return torch.randint(-1, 2, (batch, n, c), generator=g).to(dtype).to(device)


def check_count(impl, batch, n, c, dtype, device="cpu"):
    x = lattice(batch, n, c, dtype, device, 3)
    s = cosine(x, x, normalize=False)
    actual = impl.similarity_sum(x, None, "count", 1.0, 1.0, False, True, None, None)
    expected = ((s > 1) & ~torch.eye(n, dtype=torch.bool)).sum(2)
    assert torch.equal(actual.long().cpu(), expected)


def check_match(impl, batch, n, c, dtype, device="cpu", masked=False, ragged_=False):
    """Best matches of random tokens, and of tokens with many ties, which go to the lower index."""
    m = n + 3
    left, right = torch.full((batch,), n), torch.full((batch,), m)
    if ragged_:
        left = ragged(batch, n)
        right = left.flip(0)
    a_ok, b_ok = live(n, left), live(m, right)
    masks = [None, None]
    if masked:
        g = torch.Generator().manual_seed(n)
        masks = [torch.rand(batch, k, generator=g) > 0.3 for k in (n, m)]
        a_ok, b_ok = a_ok & masks[0], b_ok & masks[1]
    inside = a_ok[:, :, None] & b_ok[:, None, :]
    if masked:
        inside = inside & ~torch.eye(n, m, dtype=torch.bool)
    to = [None if w is None else w.to(device) for w in masks]
    to += [left.to(device), right.to(device)] if ragged_ else [None, None]
    for ties in (False, True):
        if ties:
            a, b = (lattice(batch, k, c, dtype, device, k) for k in (n, m))
        else:
            a = features(batch, n, c, dtype, device, lengths=left if ragged_ else None)
            b = features(batch, m, c, dtype, device, 1, right if ragged_ else None)
        s = cosine(a, b, normalize=not ties).masked_fill(~inside, -torch.inf)
        edge, partner = impl.best_match(a, b, not ties, masked, *to)
        assert edge.dtype == torch.float32 and partner.dtype == torch.int64
        best = s.amax(2)
        close(edge, best, SUM_TOLERANCE[dtype])
        assert int(partner.min()) >= 0 and int(partner.max()) < m
        if ties:
            columns = torch.arange(m).expand_as(s)
            first = columns.masked_fill(s < best[..., None], m).amin(2)
            assert torch.equal(partner.cpu(), first.masked_fill(best.isinf(), 0))
        else:
            close(s.gather(2, partner.cpu()[..., None])[..., 0], best, SUM_TOLERANCE[dtype])
        again = impl.best_match(a, b, not ties, masked, *to)
        assert torch.equal(edge, again[0]) and torch.equal(partner, again[1])


def check_attention(
    impl,
    batch,
    tq,
    tk,
    c,
    dtype,
    device="cpu",
    heads=4,
    kv=2,
    causal=False,
    masked=False,
    weighted=False,
):
    """Row LSE and column sums, with the LSE computed and given."""
    q = features(batch, heads * tq, c, dtype, device).view(batch, heads, tq, c)
    k = features(batch, kv * tk, c, dtype, device, 1).view(batch, kv, tk, c)
    g = torch.Generator().manual_seed(tq + tk)
    weights = torch.rand(batch, heads, tq, generator=g) if weighted else None
    query_mask = key_mask = None
    if masked:  # left padding, a hole, and a row with nothing to see; padding holds NaN
        query_mask, key_mask = (torch.rand(batch, t, generator=g) > 0.25 for t in (tq, tk))
        key_mask[-1] = False
        q[~query_mask.to(device)[:, None].expand(-1, heads, -1)] = torch.nan
        k[~key_mask.to(device)[:, None].expand(-1, kv, -1)] = torch.nan
    scale = c**-0.5
    qd, kd = q.double().cpu().nan_to_num(), k.double().cpu().nan_to_num()
    s = qd @ kd.repeat_interleave(heads // kv, 1).transpose(2, 3) * scale
    if causal:
        s = s.masked_fill(torch.arange(tk) > torch.arange(tq)[:, None] + tk - tq, -torch.inf)
    if masked:
        s = s.masked_fill(~key_mask[:, None, None], -torch.inf)
    lse = s.logsumexp(3)
    p = (s - lse.clamp(min=-1e300)[..., None]).exp()
    w = torch.ones(batch, heads, tq).double() if weights is None else weights.double()
    if masked:
        w = w * query_mask[:, None]
    expected = (w[:, :, None] @ p)[:, :, 0]
    to = [None if t is None else t.to(device) for t in (weights, query_mask, key_mask)]
    rows = impl.row_lse(q, k, scale, causal, to[2])
    alive = (
        torch.ones(batch, 1, tq, dtype=torch.bool) if query_mask is None else query_mask[:, None]
    )
    close(rows.cpu().masked_fill(~alive, 0), lse.masked_fill(~alive, 0), SUM_TOLERANCE[dtype])
    for given in (None, lse.float().to(device)):
        args = (q, k, to[0], given, scale, causal, to[1], to[2])
        actual = impl.column_sums(*args)
        close(actual, expected, SUM_TOLERANCE[dtype])
        assert torch.equal(actual, impl.column_sums(*args)), "a rerun differs"


def check_merge(impl, batch, n, c, dtype, device="cpu", sized=True):
    """Groups of every size: empty, one, many, everything dropped, everything in one."""
    x = features(batch, n, c, dtype, device)
    g = torch.Generator().manual_seed(n)
    size = torch.rand(batch, n, generator=g) * 3 + 0.5 if sized else None
    k = n // 2 + 1
    group = torch.randint(-1, k, (batch, n), generator=g)
    group[-1] = torch.where(torch.arange(n) % 3 > 0, 0, -1)
    w = torch.ones(batch, n) if size is None else size
    onehot = (group[:, None] == torch.arange(k)[:, None]).double() * w.double()[:, None]
    new_size = onehot.sum(2)
    expected = onehot @ x.double().cpu() / new_size.clamp(min=1e-12)[..., None]
    args = (x, None if size is None else size.to(device), group.to(device), k)
    merged, sizes = impl.merge(*args)
    assert merged.dtype == dtype and sizes.dtype == torch.float32
    close(merged, expected, MERGE_TOLERANCE[dtype])
    close(sizes, new_size, 1e-6)
    again = impl.merge(*args)
    assert torch.equal(merged, again[0]) and torch.equal(sizes, again[1]), "a rerun differs"


def check_compact(impl, batch, n, c, dtype, device="cpu"):
    """Five aligned tensors of four widths and types: padded, ragged and flat, to the bit."""
    g = torch.Generator().manual_seed(n + c)
    tensors = [
        features(batch, n, c, dtype, device),
        torch.randint(0, 99, (batch, n), generator=g).to(device),
        (torch.rand(batch, n, 3, generator=g) > 0.5).to(device),
        torch.randn(batch, 2 * n, 5, generator=g).to(device)[:, ::2],
        torch.randn(batch, n, 2, 2, generator=g, dtype=torch.float64).to(device),
    ]
    k = max(1, n // 2)
    keep = torch.rand(batch, n, generator=g).argsort(1)[:, :k].sort(1).values
    valid = torch.arange(k) < ragged(batch, k)[:, None]
    own = torch.arange(batch * k).view(batch, k).where(valid, -1)
    flat = (valid.flatten().cumsum(0) - 1).view(batch, k).where(valid, -1)
    rows = torch.arange(batch)[:, None]
    to = [t.to(device) for t in (keep, own, flat)]
    full = impl.compact(tensors, to[0], None, batch * k, False)
    padded = impl.compact(tensors, to[0], to[1], batch * k, False)
    tight = impl.compact(tensors, to[0], to[2], int(valid.sum()), True)
    for x, a, b, t in zip(tensors, full, padded, tight):
        x = x.cpu()[rows, keep]
        assert torch.equal(a.cpu(), x.flatten(0, 1)) and a.dtype == x.dtype
        hidden = x.masked_fill(~valid.view(batch, k, *[1] * (x.dim() - 2)), 0)
        assert torch.equal(b.cpu(), hidden.flatten(0, 1))
        assert torch.equal(t.cpu(), x[valid])
