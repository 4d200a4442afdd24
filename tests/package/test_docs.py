# SPDX-License-Identifier: Apache-2.0
"""README and docs/ say what the code does."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

import vtc
from vtc.adapters import locate as adapters
from vtc.benchmarks.pages import front
from vtc.benchmarks.shared.markdown import fill_block, read_block
from vtc.benchmarks.shared.method_table import method_rows, method_table
from vtc.benchmarks.support import mini_families
from vtc.benchmarks.support.masked_oracle import compare, logits_and_steps
from vtc.benchmarks.support.mini_models import mini_llava
from vtc.benchmarks.support.tables import support_matrix
from vtc.registry import _REGISTRY

ROOT = Path(__file__).resolve().parents[2]
REFRESH = "run: python -m vtc.benchmarks.support.tables"


def test_method_table_is_that_of_the_registry():
    assert read_block(ROOT / "README.md", "methods") == method_table(), REFRESH


@pytest.mark.slow
def test_support_matrix_is_what_runs():
    pytest.importorskip("timm")
    pytest.importorskip("open_clip")
    assert read_block(ROOT / "docs/models.md", "support") == support_matrix(), REFRESH


def python_of(page: str) -> list[str]:
    """The blocks of Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


# ---- the front page ------------------------------------------------------------------------------


def test_the_front_page_fits_in_190_lines():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 190, "shorten the prose"


def test_the_numbers_of_the_front_page_are_those_of_the_result_files():
    assert read_block(ROOT / "README.md", "numbers") == front.numbers(ROOT)
    table = read_block(ROOT / "README.md", "front")
    assert table == front.table(ROOT)
    assert len(table.splitlines()) <= 2 + 10
    text = (ROOT / "README.md").read_text("utf-8")
    scenes, sweep = front.read("scenes", ROOT), front.read("speed-sweep-h100", ROOT)
    at = {(r["method"], r["asked_tokens"]): r for r in scenes["rows"]}
    for name in ("vscan", "random"):
        assert f"{100 * at[name, 64]['accuracy']:.1f} %" in text, name
    assert f"{at['vscan', 64]['average_tokens']:.0f} on average over the layers" in text
    assert f"{100 * at['prefixkv', 64]['accuracy']:.1f} %" in text
    (part,) = (
        part
        for part in sweep["parts"]
        if (part["shape"], part["batch"], part["text_tokens"]) == ("seven-billion", 1, 64)
    )
    (row,) = (row for row in part["rows"] if row["method"].startswith("fastv("))
    assert f"{row['ttft_speedup']:.2f}x as fast there" in text


def qwen(folder: Path, words: str) -> Path:
    """A small random Qwen2.5-VL with its processor and chat template, as a checkpoint on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {mini_families.PAD: "<pad>", 1: "<s>", 2: "</s>", 5: "<unk>"}
    names |= {mini_families.IMAGE: "<|image_pad|>", mini_families.VIDEO: "<|video_pad|>"}
    names |= {mini_families.BREAK: "<|vision_start|>", mini_families.END: "<|vision_end|>"}
    free = (i for i in range(60) if i not in names)
    names |= {i: word for word, i in zip(dict.fromkeys(words.split()), free)}
    inner = Tokenizer(models.WordLevel({w: i for i, w in names.items()}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[w for w in names.values() if w.startswith("<|")],
    )
    shape = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"min_pixels": 64, "max_pixels": 64 * 40}
    template = (
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ p['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**shape, **pixels),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**shape),
        chat_template=template,
    )
    mini_families.build("Qwen2.5-VL").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("where", ["embedded", "Qwen2.5-VL"])
def test_the_example_of_the_readme_runs(where, tmp_path, capsys):
    """As it stands on the embedded model, and in the same words on a Qwen2.5-VL."""
    example, *_ = python_of("README.md")
    assert 8 <= sum(map(bool, example.splitlines())) <= 16
    if where != "embedded":
        folder = qwen(tmp_path, "which digit does the cross show?")
        example, count = re.subn(r"(?m)^path = .*$", f"path = {str(folder)!r}", example)
        assert count == 1
    exec(compile(example, "README.md", "exec", dont_inherit=True), names := {"__name__": "example"})
    said = capsys.readouterr().out
    model = names["model"]
    assert not hasattr(model, "vtc")
    kept = re.search(r"visual tokens +(\d+) -> (\d+) at the end", said)
    assert kept is not None, said
    if where == "embedded":
        assert kept.groups() == ("576", "144")
        assert "which digit does the cross show ? assistant : 8\n" in said
    else:
        assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
        assert 0 < int(kept[2]) == int(kept[1]) // 4


def test_the_drawings_are_those_of_the_code():
    """And the page has its pictures, all of a size that a browser loads at once."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs/pictures/make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    for name, draw in make.DRAWN.items():
        drawn = (ROOT / "docs/pictures" / name).read_text("utf-8")
        assert drawn == draw(), f"run: python docs/pictures/make.py {name}"
    for name in make.names():
        assert (ROOT / "docs/pictures" / name).stat().st_size < 300_000, name
    used = re.findall(r"\]\(docs/pictures/([\w.]+)\)", (ROOT / "README.md").read_text("utf-8"))
    assert used and set(used) <= set(make.names())


