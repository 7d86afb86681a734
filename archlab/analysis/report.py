"""Reports: one HTML file that holds everything it shows, readable by day and by night, without a network.

All text is escaped: what comes from a corpus or a model is shown and never run.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from archlab.analysis.accounts import short
from archlab.analysis.plots import inline_svg
from archlab.analysis.report_style import SCRIPT, STYLE


class Report:
    """A page, written from top to bottom: every method adds one element and returns nothing."""

    def __init__(self, title: str, subtitle: str = ""):
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._sections: list[str] = []
        self._figures = 0

    def section(self, heading: str) -> None:
        """Begins a section, to which the head of the page links."""
        self._sections.append(heading)
        self._parts.append(f'<h2 id="section-{len(self._sections)}">{escape(heading)}</h2>')

    def text(self, text: str) -> None:
        """Paragraphs, parted by empty lines; `words` between backquotes are set as code."""
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            self._parts.append(f"<p>{_inline(paragraph)}</p>")

    def code(self, text: str) -> None:
        """A block of code, such as the command to run next."""
        self._parts.append(f"<pre><code>{escape(text)}</code></pre>")

    def facts(self, facts: Mapping[str, object]) -> None:
        """A row of figures worth seeing first: label -> value."""
        cells = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(_cell(value))}</dd></div>"
                        for label, value in facts.items())
        self._parts.append(f'<dl class="facts">{cells}</dl>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence], caption: str = "",
              formats: Mapping[str, str] | None = None, colours: Mapping[str, str] | None = None) -> None:
        """A table that sorts by a click on a column's head.

        Args: rows: of strings and numbers; numbers are set to the right, None and nan as a dash. formats: column ->
          format such as ".3f", where three digits and a unit will not do. colours: name -> colour; cells that hold
          such a name get a dot of it, as in the figures.
        """
        formats, colours = formats or {}, colours or {}
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"Report.table: every row must have {len(columns)} cells, as many as there are columns")
        numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
        kind = [' class="number"' if n else "" for n in numeric]
        head = "".join(f'<th{k} scope="col" aria-sort="none"><button type="button">{escape(c)}</button></th>'
                       for k, c in zip(kind, columns))
        cell = lambda value, k, column: (f"<td{k}{_sort_key(value)}>{_dot(value, colours)}"
                                         f"{escape(_cell(value, formats.get(column)))}</td>")
        body = "".join(f"<tr>{''.join(map(cell, row, kind, columns))}</tr>" for row in rows)
        below = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
        self._parts.append(f'<figure class="wide"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
                           f"<tbody>{body}</tbody></table></div>{below}</figure>")

    def figures(self, figures: Sequence[tuple[Figure, str]]) -> None:
        """Figures side by side, as many as the screen has room for, each with its caption."""
        cells = ""
        for figure, caption in figures:
            self._figures += 1
            svg = inline_svg(figure, f"figure-{self._figures}")
            cells += f"<figure>{svg}<figcaption>{_inline(caption)}</figcaption></figure>"
        self._parts.append(f'<div class="grid">{cells}</div>')

    def coloured(self, tokens: Sequence[str], values: Sequence[float], label: str, caption: str = "") -> None:
        """Text in which each token has a background by its value, with a legend; the value shows under the pointer.

        Args: tokens: pieces of text, in order; values: one for each, nan for none; label: what the value is.
        """
        if len(tokens) != len(values):
            raise ValueError(f"Report.coloured: {len(tokens)} tokens but {len(values)} values")
        finite = [float(v) for v in values if math.isfinite(v)]
        low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
        # Few whole numbers, such as depths, are steps from the first shade on; others run from no colour to full.
        steps = sorted(set(finite)) if all(v == int(v) for v in finite) and high - low <= 12 else []
        share = lambda v: (v - low + bool(steps)) / max(high - low + bool(steps), 1e-30)
        spans = []
        for token, value in zip(tokens, values):
            shade, told = (f"{share(value):.2f}", _cell(float(value))) if math.isfinite(value) else ("0", "none")
            spans.append(f'<span style="--v:{shade}" title="{escape(label)}: {told}">{escape(visible(token))}</span>')
        if steps:
            legend = "".join(f'<span class="step" style="--v:{share(v):.2f}">{v:.0f}</span>' for v in steps)
        else:
            legend = f'{_cell(low)}<span class="ramp"></span>{_cell(high)}'
        below = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
        self._parts.append(f'<figure class="wide"><div class="legend">{escape(label)} {legend}</div>'
                           f'<div class="tokens">{"".join(spans)}</div>{below}</figure>')

    def raw(self, html: str) -> None:
        """An element of one's own making, in which all text is escaped already."""
        self._parts.append(html)

    def html(self) -> str:
        """The whole page."""
        links = "".join(f'<a href="#section-{i}">{escape(name)}</a>' for i, name in enumerate(self._sections, 1))
        return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                '<meta name="color-scheme" content="light dark">'
                f"<style>{STYLE}</style></head>\n<body><header><h1>{escape(self.title)}</h1>"
                f'<p class="subtitle">{_inline(self.subtitle)}</p><nav>{links}</nav></header>\n<main>'
                + "\n".join(self._parts) + f"</main>\n<script>{SCRIPT}</script></body></html>\n")

    def save(self, path: str | Path) -> Path:
        """Writes the page to a file."""
        Path(path).write_text(self.html(), encoding="utf-8", errors="replace")
        return Path(path)


def escape(text: str) -> str:
    """Text as HTML that shows it, quotation marks too."""
    return html.escape(str(text), quote=True)


def visible(text: str) -> str:
    """Text with control characters as pictures of themselves, so that no byte of a corpus is lost or obeyed."""
    pictures = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
    return text.translate(pictures | {ord("\n"): "↵\n"})


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _sort_key(value) -> str:
    return f' data-value="{float(value):.17g}"' if _is_number(value) and value is not None else ""


def _dot(value, colours: Mapping[str, str]) -> str:
    known = isinstance(value, str) and value in colours
    return f'<i class="dot" style="background:{escape(colours[value])}"></i>' if known else ""


def _is_number(value) -> bool:
    return value is None or not isinstance(value, (str, bool)) and hasattr(value, "__float__")


def _cell(value, form: str | None = None) -> str:
    if value is None or _is_number(value) and not math.isfinite(value):
        return "–"
    if not _is_number(value):
        return str(value)
    if form:
        return format(value, form)
    return f"{value:,}" if float(value).is_integer() and abs(value) < 10_000 and not isinstance(value, float) \
        else short(float(value))
