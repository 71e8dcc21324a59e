"""Render the report as HTML for MLflow and as Markdown for Prefect.

A section is a heading and its blocks. A block is a sentence, the path of a PNG file, or a table. A table is a list of
rows, headings first, and a cell is text or a photo.
"""

import base64
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from workflow.evaluation.plots import IMAGE_PIXELS
from workflow.files import read_file
from workflow.image_classifier import encode_jpeg, read_image
from workflow.text import printable

MAX_TABLE_CHARACTERS = 70  # in a row of a Markdown table
STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; max-width: 60em; margin: 1.5em auto; padding: 0 1em }
body { overflow-wrap: anywhere }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin-top: 1.8em }
table { border-collapse: collapse; margin: .8em 0 } td, th { padding: .25em .8em .25em 0; text-align: left }
td { border-top: 1px solid #ddd; vertical-align: top; overflow-wrap: break-word }
img { max-width: 100% } td img { width: 110px }
"""


@dataclass(frozen=True)
class Photo:
    """A photo in a table of the report."""

    path: Path


Table = list[list[str | Photo]]


@dataclass(frozen=True)
class Collapsed:
    """A table that expands when its summary is clicked."""

    summary: str
    table: Table


Block = str | Path | Table | Collapsed
Section = tuple[str, list[Block]]


def to_html(title: str, sections: list[Section]) -> str:
    """Return the report as one HTML page with embedded images."""

    def cell(content: str | Path | Photo, tag: str) -> str:
        if isinstance(content, Photo):
            content = f'<img alt="{html.escape(printable(content.path.name))}" src="{embed_photo(content)}">'
        elif isinstance(content, Path):
            content = f'<img alt="{content.stem}" src="{embed(content)}">'
        else:
            content = html.escape(content)
        return f"<{tag}>{content}</{tag}>"

    def block(content: Block) -> str:
        if isinstance(content, Collapsed):
            return f"<details><summary>{html.escape(content.summary)}</summary>{block(content.table)}</details>"
        if not isinstance(content, list):
            return cell(content, "p")
        tags = ["th", *["td"] * (len(content) - 1)]
        rows = ["".join(cell(text, tag) for text in row) for row, tag in zip(content, tags, strict=True)]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"

    parts = [f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>']
    for number, (heading, blocks) in enumerate(sections):
        parts += [cell(heading, "h2" if number else "h1"), *map(block, blocks)]
    return "\n".join(parts) + "\n"


def to_markdown(sections: list[Section]) -> str:
    """Return the report as Markdown with embedded images, but without the photos in tables.

    Wide tables become lists, because Prefect's UI (3.8) cuts them off instead of wrapping the text in their cells.
    """

    def escape(text: str) -> str:
        return re.sub(r"[\\`*_{}\[\]<>#|$~&]", r"\\\g<0>", text)  # Prefect's UI does not decode HTML entities

    def join(row: Iterable[str], separator: str) -> str:
        return separator.join(" ".join(escape(text).split()) for text in row)

    def block(content: Block) -> str:
        if isinstance(content, Collapsed):
            return escape(f"{content.summary}: see report.html in MLflow.")
        if isinstance(content, Path):
            return f"![{content.stem}]({embed(content)})"
        if isinstance(content, str):
            return escape(content)
        texts = [["" if isinstance(cell, Photo) else cell for cell in row] for row in content]
        columns = zip_longest(*texts, fillvalue="")
        heading, *rows = zip(*(column for column in columns if any(column[1:])), strict=True)
        if max(len(" | ".join(row)) for row in rows) > MAX_TABLE_CHARACTERS:
            items = (f"- {join(filter(None, row), ' · ')}" for row in rows)
            return "\n".join([f"{join(heading, ' · ')}:\n", *items])
        lines = [join(heading, " | "), " | ".join("---" for _ in heading), *(join(row, " | ") for row in rows)]
        return "\n".join(f"| {line} |" for line in lines)

    parts = []
    for number, (heading, blocks) in enumerate(sections):
        parts += [f"{'##' if number else '#'} {escape(heading)}", *map(block, blocks)]
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """Escape text so that names in it cannot become links, new lines or HTML when it is rendered as Markdown."""
    return re.sub(r"[\\\[\]<>]", r"\\\g<0>", printable(text))


def embed(path: Path) -> str:
    """Return a PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def embed_photo(photo: Photo) -> str:
    """Return a downscaled photo as a data URL, empty if it can no longer be read."""
    try:
        content = encode_jpeg(read_image(read_file(photo.path), IMAGE_PIXELS))
    except (OSError, ValueError):
        return "data:,"
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
