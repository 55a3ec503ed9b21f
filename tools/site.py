"""Makes README.md and the site's pages from the notebooks: everything but Quarto's own part.

    python tools/site.py           write README.md, nbs/sidebar.yml, the roadmaps and the pages in _proc/
    python tools/site.py --check   fail when one of them is not what the notebooks say, or the site has a hole

README.md is nbs/index.ipynb taken through nbdev's processing and then nbconvert. `quarto render _proc` turns the pages
into the site; the workflow does that.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from pages import made
from publish import problems, publish

from realign_core.cli import ROOMS, list_notebooks

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"


def hide_default_exp(cell) -> None:
    "The line that names the module is for nbdev, not for readers."
    if cell.cell_type == "code" and (cell.source or "").lstrip().startswith("#| default_exp"):
        del cell["source"]


def processors(links: bool) -> type:
    "nbdev's processing of a page (with settings.ini's skip_procs), with `hide_default_exp`, and links if wanted."
    from nbdev.processors import FilterDefaults

    class Processors(FilterDefaults):
        def base_procs(self):
            return [hide_default_exp, *[p for p in super().base_procs() if links or p.__name__ != "add_links"]]
    return Processors


def readme() -> str:
    "nbs/index.ipynb as Markdown."
    import nbformat
    from execnb.nbio import nb2str, read_nb
    from nbconvert import MarkdownExporter

    notebook = read_nb(NBS / "index.ipynb")
    processors(links=False)()(notebook)
    notebook = nbformat.reads(nb2str(notebook), as_version=4)
    notebook.cells = [c for c in notebook.cells if c.cell_type != "raw" and c.get("source")]
    for cell in notebook.cells:
        if re.search(r"^#\|\s*echo:\s*false", cell.source, re.MULTILINE):
            cell.metadata["tags"] = ["hide_input"]
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
    exporter = MarkdownExporter()
    exporter.register_preprocessor("nbconvert.preprocessors.TagRemovePreprocessor", enabled=True)
    exporter._preprocessors[-1].remove_input_tags = {"hide_input"}
    body, _ = exporter.from_notebook_node(notebook)
    body = re.sub(r"^\*Reading time .*\n", "", body, flags=re.MULTILINE)
    body = re.sub(r"\]\((?!https?:|#)", "](nbs/", body)      # README.md stands one folder higher
    body = "\n".join(line.rstrip() for line in body.splitlines())
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def sidebar() -> str:
    "The site's sidebar: the rooms, and in each of them its notebooks in order."
    lines, rooms = ["# Written by `make site`.", "website:", "  sidebar:", "    contents:"], []
    for notebook in list_notebooks(NBS):
        path, room = notebook.path.relative_to(NBS).as_posix(), notebook.room
        if "/" not in path:
            lines.append(f"      - {path}")
            continue
        if room not in ROOMS:
            raise SystemExit(f"{path}: the room {room!r} has no place yet; add it to ROOMS in nbs/engine/12_command_line.ipynb")
        if room not in rooms:
            rooms.append(room)
            lines += [f"      - section: {room.capitalize()}", "        contents:"]
        lines.append(f"          - {path}")
    lines += ["      - text: Results", "        href: results.qmd", "      - text: The library", "        href: api.qmd"]
    return "\n".join(lines) + "\n"


def pages() -> list[str]:
    "Take every notebook through nbdev's processing into _proc/, finish it there, and return the holes of the site."
    import nbdev.serve
    from nbdev.quarto import refresh_quarto_yml

    nbdev.serve.FilterDefaults = processors(links=True)
    refresh_quarto_yml()  # writes nbdev.yml from settings.ini; leaves our _quarto.yml alone
    site = nbdev.serve.proc_nbs(force=True, n_workers=0)
    needed = ("_quarto.yml", "nbdev.yml", "sidebar.yml", "styles.css", "references.bib")
    if missing := [name for name in needed if not (site / name).is_file()]:
        raise SystemExit(f"tools/site.py: nbdev did not hand {', '.join(missing)} to the site")
    publish(site, ROOT)
    return problems(site, (site / "references.bib").read_text(encoding="utf-8"))


def brought_up_to_date(path: Path, text: str, check: bool) -> list[str]:
    "Write a file unless only asked to check; its name when it was out of date."
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return []
    if not check:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [path.relative_to(ROOT).as_posix()]


def main() -> int:
    "Write the files, or compare them."
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="fail when README.md or the sidebar is out of date")
    check = arguments.parse_args().check
    os.chdir(ROOT)
    stale = []
    for path, text in made(list_notebooks(NBS), NBS).items():
        stale += brought_up_to_date(path, text, check)
    for path, text in ((ROOT / "README.md", readme()), (NBS / "sidebar.yml", sidebar())):
        stale += brought_up_to_date(path, text, check)
    if stale:
        what = ", ".join(stale) if len(stale) < 9 else f"{len(stale)} files"
        print(f"{what}: {'out of date; run make site' if check else 'written'}")
    holes = pages()
    for hole in holes:
        print(hole)
    return 1 if holes or stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
