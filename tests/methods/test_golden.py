# SPDX-License-Identifier: Apache-2.0
"""Reference outputs of the published implementations, and worked examples of the papers.

The files lie in tests/golden. VTC_GOLDEN=FOLDER points the tests at another set of files with the
same names; a set that is not complete fails.
"""

from __future__ import annotations

import math

import pytest
import torch
from golden_files import cases, load

from vtc.kernels.similarity_reduce import energy as energies
from vtc.methods._common import greedy_order
from vtc.methods._matching import match_parity
from vtc.methods.pitome import match_energy
from vtc.reduction import Reduction


def check_merge(golden, into, removed):
    """The groups are the golden ones; merging gives the golden values and sizes."""
    prefix, (batch, n) = int(golden["class_token"]), into.shape
    reduction = Reduction.from_merge(into, n - removed)
    slots = torch.arange(reduction.count)[None, :, None]
    mine = (reduction.group[:, None, :] == slots).double()
    theirs = golden["source"].double()
    # Both orders of the slots, aligned by what the groups hold: row of mine -> row of theirs.
    same = (mine[:, :, None] == theirs[:, None]).all(-1)
    assert (same.sum(1) == 1).all()
    assert (same.sum(2) == 1).all()
    place = same.long().argmax(2)

    def aligned(x):
        return x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))

    if prefix:
        assert (reduction.group[:, 0] == 0).all()
        assert (into == 0).sum() == batch
    x, size = golden["x"], golden["size"][..., 0]
    merged, sizes = reduction.merge(x, size)
    torch.testing.assert_close(merged, aligned(golden["merged_wavg"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(sizes, aligned(golden["merged_size"])[..., 0], rtol=0, atol=0)
    if "merged_mean" in golden:
        plain, _ = reduction.merge(x)
        torch.testing.assert_close(plain, aligned(golden["merged_mean"]), rtol=0, atol=1e-5)


def pitome(golden, protect):
    prefix = int(golden["class_token"])
    x = golden["metric"][:, prefix:]
    batch, n, _ = x.shape
    energy = energies(x, golden["margin"], golden.get("alpha", 1.0))
    if "energy" in golden:
        torch.testing.assert_close(energy, golden["energy"], rtol=0, atol=1e-5)
    r = math.floor(n - n * golden["ratio"])
    into = match_energy(x, energy, r, protect) + prefix
    check_merge(golden, torch.cat([torch.zeros(batch, prefix, dtype=torch.int64), into], 1), r)


@pytest.mark.parametrize("path", cases("pitome_[0-9]*.npz", 18))
def test_pitome(path):
    pitome(load(path), protect=True)


@pytest.mark.parametrize("path", cases("pitome_bsm_*.npz", 18))
def test_pitome_bsm(path):
    pitome(load(path), protect=False)


@pytest.mark.parametrize("path", cases("tome_*.npz", 18))
def test_tome(path):
    golden = load(path)
    into = match_parity(golden["metric"], golden["r"], int(golden["class_token"]))
    check_merge(golden, into, golden["r"])


@pytest.mark.parametrize("path", cases("divprune_*.npz", 2))
def test_divprune(path):
    golden = load(path)
    x = golden["x"][None]
    k = round(golden["ratio"] * x.shape[1])
    assert greedy_order(x, k)[0].tolist() == golden["kept_in_order"].tolist()


# ---- worked examples: eight unit vectors in the plane ------------------------------------------

ANGLES = torch.tensor([0.0, 10, 25, 90, 100, 180, 205, 300]).deg2rad()
V8 = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)[None]

ENERGY = {
    "paper": [0.0287, 0.0424, 0.0554, -0.1046, -0.1254, -0.2413, -0.2719, -0.3053],
    "elu": [-0.1963, -0.1826, -0.1696, -0.2546, -0.2754, -0.3913, -0.4219, -0.3803],
}
ORDER = {"paper": [2, 1, 0, 3, 4, 5, 6, 7], "elu": [2, 1, 0, 3, 4, 7, 5, 6]}


@pytest.mark.parametrize("kind", ["paper", "elu"])
def test_v8_energies(kind):
    energy = energies(V8, 0.6, 1.0, kind)[0]
    torch.testing.assert_close(energy, torch.tensor(ENERGY[kind]), rtol=0, atol=5e-5)
    assert energy.argsort(descending=True).tolist() == ORDER[kind]


def test_v8_pitome_merge():
    into = match_energy(V8, energies(V8, 0.6), 2)
    assert into[0].tolist() == [1, 1, 1, 3, 4, 5, 6, 7]
    reduction = Reduction.from_merge(into)
    merged, size = reduction.merge(torch.arange(8.0)[None, :, None])
    assert reduction.keep[0].tolist() == [1, 3, 4, 5, 6, 7]
    assert merged[0, :, 0].tolist() == [1, 3, 4, 5, 6, 7]
    assert size[0].tolist() == [3, 1, 1, 1, 1, 1]


def test_v8_tome():
    assert match_parity(V8, 4, 0)[0].tolist() == [1, 1, 1, 3, 3, 5, 5, 7]  # every proposal
    assert match_parity(V8, 2, 0)[0].tolist() == [1, 1, 2, 3, 3, 5, 6, 7]


def test_v8_divprune():
    assert greedy_order(V8, 4)[0].tolist() == [7, 4, 6, 2]
