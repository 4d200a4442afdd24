# SPDX-License-Identifier: Apache-2.0
"""`transprune` by itself."""

from __future__ import annotations

import mini_llava as mini
import pytest
import torch
from golden_files import cases, load

import vtc
from vtc.methods.transprune import TransPrune, share_of, transition


@pytest.mark.parametrize("path", cases("transprune_ttv_*.npz", 2))
def test_transition_is_the_published_one(path):
    golden = load(path)
    mine = transition(golden["before"], golden["after"])
    torch.testing.assert_close(mine, golden["weight"], rtol=0, atol=1e-5)
    for row in range(len(mine)):  # each row is a call of its own
        alone = transition(golden["before"][row : row + 1], golden["after"][row : row + 1])
        torch.testing.assert_close(alone[0], golden["weight"][row], rtol=0, atol=1e-5)
    # Padding in front and behind changes nothing.
    n = golden["before"].shape[1]
    padded = [
        torch.nn.functional.pad(golden[x], (0, 0, 3, 5), value=7.0) for x in ("before", "after")
    ]
    valid = torch.zeros(len(mine), n + 8, dtype=torch.bool)
    valid[:, 3 : 3 + n] = True
    out = transition(*padded, valid)
    torch.testing.assert_close(out[:, 3 : 3 + n], golden["weight"], rtol=0, atol=1e-5)
    assert (out[~valid] == 0).all()


def plane(magnitude, cos):
    """Inputs along x and outputs of the given magnitude and cosine, (1, T, 2) each."""
    m, c = torch.tensor(magnitude), torch.tensor(cos)
    before = 3 * torch.stack([torch.ones_like(c), torch.zeros_like(c)], -1)
    after = 3 * m[:, None] * torch.stack([c, (1 - c * c).sqrt()], -1)
    return before[None], after[None]


def test_transition_by_hand():
    before, after = plane([0.5, 1.0, 0.8], [0.1, -0.2, 0.6])
    for direction, expected in (
        ("code", [0.1691, 0.4566, 0.1641]),
        ("abs", [0.1991, 0.3603, 0.1932]),
    ):
        out = transition(before, after, direction=direction)[0]
        torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=5e-5)
        small = transition(before / 1000, after / 1000, direction=direction)[0]
        torch.testing.assert_close(small, out)  # a ratio: the scale of the features is no matter
    flip = plane([1.0, 1.0], [-0.6, 0.3])
    assert transition(*flip).argmax() == 0
    assert transition(*flip, direction="abs").argmax() == 1
    ratio = transition(*flip, direction="code")[0]
    assert (ratio[0] / ratio[1]).log().item() == pytest.approx(1.6 - 0.7, abs=1e-5)


def test_transition_of_zero_vectors_is_finite():
    zero = torch.zeros(1, 4, 8)
    assert transition(zero, zero).eq(0).all()
    assert transition(zero, torch.ones(1, 4, 8)).isfinite().all()


def test_share_of_ignores_what_is_no_token():
    x = torch.tensor([[1.0, 3.0, 9.0]])
    valid = torch.tensor([[True, True, False]])
    torch.testing.assert_close(share_of(x, valid), torch.tensor([[0.25, 0.75, 0.0]]))
    assert share_of(torch.zeros(1, 3), None).eq(0).all()


def test_abs_direction_changes_the_choice():
    """The variants above would not notice if the flag did nothing."""
    kept = []
    for direction in ("code", "abs"):
        model = mini.build(seed=1)
        vtc.wrap(model, TransPrune(keep_tokens=6, alpha=1.0, direction=direction))
        with torch.no_grad():
            model(**mini.prompt(1, batch=4, seed=1))
        kept.append([k.tolist() for k in model.vtc.report().kept])
    assert kept[0] != kept[1]
