"""Self-contained HTML reports: one file, images inside, readable on a telephone and on paper."""

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: #fff; color: #1a202c;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: .2rem 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .5rem; padding-top: .8rem; border-top: 1px solid #e2e8f0; }
p, li, figcaption { max-width: 46rem; }
.question { font-style: italic; color: #2d3748; }
.lead { font-size: 1.1rem; color: #2d3748; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.numbers div { border: 1px solid #e2e8f0; border-radius: .5rem; padding: .6rem .8rem; }
.numbers strong { display: block; font-size: 1.35rem; line-height: 1.3; }
.numbers span { color: #4a5568; font-size: .85rem; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: #4a5568; font-size: .9rem; margin-top: .3rem; }
.scroll { overflow-x: auto; }
table.sortable { width: 100%; }
table.sortable th, table.sortable td { text-align: left; white-space: normal; vertical-align: top; padding-left: 0; }
table.sortable th button { all: unset; cursor: pointer; font-weight: 600; white-space: nowrap; }
table.sortable th button:focus-visible { outline: 2px solid #0b6e99; }
table.sortable th button::after { content: " ↕"; color: #a0aec0; }
table.sortable th[aria-sort=ascending] button::after { content: " ↑"; color: #0b6e99; }
table.sortable th[aria-sort=descending] button::after { content: " ↓"; color: #0b6e99; }
table.sortable .entry { display: block; min-width: 11.5rem; } table.sortable .entry span { color: #4a5568; }
.yes, .no, .unknown { font-weight: 600; white-space: nowrap; }
.yes { color: #0f7b6c; } .no { color: #b42318; } .unknown { color: #64748b; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin-left: 1.2rem; max-width: 46rem; }
pre { background: #f1f5f9; border-radius: .4rem; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre code { background: none; padding: 0; }
@media (max-width: 640px) {
  table.sortable thead tr { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
  table.sortable thead th { border: 0; padding: .1rem 0; }
  table.sortable tbody tr { display: block; border: 1px solid #e2e8f0; border-radius: .5rem; padding: .5rem .7rem;
    margin: .6rem 0; }
  table.sortable tbody td { display: block; border: 0; padding: .15rem 0; }
  table.sortable tbody td::before { content: attr(data-label) " "; color: #64748b; font-size: .8rem; display: block; }
}
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #edf2f7; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid #cbd5e0; }
code { background: #f1f5f9; border-radius: .2rem; padding: .1rem .3rem; font-size: .88em; overflow-wrap: anywhere; }
details { margin: .8rem 0; } summary { cursor: pointer; }
footer { margin-top: 3rem; color: #4a5568; font-size: .85rem; }
@media print {
  body { max-width: none; font-size: 11pt; } figure, table:not(.sortable), tr { break-inside: avoid; }
  .scroll { overflow: visible; } .scroll table { font-size: .7rem; } th button::after { content: "" !important; }
}
"""

# Sorts by what a cell's data-sort says, numbers as numbers; a second click turns the order round.
_SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = row => row.cells[column].dataset.sort;
    const compare = (a, b) => {
      const x = Number(key(a) || NaN), y = Number(key(b) || NaN);  // what is empty stays below
      if (isNaN(x) && isNaN(y)) return order * key(a).localeCompare(key(b));
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : order * (x - y);
    };
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
    body.append(...[...body.rows].sort(compare));
  }));
});
"""


def number(value: Any) -> str:
    """A value as a table shows it: four decimals for numbers near one, a dash for none.

    Example:
        >>> number(0.92345), number(None), number(300), number(1e-7), number("exact")
        ('0.9234', '–', '300', '1e-07', 'exact')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return str(value)


def inline(text: str) -> str:
    """Plain `text` as HTML; `backquotes` mark code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `text` is plain, `backquotes` mark code."""
    body = inline(text)
    return f'<p class="{kind}">{body}</p>' if kind else f"<p>{body}</p>"


def numbers(entries: Iterable[tuple[str, str]]) -> str:
    """The few figures that matter, each with what it is."""
    cells = "".join(f"<div><strong>{html.escape(v)}</strong><span>{html.escape(n)}</span></div>" for v, n in entries)
    return f'<div class="numbers">{cells}</div>'


def png(drawing: Any) -> bytes:
    """A matplotlib Figure as a PNG file."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _embedded(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def figure(draw: Callable[..., Any], caption: str) -> str:
    """What `draw(tall=False)` draws, embedded, and what `draw(tall=True)` draws for narrow screens."""
    return picture(png(draw(tall=False)), png(draw(tall=True)), caption)


def picture(wide: bytes, narrow: bytes, caption: str) -> str:
    """Two PNG files of one figure, embedded: for wide screens and paper, and for narrow screens."""
    text = html.escape(caption)
    return (
        f'<figure><picture><source media="(max-width: 640px)" srcset="{_embedded(narrow)}">'
        f'<img src="{_embedded(wide)}" alt="{text}"></picture><figcaption>{text}</figcaption></figure>'
    )


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows of dictionaries; `columns` maps keys to headings."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns.values())
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(number(row.get(key)))}</td>" for key in columns) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def sortable(headings: Sequence[str], rows: Iterable[Sequence[tuple[str, Any]]]) -> str:
    """A table that sorts by the column whose heading is clicked; on narrow screens a card for each row.

    Args:
        headings: of the columns.
        rows: for each cell its HTML, and a number or text to sort by.
    """
    head = "".join(f'<th scope="col"><button type="button">{html.escape(h)}</button></th>' for h in headings)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{html.escape(h)}" data-sort="{html.escape(str(key))}">{cell}</td>'
            for h, (cell, key) in zip(headings, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def command(*lines: str) -> str:
    """Command lines to be typed."""
    return f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>"


def section(heading: str, *parts: str, name: str = "") -> str:
    anchor = f' id="{html.escape(name)}"' if name else ""
    return f"<section{anchor}><h2>{html.escape(heading)}</h2>{''.join(parts)}</section>"


def details(summary: str, *parts: str) -> str:
    """Folded away until asked for."""
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(parts)}</details>"


def page(title: str, lead: str, parts: Iterable[str], footer: str = "") -> str:
    """A whole document that refers to nothing outside itself."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body>\n<h1>{html.escape(title)}</h1>\n{paragraph(lead, 'lead')}\n"
        + (body := "\n".join(parts))
        + f"\n<footer>{paragraph(footer) if footer else ''}</footer>\n"
        + (f"<script>{_SCRIPT}</script>\n" if 'class="sortable"' in body else "")
        + "</body>\n</html>\n"
    )
