# SPDX-License-Identifier: Apache-2.0
"""README and CONTRIBUTING say what the code does."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vtc
from vtc.adapters import locate as adapters
from vtc.benchmarks import mini_families
from vtc.benchmarks.catalogue import (
    fill_block,
    method_rows,
    method_table,
    read_block,
    support_matrix,
)
from vtc.benchmarks.mini import mini_llava
from vtc.benchmarks.oracle import compare, logits_and_steps
from vtc.method import _REGISTRY

ROOT = Path(__file__).resolve().parent.parent
REFRESH = "run: python -m vtc.benchmarks.catalogue"


def test_method_table_is_that_of_the_registry():
    assert read_block(ROOT / "README.md", "methods") == method_table(), REFRESH


@pytest.mark.slow
def test_support_matrix_is_what_runs():
    pytest.importorskip("timm")
    pytest.importorskip("open_clip")
    assert read_block(ROOT / "README.md", "support") == support_matrix(), REFRESH


def examples() -> list[str]:
    """Python code of CONTRIBUTING: a method, an adapter, and its line in the tests."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_worked_example_of_contributing_is_a_method(monkeypatch):
    example, *_ = examples()
    monkeypatch.setattr("vtc.method._REGISTRY", registry := dict(_REGISTRY))
    namespace = {"__name__": "example"}
    exec(compile(example, "CONTRIBUTING.md", "exec", dont_inherit=True), namespace)
    assert "largest-norm" in registry

    model = mini_llava()
    inputs = {
        "input_ids": torch.tensor([[1, *[3] * 16, 5, 6, 7]]),
        "pixel_values": torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)),
    }
    with vtc.compressing(model, "largest-norm", keep_tokens=5) as session, torch.no_grad():
        encoded = model.get_image_features(pixel_values=inputs["pixel_values"])
        model(**inputs)
        report = session.report()
    assert report.final_tokens == 5
    norms = encoded.hidden_states[-2][0, 1:].norm(dim=-1)
    assert report.kept[0].tolist() == sorted(norms.topk(5).indices.tolist())


def test_the_worked_example_of_contributing_is_an_adapter(monkeypatch):
    """The code alone, as a new file, makes stages available that the generic adapter has not."""
    _, example, line = examples()
    without = tuple(n for n in adapters.LANGUAGE_MODELS if n != "aya_vision")
    monkeypatch.setattr(adapters, "LANGUAGE_MODELS", without)
    monkeypatch.setattr(mini_families, "FAMILIES", {})
    exec(compile(line, "CONTRIBUTING.md", "exec", dont_inherit=True), vars(mini_families))
    family = mini_families.FAMILIES["Aya Vision"]
    monkeypatch.setattr(mini_families, "EVERY", {"ours": family})
    model = mini_families.build("ours")
    inputs = mini_families.prompt("ours", [[2], [1]], pad="left")
    with torch.no_grad():
        stock = model(**inputs).logits
    with pytest.raises(vtc.UnsupportedError, match="one to one"):
        vtc.wrap(model, "divprune", keep_tokens=5)

    ours = ModuleType("vtc.adapters.ours")
    ours.__package__ = "vtc.adapters"
    exec(compile(example, "CONTRIBUTING.md", "exec", dont_inherit=True), vars(ours))
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    monkeypatch.setattr(adapters, "LANGUAGE_MODELS", ("ours", *without))
    vtc.wrap(model, "divprune", keep_tokens=5)

    def run():
        with torch.no_grad():
            return logits_and_steps(model, inputs, 3)

    (got, steps, _lengths), (want, want_steps, _), alive = compare(model, run)
    seen = alive[0] & inputs["attention_mask"].bool()
    torch.testing.assert_close(got[seen], want[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    assert (got[seen] - stock[seen]).abs().max() > 1e-3
    assert (alive[0] & (inputs["input_ids"] == 3)).sum(1).tolist() == [10, 5]
    assert example == (ROOT / "adapters/aya_vision.py").read_text("utf-8")


def test_adapters_are_short():
    """What CONTRIBUTING promises of a family of LLMs: what takes more belongs into the engine."""
    for name in adapters.LANGUAGE_MODELS:
        lines = (ROOT / f"adapters/{name}.py").read_text("utf-8").splitlines()
        assert len(lines) <= 170, name


def test_contributing_and_readme_name_files_that_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text("utf-8")
        for path in re.findall(r"`((?:vtc|adapters|benchmarks|tests)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{name} names {path}"


def test_blocks_can_be_filled_again_and_again(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("top\n<!-- x:begin (how) -->\nold\n<!-- x:end -->\nbottom\n")
    for text in ("one\n\n| a |", r"two \1 {3}"):
        fill_block(file, "x", text)
        assert read_block(file, "x") == text
    assert file.read_text().startswith("top\n<!-- x:begin (how) -->\n")
    assert file.read_text().endswith("\n<!-- x:end -->\nbottom\n")
    with pytest.raises(ValueError, match="no block"):
        fill_block(file, "y", "")


def test_the_quick_start_of_the_docs_runs(capsys):
    first, *_ = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL
    )
    exec(compile(first, "docs/index.md", "exec", dont_inherit=True), {"__name__": "example"})
    assert "128" in capsys.readouterr().out


def test_every_method_has_a_page_from_its_docstring():
    """What `make docs` builds; here without a site, as text."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    table = hooks.index_page()
    for row in method_rows():
        page = hooks.method_page(row)
        assert f"[`{row['name']}`]({row['name']}.md)" in table
        assert page.startswith(f"# {row['name']}\n")
        for field in dataclasses.fields(vtc.method.known_methods()[row["name"]]):
            assert f"`{field.name}`" in page
        for line in page.splitlines():
            if line.startswith("| `") and line.count(" | ") == 2:
                assert not line.endswith("|  |"), f"{row['name']}: no meaning in {line}"
