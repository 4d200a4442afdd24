# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page that loads nothing, and as Markdown.

Every string that comes from a file is escaped: by Jinja2 in the page, by `escaped` in Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..shared.columns import Table, fill, words
from ..shared.columns import markdown as in_markdown
from .parts import Section
from .read import read, sections

TEMPLATE = """{% macro rendered(table, linked=false) %}
<div class="scroll"><table><thead><tr>{% for column in table.columns %}
<th scope="col"{% if column.align == "left" %} class="words"{% endif %}>
<button type="button">{{ column.title }}</button></th>{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}{% set line = loop.index0 %}
<tr{% if line in table.strong %} class="strong"{% endif %}>
{% for cell in row %}{% if linked and loop.first %}
<td><a href="#s{{ line }}">{{ cell.text }}</a></td>
{%- else %}<td{% if cell.value is not none %} data-v="{{ cell.value }}"{% endif %}
{%- if table.columns[loop.index0].align == "left" %}
 class="{{ "words long" if cell.text | length > 60 else "words" }}"
{%- endif %}>{{ cell.text }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vtc report</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2a6fb0; }
@media (prefers-color-scheme: dark) { :root { --accent: #7db8ee; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem;
  color: CanvasText; background: Canvas; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
a { color: var(--accent); }
.soft { opacity: .7; font-size: .9rem; margin: 0; }
.scroll { overflow-x: auto; max-height: 40rem; border: 1px solid var(--line);
  border-radius: .4rem; }
table { border-collapse: collapse; font-size: .85rem; width: 100%;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
.words { text-align: left; }
td.long { white-space: normal; min-width: 16rem; }
th { position: sticky; top: 0; background: Canvas; vertical-align: bottom; z-index: 1;
  box-shadow: 0 1px var(--line); white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
th:first-child { z-index: 2; }
tbody tr:nth-child(even) td { background: color-mix(in srgb, CanvasText 4%, Canvas); }
tbody tr.strong td { font-weight: 600; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: .5rem 0; flex: 0 1 36rem; min-width: 0; }
figure.wide { flex-basis: 100%; max-width: 100%; overflow-x: auto; }
figure.wide img { min-width: 40rem; max-width: 60rem; }
figure svg, figure img { width: 100%; height: auto; display: block; }
figure svg { fill: currentColor; }
figcaption { font-size: .85rem; opacity: .8; }
ul { padding-left: 1.2rem; margin: .5rem 0; font-size: .9rem; }
details { margin: .75rem 0; font-size: .9rem; }
summary { cursor: pointer; color: var(--accent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; }
dt { opacity: .7; } dd { margin: 0; }
code { font-size: .85em; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  th, td { padding: .2rem .4rem; } }
@media print { .scroll { max-height: none; overflow: visible; } }
</style>
</head>
<body>
<h1>vtc report</h1>
<p class="soft">{{ sections | length }} result files. Accuracy of a method is that of the compressed
model; intervals are of 95 %. Click a heading to sort.</p>
{{ rendered(overview, linked=true) }}
{%- if refused %}<h3>Not read</h3><ul>{% for where, why in refused %}
<li><code>{{ where }}</code>: {{ why }}</li>{% endfor %}</ul>{% endif %}
{% for section in sections %}
<section id="s{{ loop.index0 }}">
<h2>{{ section.title }}</h2>
<p class="soft"><code>{{ section.source }}</code></p>
<details><summary>Command and environment</summary><dl>{% for name, text in section.facts %}
<dt>{{ name }}</dt><dd>{% if name == "command" %}<code>{{ text }}</code>{% else %}{{ text }}
{%- endif %}</dd>{% endfor %}</dl></details>
{% if section.figures %}<div class="figures">{% for figure in section.figures %}
<figure{% if figure.picture %} class="wide"{% endif %}>
{% if figure.picture %}<img alt="{{ figure.title }}" src="{{ figure.picture }}">
{% else %}{{ figure.svg | safe }}{% endif %}
<figcaption>{{ figure.title }}</figcaption></figure>{% endfor %}</div>{% endif %}
{% if section.notes %}<ul>{% for note in section.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% endif %}
{% for table in section.tables %}
<h3>{{ table.title }}</h3>
{{ rendered(table) }}{% endfor %}
</section>
{% endfor %}
<script>
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const th = button.parentElement, body = th.closest("table").tBodies[0];
  const up = th.getAttribute("aria-sort") !== "ascending";
  const key = row => {
    const cell = row.cells[th.cellIndex];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  const less = (a, b) => typeof a === "number" && typeof b === "number"
    ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  const empty = row => row.cells[th.cellIndex].textContent === "";
  const rows = [...body.rows].sort((a, b) =>
    empty(a) - empty(b) || (up ? 1 : -1) * less(key(a), key(b)));
  body.append(...rows);
  for (const other of th.parentElement.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
}));
</script>
</body>
</html>
"""


def overview(found: Sequence[Section]) -> Table:
    """The table at the top: a line for each section."""
    rows = [{"result": section.title, **section.brief} for section in found]
    names = dict.fromkeys(name for row in rows for name in row)
    return fill([words(name, name) for name in names], rows)


def html(found: Sequence[Section], refused: Sequence[tuple[str, str]] = ()) -> str:
    """One page that loads nothing from anywhere."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    return page.render(sections=found, refused=refused, overview=overview(found))


def escaped(text: str) -> str:
    """Text as Markdown that means nothing but itself, in a table too."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\\\`*_{}\[\]|~#!])", r"\\\1", text)


def markdown(found: Sequence[Section], refused: Sequence[tuple[str, str]] = ()) -> str:
    """The same without figures."""
    lines = ["# vtc report", "", in_markdown(overview(found), escaped), ""]
    lines += [f"* not read: {escaped(where)}: {escaped(why)}" for where, why in refused]
    for section in found:
        lines += ["", f"## {escaped(section.title)}", ""]
        lines += [f"* {escaped(name)}: {escaped(text)}" for name, text in section.facts]
        lines += [f"* {escaped(note)}" for note in section.notes]
        for table in section.tables:
            lines += ["", f"### {escaped(table.title)}", "", in_markdown(table, escaped)]
    return "\n".join(lines) + "\n"


def write(paths: Sequence[Path], folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Write ``report.html`` and ``report.md`` from result files and folders of them.

    Returns:
        What was written, and the files that are no results, each with the reason.

    Raises:
        ValueError: there is no result.
    """
    results, refused = read(paths)
    found = sections(results)
    folder.mkdir(parents=True, exist_ok=True)
    out = [folder / "report.html", folder / "report.md"]
    out[0].write_text(html(found, refused), "utf-8")
    out[1].write_text(markdown(found, refused), "utf-8")
    return out, refused
