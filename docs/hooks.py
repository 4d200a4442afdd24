# SPDX-License-Identifier: Apache-2.0
"""Pages written from the code: one for each method, from its docstring, and their table."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vtc.benchmarks.shared import columns as tables
from vtc.benchmarks.shared.columns import words
from vtc.benchmarks.shared.markdown import read_block
from vtc.benchmarks.shared.method_table import method_rows
from vtc.method import Method
from vtc.registry import known_methods

ROOT = Path(__file__).resolve().parent.parent
SHARED = {f.name for f in fields(Method)}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    pages = {"methods/index.md": index_page()}
    pages.update({f"methods/{row['name']}.md": method_page(row) for row in method_rows()})
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for file in files:
        if re.fullmatch(r"methods/(?!index).*\.md", file.src_uri):
            file.inclusion = file.inclusion.NOT_IN_NAV  # reached from the table of methods
    return files


WIDE = ("results.md", "speed.md", "models.md", "calling-styles.md")
"""Pages whose tables take the room of the table of contents."""


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Hide the table of contents of wide pages; as front matter it would show where they are read
    as files."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    return markdown


def index_page() -> str:
    """The table of methods, each name a link to its page."""
    columns = [
        words("method", lambda row: f"[`{row['name']}`]({row['name']}.md)"),
        words("acts", "acts"),
        words("needs", "needs"),
        words("what it does", "summary"),
    ]
    lines = ["# Methods", "", tables.markdown(tables.fill(columns, method_rows()))]
    lines += ["", "What `needs` means: " + "; ".join(f"`{k}`: {v}" for k, v in NEEDS.items()) + "."]
    return "\n".join(lines)


NEEDS = {
    "ahead": "LLM layers whose queries and keys can be computed before they run",
    "cls": "a class token in the encoder",
    "frames": "a model that takes videos",
    "ran": "that all tokens entered the layer whose attention or keys are read",
    "sublayers": "the same for inputs and outputs of attention and MLP",
    "text": "the question in a space that patches can be compared in",
}


def method_page(row: dict[str, str]) -> str:
    """Page of a method: summary, parameters, published settings, and the models it runs on."""
    name = row["name"]
    cls = known_methods()[name]
    module = sys.modules[cls.__module__]
    title, _, body = inspect.cleandoc(module.__doc__ or "").partition("\n")
    lines = [f"# {name}", "", title.strip(), ""]
    lines += [f"Acts {row['acts']}; default budget {row['default']} of the visual tokens.", ""]
    if "](" in row["paper"]:
        lines += [f"Paper: {row['paper']}.", ""]
    lines += ["```python", *usage(name, cls), "```", "", markdown(body), ""]
    lines += ["## Parameters", "", "| parameter | default | meaning |", "|---|---|---|"]
    meaning: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        meaning.update(arguments(inspect.cleandoc(base.__doc__ or "")))
    lines += [
        f"| `{f.name}` | `{f.default!r}` | {escaped(meaning.get(f.name, ''))} |"
        for f in fields(cls)
        if f.name not in SHARED
    ]
    lines += ["| `keep_ratio`, `keep_tokens` | `None` | the budget, one of them |"]
    lines += ["| `positions` | `'original'` | of survivors; `'compact'` renumbers them |", ""]
    if cls.presets:
        lines += ["## Published settings", "", f"`{cls.__name__}.paper(model, tokens)`:", ""]
        lines += ["| model | tokens | parameters |", "|---|---:|---|"]
        for (model, tokens), given in cls.presets.items():
            shown = ", ".join(f"{k}={v!r}" for k, v in given.items())
            lines.append(f"| {model} | {tokens} | `{shown}` |")
        lines.append("")
    lines += ["## Measured", "", *measured(name), "", "## Models", "", *models(name)]
    source = Path(inspect.getfile(cls)).resolve().relative_to(ROOT)
    return "\n".join([*lines, "", f"Source: `{source}`."])


def usage(name: str, cls: type[Method]) -> list[str]:
    takes_budget = name != "vidkv" and "routers" not in {f.name for f in fields(cls)}
    budget = "keep_ratio=0.25" if takes_budget else ""
    call = ", ".join(filter(None, ["model", f'"{name}"', budget]))
    made = f"{cls.__name__}({budget})"
    imported = f"from {cls.__module__} import {cls.__name__}"
    return [f"vtc.wrap({call})", "", imported, "", f"vtc.wrap(model, {made})  # the same"]


def markdown(text: str) -> str:
    """Docstring text as Markdown: its formulas are indented already and become code blocks."""
    text = re.sub(r"([^\n])\n(    \S)", r"\1\n\n\2", text.strip("\n"))  # after an empty line
    return re.sub(r"^(?!    )(.*)$", lambda m: escaped(m.group(1)), text, flags=re.M)


def arguments(text: str) -> dict[str, str]:
    """Name -> meaning, of the Args of a docstring."""
    sections = griffe.Docstring(text).parse("google", warnings=False)
    given = next((s for s in sections if s.kind is griffe.DocstringSectionKind.parameters), None)
    return {
        name.strip(): p.description.replace("\n", " ")
        for p in (given.value if given else [])
        for name in p.name.split(",")  # several may share a line
    }


def escaped(line: str) -> str:
    """Text outside backticks with its [, ], *, _, < and | taken literally."""
    parts = line.replace("``", "`").split("`")
    parts[::2] = [re.sub(r"([\[\]*_<|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def measured(name: str) -> list[str]:
    """The method's row of the result table."""
    text = read_block(ROOT / "docs/results.md", "results")
    table = [line for line in text.splitlines() if line.startswith("|")]
    row = [x for x in table if re.match(rf"\| {re.escape(name)}[ (]", x)]
    if not row:
        return ["Not in the tables yet."]
    head = ["Accuracy on the embedded models, in %; see [Results](../results.md).", ""]
    return [*head, *table[:3], *row]


def models(name: str) -> list[str]:
    """The method's cells of the support matrix, and the reasons they name."""
    lines = read_block(ROOT / "docs/models.md", "support").splitlines()
    out: list[str] = []
    used: set[str] = set()
    for i, line in enumerate(lines):
        if line.startswith("| ") and lines[i + 1].startswith("|---"):
            heads = [c.strip().replace("<br>", ", ") for c in line.strip("|").split("|")]
        elif line.startswith(f"| `{name}`"):
            cells = [c.strip() for c in line.strip("|").split("|")]
            out += [f"* {heads[0]}, {h}: {c}" for h, c in zip(heads[1:], cells[1:], strict=True)]
            used |= {n for cell in cells[1:] for n in re.findall(r"^\d+", cell)}
    reasons = [x for x in lines if re.match(r"\d+\. ", x) and x.split(".")[0] in used]
    return [*out, "", *(f"({x.split('.')[0]}) {x.split('. ', 1)[1]}  " for x in reasons)]
