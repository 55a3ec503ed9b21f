"""What every page gets that nobody should have to write: a roadmap at its top, folded solutions, and no dead forms.

`tools/site.py` calls this. All are part of the notebooks, so JupyterLab shows them as the site does; running it twice
changes nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from realign_core.cli import ROOMS, Notebook

MARK = "![Roadmap: "  # a cell that begins like this is ours
FOLD = ['#| code-summary: "Solution"', "#| code-fold: true"]


def picture(room: str) -> str:
    "The rooms in order as an SVG, with `room` lit. It brings its own ground, so it can be read on black as on white."
    width, gap, top = 104, 16, 10
    total = 2 * top + len(ROOMS) * width + (len(ROOMS) - 1) * gap
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} 56" width="{total}" height="56" role="img">',
             f"<title>{said(room)}</title>",
             f'<rect width="{total}" height="56" rx="8" fill="#ffffff" stroke="#d0d7de"/>',
             '<g font-family="system-ui, sans-serif" font-size="15" text-anchor="middle">']
    for i, name in enumerate(ROOMS):
        x, lit = top + i * (width + gap), name == room
        if i:
            lines.append(f'<path d="M{x - gap + 3} 28h{gap - 6}m-4 -3l4 3l-4 3" fill="none" stroke="#57606a"/>')
        lines += [f'<rect x="{x}" y="10" width="{width}" height="36" rx="6" fill="{"#0b5cad" if lit else "#f3f5f7"}"/>',
                  f'<text x="{x + width / 2:g}" y="33" fill="{"#ffffff" if lit else "#24292f"}"'
                  f'{" font-weight=" + chr(34) + "bold" + chr(34) if lit else ""}>{name}</text>']
    return "\n".join([*lines, "</g>", "</svg>"]) + "\n"


def said(room: str) -> str:
    "The picture in words."
    here = f"you are in room {ROOMS.index(room) + 1} of {len(ROOMS)}, {room}" if room in ROOMS else "the rooms"
    return f"Roadmap: {here}; the order is {', '.join(ROOMS)}"


def roadmap(page: Notebook, top: Path, first: dict[str, Path]) -> str:
    "The Markdown of a page's roadmap: the picture, and a link to the first page of each room."
    def way(path): return Path(os.path.relpath(path, page.path.parent)).as_posix()
    room = page.room if page.path.parent != top else "index"
    links = [f"**{name}**" if name == room else f"[{name}]({way(first[name])})" for name in ROOMS if name in first]
    if room != "index":
        links.insert(0, f"[front page]({way(top / 'index.ipynb')})")
    return f"![{said(room)}]({way(top / 'roadmap' / f'{room}.svg')})\\\n" + " · ".join(links)


def tidy(page: Notebook, top: Path, first: dict[str, Path]) -> str:
    "The notebook's text with its roadmap as third cell, its solutions folded, and no widgets."
    text = page.path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if not "".join(cell["source"]).startswith(MARK)]
    cells.insert(2, {"cell_type": "markdown", "id": "roadmap", "metadata": {},
                     "source": roadmap(page, top, first).splitlines(keepends=True)})
    for cell in cells:
        _fold(cell)
        _drop_widgets(cell)
    metadata = {name: value for name, value in notebook["metadata"].items() if name != "widgets"}
    changed = {**notebook, "cells": cells, "metadata": metadata}
    return text if changed == notebook else json.dumps(changed, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def _fold(cell: dict) -> None:
    "Fold a solution: `code-fold` for the site, `source_hidden` for JupyterLab."
    source = "".join(cell["source"])
    if cell["cell_type"] != "code" or "_solution(" not in source or not source.startswith(("#| hide\n", FOLD[0])):
        return
    body = [line for line in source.splitlines() if line not in ("#| hide", *FOLD)]
    cell["source"] = "\n".join([*FOLD, *body]).splitlines(keepends=True)
    cell["metadata"] = {**cell["metadata"], "jupyter": {"source_hidden": True}}


def _drop_widgets(cell: dict) -> None:
    "A form lives as long as its kernel: in a file it is an error message."
    if cell["cell_type"] == "code":
        cell["outputs"] = [o for o in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]


def made(pages: list[Notebook], top: Path) -> dict[Path, str]:
    "Every file that this module answers for, with the text that it should have."
    first = {}
    for page in pages:
        if page.path.parent != top:
            first.setdefault(page.room, page.path)
    files = {top / "roadmap" / f"{room}.svg": picture(room) for room in (*ROOMS, "index")}
    return files | {page.path: tidy(page, top, first) for page in pages}