def test_the_page_of_the_package_stands_alone():
    """A package index has neither our pictures nor our files: nothing points at them."""
    spec = importlib.util.spec_from_file_location("setup_of_vtc", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    page = setup.page()
    assert "![" not in page and "<!--" not in page
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links and all(link.startswith(("https://arxiv.org/", "#")) for link in links)
    assert python_of("README.md")[0] in page
    assert "limits (`docs/limits.md`)" in page


def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cff["version"] == vtc.__version__
    assert f"version = {{{vtc.__version__}}}" in (ROOT / "README.md").read_text("utf-8")


# ---- extending -----------------------------------------------------------------------------------


def test_the_worked_example_of_a_method_is_one(monkeypatch):
    example, *_ = python_of("docs/extending.md")
    monkeypatch.setattr("vtc.registry._REGISTRY", registry := dict(_REGISTRY))
    namespace = {"__name__": "example"}
    exec(compile(example, "docs/extending.md", "exec", dont_inherit=True), namespace)
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


def test_the_worked_example_of_an_adapter_is_one(monkeypatch):
    """The code alone, as a new file, makes stages available that the generic adapter has not."""
    _, example, line = python_of("docs/extending.md")
    without = tuple(n for n in adapters.LANGUAGE_MODELS if n != "aya_vision")
    monkeypatch.setattr(adapters, "LANGUAGE_MODELS", without)
    monkeypatch.setattr(mini_families, "FAMILIES", {})
    exec(compile(line, "docs/extending.md", "exec", dont_inherit=True), vars(mini_families))
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
    exec(compile(example, "docs/extending.md", "exec", dont_inherit=True), vars(ours))
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
    """Adapters of LLMs are as short as docs/extending.md promises: more belongs into the engine."""
    for name in adapters.LANGUAGE_MODELS:
        lines = (ROOT / f"adapters/{name}.py").read_text("utf-8").splitlines()
        assert len(lines) <= 170, name


FOLDERS = "vtc|adapters|benchmarks|demos|docs|kernels|tests|\\.github"
PAGES = ["README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page):
    """Paths in backticks from the root, and links to files."""
    text = (ROOT / page).read_text("utf-8")
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text)
    named += [
        str(Path(page).parent / link)
        for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
        if "methods/" not in link  # pages that `make docs` writes
    ]
    assert not [path for path in named if not (ROOT / path).exists()]


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
    first, more = python_of("docs/index.md")
    assert first == python_of("README.md")[0]
    exec(compile(first, "docs/index.md", "exec", dont_inherit=True), names := {"__name__": "a"})
    assert "576 -> 144" in capsys.readouterr().out
    names["model"].float()  # fp16 is slow on CPUs
    exec(compile(more, "docs/index.md", "exec", dont_inherit=True), names)
    assert names["prepared"]["input_ids"].shape[1] < names["inputs"]["input_ids"].shape[1]


def test_every_method_has_a_page_from_its_docstring():
    """Pages that `make docs` builds; here without a site, as text."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    table = hooks.index_page()
    for row in method_rows():
        page = hooks.method_page(row)
        assert f"[`{row['name']}`]({row['name']}.md)" in table
        assert page.startswith(f"# {row['name']}\n")
        for field in dataclasses.fields(vtc.registry.known_methods()[row["name"]]):
            assert f"`{field.name}`" in page
        for line in page.splitlines():
            if line.startswith("| `") and line.count(" | ") == 2:
                assert not line.endswith("|  |"), f"{row['name']}: no meaning in {line}"
