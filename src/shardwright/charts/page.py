"""A report as one HTML file that loads nothing: headings, sentences, tables, pictures drawn in place."""

from collections.abc import Callable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import IO

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.3rem;text-align:left}"
    "svg{max-width:100%;height:auto}"
)


class Page:
    """Built from top to bottom, then written."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts = [f"<h1>{escape(title)}</h1>"]

    def text(self, said: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{escape(said)}</p>")

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Cells are shown as they print."""
        head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
        body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
        self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, heading: str, draw: Callable[[IO[bytes]], None]) -> None:
        """What `draw` writes as SVG into the stream it is given, without the XML prologue."""
        stream = BytesIO()
        draw(stream)
        svg = stream.getvalue().decode("utf-8")
        self.parts.append(f"<h2>{escape(heading)}</h2>{svg[svg.index('<svg') :]}")

    def write(self, path: Path) -> None:
        """One file, whole."""
        head = f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{_STYLE}</style>'
        path.write_text(f"<!doctype html><html><head>{head}</head><body>{''.join(self.parts)}</body></html>", "utf-8")
