"""One HTML page: pictures inside it, facts, tables and texts."""

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nestling.files.writing import write_file
from nestling.report.tables import Row, formatted, html_table, in_html, scalar
from nestling.visible import visible_lines


@dataclass
class Section:
    """A part of the page, shown in this order; a blank line in `text` starts a paragraph, `pre` is monospace."""

    title: str
    text: str = ""
    rows: Sequence[Row] | None = None
    columns: Mapping[str, str] | None = None
    figure: Figure | None = None
    pre: str | None = None


def write_html(
    path: str | os.PathLike[str], title: str, intro: str, sections: Iterable[Section], meta: Mapping[str, Any]
) -> None:
    """Write one self-contained page, atomically: inline style and SVG, all text escaped, any load forbidden by policy.

    Raises FileError where it cannot be written; an older file stays.
    """
    body = f"<header><h1>{in_html(title)}</h1>\n{_paragraphs(intro)}</header>\n"
    for i, section in enumerate(sections):
        body += f"<section><h2>{in_html(section.title)}</h2>\n{_paragraphs(section.text)}"
        body += html_table(section.rows, section.columns) if section.rows is not None else ""
        if section.figure is not None:
            svg = _svg(section.figure, f"fig{i}-")
            body += f'<figure role="img" aria-label="{in_html(section.title)}">{svg}</figure>\n'
        body += f"<pre>\n{escape(visible_lines(section.pre))}</pre>\n" if section.pre is not None else ""
        body += "</section>\n"
    facts = "".join(f"<dt>{in_html(str(key))}</dt><dd>{in_html(_fact(value))}</dd>\n" for key, value in meta.items())
    write_file(path, _PAGE.format(title=in_html(title), style=_STYLE, body=body, facts=facts))


def _paragraphs(text: str) -> str:
    return "".join(
        f"<p>{escape(visible_lines(part.strip()))}</p>\n" for part in re.split(r"\n\s*\n", text) if part.strip()
    )


def _fact(value: Any) -> str:
    nested = isinstance(value, Mapping)
    return ", ".join(f"{k} {_fact(v)}" for k, v in value.items()) if nested else formatted([scalar(value)])[0]


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element whose ids all start with `prefix`, so that several fit on one page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r"<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg[svg.index("<svg") :].strip())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="nestling"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>{style}</style></head>
<body>
{body}<footer><dl>
{facts}</dl></footer>
</body></html>
"""
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --paper: #fff; --tint: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d; --paper: #0d1117; --tint: #161b22 } }
body { max-width: 54rem; margin: 0 auto; padding: 3rem 1.25rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .75rem }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 .5rem }
p { max-width: 42rem; margin: .5rem 0 .75rem }
header p, footer, th { color: var(--soft) }
div, pre { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap }
:is(th, td):first-child { padding-left: 0 } .n { text-align: right }
figure { margin: 1rem 0; padding: 1rem; background: #fff; border: 1px solid var(--line); border-radius: 8px }
figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto }
pre { background: var(--tint); border-radius: 8px; padding: .9rem 1.1rem; font: .84rem/1.5 ui-monospace, monospace }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: .84rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 }
dt { font-weight: 600 } dd { margin: 0 }
"""
