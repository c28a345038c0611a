"""A report as a list of blocks, written as one HTML page that needs no other file, and as Markdown with its figures."""

import base64
import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from diffussm_jax.io import write_whole


class Heading(NamedTuple):
    """A title of a section."""

    text: str


class Text(NamedTuple):
    """A paragraph; `is_warning` if it needs attention."""

    text: str
    is_warning: bool = False


class Items(NamedTuple):
    """A list of sentences."""

    texts: Sequence[str]


class Table(NamedTuple):
    """Rows of text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Figure(NamedTuple):
    """A picture: an <svg> element, or the bytes of a PNG."""

    caption: str
    content: str | bytes


class Figures(NamedTuple):
    """Pictures side by side."""

    figures: Sequence[Figure]


Block = Heading | Text | Items | Table | Figures

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:78em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:14px}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;
text-align:left;vertical-align:top}.warning{background:#fff3cd;padding:.6em 1em}.wide{overflow-x:auto}
.figures{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0}figcaption{font-size:13px}
img{max-width:100%;image-rendering:pixelated;width:22em}"""


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs no other file."""
    body = "\n".join(map(_html, blocks))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{html.escape(title)}</h1>\n{body}</body></html>\n'
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text, is_warning):
            return f"<p{' class=warning' if is_warning else ''}>{html.escape(text)}</p>"
        case Items(texts):
            return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>"
        case Table(header, rows):
            cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
            cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'
        case Figures(figures):
            return f'<div class="figures">{"".join(map(_html_figure, figures))}</div>'


def _html_figure(figure: Figure) -> str:
    picture = figure.content
    if isinstance(picture, bytes):
        picture = f'<img src="data:image/png;base64,{base64.b64encode(picture).decode()}" alt="">'
    return f"<figure>{picture}<figcaption>{html.escape(figure.caption)}</figcaption></figure>"


def write_markdown(path: epath.PathLike, title: str, blocks: Sequence[Block]) -> None:
    """Writes Markdown, and its figures as files in the same folder."""
    path, lines, names = epath.Path(path), [f"# {title}"], set()
    for block in blocks:
        match block:
            case Heading(text):
                lines.append(f"## {text}")
            case Text(text, is_warning):
                lines.append(f"**{text}**" if is_warning else text)
            case Items(texts):
                lines.append("\n".join(f"- {text}" for text in texts))
            case Table(header, rows):
                table = [header, ["---"] * len(header), *rows]
                cells = [[str(cell).replace("|", r"\|") for cell in row] for row in table]
                lines.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
            case Figures(figures):
                links = [f"![{f.caption}]({_write_figure(path.parent, f, names)})" for f in figures]
                lines.append("\n".join(links))
    write_whole(path, "\n\n".join(lines) + "\n")


def _write_figure(folder: epath.Path, figure: Figure, names: set[str]) -> str:
    """Writes a figure's file; returns its name, which is new in `names`."""
    suffix = ".png" if isinstance(figure.content, bytes) else ".svg"
    stem = re.sub(r"[^\w]+", "_", figure.caption).strip("_").lower()[:60]
    while stem + suffix in names:
        stem += "_"
    names.add(stem + suffix)
    write_whole(folder / (stem + suffix), figure.content)
    return stem + suffix
