"""Self-contained HTML reports: one file, images inside, readable on a telephone and on paper."""

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


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


def png(drawing: Any, dpi: int = 130) -> bytes:
    """A matplotlib Figure as a PNG file."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=dpi)
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
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>\n{_file('style.css')}</style></head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{paragraph(lead, 'lead')}\n"
        + (body := "\n".join(parts))
        + f"\n<footer>{paragraph(footer) if footer else ''}</footer>\n"
        + (f"<script>\n{_file('sort.js')}</script>\n" if 'class="sortable"' in body else "")
        + "</body>\n</html>\n"
    )
