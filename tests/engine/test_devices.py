# SPDX-License-Identifier: Apache-2.0
"""On a GPU every method keeps the same tokens, and gives the same logits, as on the CPU.

The CPU is checked against the masked oracle; here the kernels, and every index that must follow the
device, are checked against the CPU.
"""

import copy

import mini_anyres
import mini_llava
import pytest
import torch

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.errors import UnsupportedError
from vtc.registry import known_methods

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BUILD = {
    "llava": (mini_llava.build, lambda: mini_llava.prompt(2, pad="left")),
    "next": (
        lambda: mini_anyres.build("next"),
        lambda: mini_anyres.prompt([[mini_anyres.WIDE], [mini_anyres.TALL]], "next", pad="left"),
    ),
}


@pytest.fixture(scope="module", params=BUILD)
def models(request):
    build, prompt = BUILD[request.param]
    cpu = build()
    return cpu, copy.deepcopy(cpu).cuda(), prompt()


def answer(model, method, inputs):
    with torch.no_grad(), vtc.compressing(model, method) as session:
        logits = model(**inputs).logits.cpu()
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False).cpu()
        report = session.report()
        stages = [
            (s.label, s.owner) for i in range(len(report.kept)) for s in report.trace.stages(i)
        ]
        return logits, tokens, report.tokens_per_layer, stages


@pytest.mark.parametrize("name", known_methods())
def test_as_on_the_cpu(models, name):
    cpu, gpu, inputs = models
    try:
        method = seeded(name, 0.5, 0)
    except ValueError:  # takes no budget
        method = seeded(name, None, 0)
    try:
        expected, tokens, layers, stages = answer(cpu, method, inputs)
    except UnsupportedError as error:
        pytest.skip(str(error))
    there = {k: v.cuda() for k, v in inputs.items()}
    logits, said, ran, traced = answer(gpu, method, there)
    assert ran == layers
    for (label, owner), (name, other) in zip(stages, traced, strict=True):
        assert label == name and torch.equal(owner, other)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    assert torch.equal(said, tokens)
