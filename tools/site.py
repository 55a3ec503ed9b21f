"""Makes README.md and the site's sidebar from the notebooks, without Quarto.

    python tools/site.py           write them
    python tools/site.py --check   fail when they are not what the notebooks say

README.md is nbs/index.ipynb as the site shows it: nbdev's own processors (links, hidden cells), then nbconvert.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"

# The order of the rooms is the order of the curriculum, which the alphabet does not know.
ROOMS = {"start": "Start", "engine": "Engine", "data": "Data", "rewards": "Rewards", "methods": "Methods",
         "evaluate": "Evaluate", "workflows": "Workflows", "hardware": "Hardware"}


def readme() -> str:
    "nbs/index.ipynb as Markdown."
    import nbformat
    from execnb.nbio import nb2str, read_nb
    from nbconvert import MarkdownExporter
    from nbdev.doclinks import NbdevLookup
    from nbdev.processors import FilterDefaults

    notebook = read_nb(NBS / "index.ipynb")
    FilterDefaults()(notebook)
    notebook = nbformat.reads(nb2str(notebook), as_version=4)
    notebook.cells = [c for c in notebook.cells if c.cell_type != "raw" and "source" in c]
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*echo:\s*false", cell.source, re.MULTILINE):
            cell.metadata["tags"] = ["hide_input"]
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE) if cell.cell_type == "code" else cell.source
    exporter = MarkdownExporter()
    exporter.register_preprocessor("nbconvert.preprocessors.TagRemovePreprocessor", enabled=True)
    exporter._preprocessors[-1].remove_input_tags = {"hide_input"}
    body, _ = exporter.from_notebook_node(notebook)
    link = NbdevLookup().link_line  # outputs are linked as the site links them
    body = re.sub(r"^\*Reading time .*\n", "", body, flags=re.MULTILINE)
    body = "\n".join(link(line) if line.startswith("|") else line.rstrip() for line in body.splitlines())
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def sidebar() -> str:
    "The site's sidebar: the rooms, and in each of them its notebooks in order."
    lines = ["# Written by `make site`.", "website:", "  sidebar:", "    contents:", "      - index.ipynb"]
    unknown = {p.parent.name for p in NBS.glob("*/*.ipynb") if p.parent.name[0] not in "._"} - set(ROOMS)
    if unknown:
        raise SystemExit(f"tools/site.py: no place in the sidebar for the room {sorted(unknown)[0]!r}; add it to ROOMS")
    for room, title in ROOMS.items():
        notebooks = sorted((NBS / room).glob("*.ipynb"))
        if notebooks:
            lines += [f"      - section: {title}", "        contents:", *[f"          - {room}/{p.name}" for p in notebooks]]
    return "\n".join(lines) + "\n"


def main() -> int:
    "Write the files, or compare them."
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="fail when a file is out of date; write nothing")
    check = arguments.parse_args().check
    stale = []
    for path, text in ((ROOT / "README.md", readme()), (NBS / "sidebar.yml", sidebar())):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)}: {'out of date; run make site' if check else 'written'}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
