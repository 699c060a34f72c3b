"""One HTML page: pictures inside it, facts, tables and texts. Its looks are in page.html.jinja."""

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from nestling.files.writing import write_file
from nestling.report.tables import Row, formatted, grid, scalar
from nestling.visible import visible_lines


@dataclass
class Section:
    """A part of the page, shown in this order; a blank line in `text` starts a paragraph, `pre` is shown as it is."""

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

    Args:
        meta: facts for the foot of the page; those that are None are left out.

    Raises:
        FileError: it cannot be written; an older file stays.
    """
    shown = [
        {
            "title": section.title,
            "paragraphs": _paragraphs(section.text),
            "table": None if section.rows is None else grid(section.rows, section.columns),
            "svg": None if section.figure is None else Markup(_svg(section.figure, f"fig{i}-")),  # noqa: S704
            "pre": section.pre,
        }
        for i, section in enumerate(sections)
    ]
    facts = {key: _fact(value) for key, value in meta.items() if value is not None}
    page = environment("nestling.report").get_template("page.html.jinja")
    write_file(path, page.render(title=title, intro=_paragraphs(intro), sections=shown, facts=facts))


def environment(package: str) -> jinja2.Environment:
    """For the templates of a package: what they show is escaped, and control characters in it are spelled out."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""), autoescape=True, finalize=_visible,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def _visible(value: Any) -> Any:
    return value if isinstance(value, Markup) else visible_lines(str(value))


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(item)}" for name, item in value.items() if item is not None)
    return formatted([scalar(value)])[0]


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element whose ids all start with `prefix`, so that several fit on one page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r"<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg[svg.index("<svg") :].strip())
