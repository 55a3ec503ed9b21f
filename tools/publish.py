"""What the site's pages get beyond the notebooks, once nbdev has put them into _proc/.

Words for the figures, a line of links under the title, the papers of the page for its list of references, links to the
glossary from the first use of a term, a place for every link to a symbol, and two pages of their own: the results of
the kept runs, and an index of everything that the library exports. `problems` then looks for holes.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote

REPOSITORY = "realign/realign"
SITE = "https://realign.github.io/realign/"
PAPER = re.compile(r"arXiv:?\s+(\d{4}\.\d{5})")
# What is not prose: code, formulas, links, HTML, and lines that are headings, tables or the page's first lines.
PROTECTED = re.compile(r"```[\s\S]*?```|`[^`]*`|\$\$[\s\S]*?\$\$|\$[^$\n]+\$|!?\[[^\]]*\]\([^)]*\)|<[^>]+>|^[#|>].*$|^ {4}.*$",
                       re.MULTILINE)


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def slug(heading: str) -> str:
    "The id that Pandoc gives a heading."
    heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"\{[^}]*\}\s*$", "", heading))
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " _-." or unicodedata.category(c) == "Mn")
    return re.sub(r"^[^a-zA-Z\u00c0-\uffff]+", "", re.sub(r"\s+", "-", kept.strip())) or "section"


def headings(cells: list[dict]) -> list[str]:
    prose = "\n".join(text_of(c) for c in cells if c["cell_type"] == "markdown")
    return re.findall(r"^#+ +(.+?) *#*$", re.sub(r"```.*?```", "", prose, flags=re.DOTALL), re.MULTILINE)


# Figures

def has_figure(cell: dict) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


def in_words(source: str, heading: str) -> str:
    "What can be said of a chart without seeing it: where it stands, its axes, titles and curves."
    def said(names): return list(dict.fromkeys(re.findall(rf'\b(?:{names})(?:=|\()\s*f?"([^"{{}}\\]+)', source)))
    parts = [f"Chart in the section {heading}"]
    for word, names in (("vertical axis", "ylabel|set_ylabel"), ("horizontal axis", "xlabel|set_xlabel"),
                        ("titles", "title|set_title"), ("curves", "label")):
        if found := said(names):
            parts.append(f"{word}: {', '.join(found)}")
    return "; ".join(parts).replace('"', "'")


def describe_figures(cells: list[dict]) -> None:
    "Give each figure without an alternative text one made from its code."
    heading = ""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ +(.+)$", text_of(cell), re.MULTILINE) or [heading])[-1]
        elif has_figure(cell) and "fig-alt:" not in text_of(cell):
            cell["source"] = f"#| fig-alt: {json.dumps(in_words(text_of(cell), heading), ensure_ascii=False)}\n" + text_of(cell)


# Under the title

def links_line(page: str) -> str:
    "Where the notebook can be had, and run."
    path = f"nbs/{page}"
    install = "%pip install 'realign_core[torch,notebooks] @ git+https://github.com/" + REPOSITORY + "'"
    return " · ".join([f"[download the notebook](https://raw.githubusercontent.com/{REPOSITORY}/main/{path})",
                       f"[open it in Colab](https://colab.research.google.com/github/{REPOSITORY}/blob/main/{path}) "
                       f"(there, first run `{install}`)",
                       f"[open it in Binder](https://mybinder.org/v2/gh/{REPOSITORY}/main?labpath={path})"])


def add_links_line(cells: list[dict], page: str) -> None:
    title = next(c for c in cells if c["cell_type"] == "markdown" and text_of(c).startswith("# "))
    title["source"] = f"{text_of(title)}\n\n{links_line(page)}"


# Papers

def papers(cells: list[dict]) -> list[str]:
    "The arXiv numbers that a page names."
    return sorted(set(PAPER.findall("\n".join(map(text_of, cells)))))


def cite(cells: list[dict]) -> None:
    "Link the papers in the prose, and have Quarto list them at the page's end."
    if named := papers(cells):
        keys = ", ".join(f"@arxiv-{number}" for number in named)
        cells[0]["source"] = re.sub(r"\s*\n---\s*$", f"\nnocite: |\n  {keys}\n---\n", text_of(cells[0]))
    for cell in cells:
        if cell["cell_type"] == "markdown":
            cell["source"] = PAPER.sub(r"arXiv [\1](https://arxiv.org/abs/\1)", text_of(cell))


# The glossary

def terms(glossary: dict) -> dict[str, str]:
    "Each spelling of a term with the id of its entry: `### Policy (policies)` has two."
    found = {}
    for heading in re.findall(r"^### (.+)$", "\n".join(map(text_of, glossary["cells"])), re.MULTILINE):
        name, _, others = heading.partition(" (")
        for spelling in [name, *others.rstrip(")").split(", ")]:
            if spelling:
                found[spelling] = slug(heading)
    return found


def link_terms(cells: list[dict], spellings: dict[str, str], address: str) -> None:
    "Link the first use of each term in the prose of a page to its entry."
    seen: set[str] = set()
    pattern = re.compile(rf"(?<![\w-])({'|'.join(sorted(map(re.escape, spellings), key=len, reverse=True))})(?![\w-])")
    def linked(match):
        entry = spellings[match[1]]
        if entry in seen:
            return match[0]
        seen.add(entry)
        return f"[{match[1]}]({address}#{entry})"
    for cell in cells:
        if cell["cell_type"] == "markdown" and not text_of(cell).startswith(("# ", "![Roadmap")):
            text, end, parts = text_of(cell), 0, []
            for span in PROTECTED.finditer(text):
                parts += [pattern.sub(linked, text[end:span.start()]), span[0]]
                end = span.end()
            cell["source"] = "".join([*parts, pattern.sub(linked, text[end:])])


# Symbols

def add_anchors(cells: list[dict], wanted: set[str]) -> list[dict]:
    "Put an empty place before each cell that defines a symbol to which some page links."
    done, out = {slug(h) for h in headings(cells)}, []
    for cell in cells:
        if cell["cell_type"] == "code":
            names = re.findall(r"^(?:def|class) (\w+)|^(\w+)(?:: .+)? = ", text_of(cell), re.MULTILINE)
            names = list(dict.fromkeys((a or b).lower() for a, b in names))
            names += sorted(w for w in wanted if w.partition(".")[0] in names and "." in w)  # a class and its methods
            here = [n for n in names if n in wanted and n not in done]
            done.update(here)
            if here:
                out.append({"cell_type": "markdown", "metadata": {}, "source": "".join(f"[]{{#{name}}}" for name in here)})
        out.append(cell)
    return out


def symbol_links(text: str) -> list[tuple[str, str]]:
    "Page and anchor of each link to a page of our own site by its full address."
    return [(page, anchor) for page, anchor in re.findall(rf"{re.escape(SITE)}([\w/.-]+\.html)(?:#([\w.-]+))?", text)]


def drop_chance_links(cells: list[dict], page: str, modules: dict[str, str], source: str) -> None:
    "nbdev links every word in backticks that is a symbol somewhere; keep what this page defines or imports."
    def kept(match):
        name, address = match[1], match[2]
        ours = address == page or f"realign_core.{modules.get(address)}" in source
        return match[0] if ours or re.search(rf"\bimport\b.*\b{name}\b", source) else f"`{name}`"
    link = re.compile(rf"\[`([\w.]+)`\]\({re.escape(SITE)}([\w/.-]+\.html)(?:#[\w.-]+)?\)")
    for cell in cells:
        if cell["cell_type"] == "markdown":
            cell["source"] = link.sub(kept, text_of(cell))
        for data in (output["data"] for output in cell.get("outputs", ()) if "text/markdown" in output.get("data", {})):
            data["text/markdown"] = link.sub(kept, "".join(data["text/markdown"]))


# Pages of their own

def results_page(root: Path) -> str:
    "The kept tables of `realign report`, one below the other."
    parts = ["---\ntitle: Results\ndescription: What the kept runs measured, by page, framework and seed.\n---\n"]
    kept = {"full": "Every page in full, on both frameworks (`make full`).", "seeds": "The same pages on other seeds."}
    for name, said in kept.items():
        table = (root / "results" / f"{name}.md").read_text(encoding="utf-8")
        table = re.sub(r"\[[-+\d., ]+\]|n = \d+", lambda m: m[0].replace(" ", "\u00a0"), table)  # an interval stays on one line
        parts.append(f"## {name.capitalize()}\n\n{said}\n\n" + re.sub(r"^#+ .*\n", "", table, count=1).strip() + "\n")
    return "\n".join(parts)


def api_page(package: Path, pages: dict[str, str]) -> str:
    "Every public function and class, module by module, with its first line and the page that explains it."
    lines = ["---\ntitle: The library\ndescription: Everything that the notebooks export.\n---\n"]
    for path in sorted(package.rglob("*.py")):
        if path.name in ("__init__.py", "_modidx.py"):
            continue
        module = path.relative_to(package).with_suffix("").as_posix().replace("/", ".")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        shown = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
        lines += [f"## realign_core.{module}\n\nFrom [this notebook]({pages[module]}).\n", "| name | what it is |", "|---|---|"]
        said = [(ast.get_docstring(n) or " ").splitlines()[0].replace("|", "\\|") for n in shown]
        lines += [*[f"| `{n.name}` | {text} |" for n, text in zip(shown, said, strict=True)], ""]
    return "\n".join(lines)


# Holes

def problems(site: Path, bibliography: str) -> list[str]:
    "Links, anchors, images, papers and figures of the pages in `site` that lead nowhere or say nothing."
    def cells_of(path):
        text = path.read_text(encoding="utf-8")
        return json.loads(text)["cells"] if path.suffix == ".ipynb" else [{"cell_type": "markdown", "source": text}]
    paths = [*site.rglob("*.ipynb"), *site.glob("*.qmd")]
    everything = {p.relative_to(site).as_posix(): cells_of(p) for p in sorted(paths) if "_docs" not in p.parts}
    anchors = {page: _anchors(cells) for page, cells in everything.items()}
    published = {_address(page, cells): page for page, cells in everything.items()}
    found = []
    for page, cells in everything.items():
        said = [text_of(c) for c in cells if c["cell_type"] == "markdown"] + [_shown(c) for c in cells]
        for target in {t for text in said for t in _targets(text)}:
            if hole := _hole(site, page, target, anchors, published):
                found.append(f"{page}: {hole}")
        cited = set(re.findall(r"@(arxiv-[\d.]+\d)", text_of(cells[0])))
        found += [f"{page}: references.bib has no {key}" for key in sorted(cited) if f"{{{key}," not in bibliography]
        found += [f"{page}: a figure without alternative text: {text_of(c)[:60]!r}" for c in cells
                  if has_figure(c) and not re.search(r'^#\| fig-alt: ".{15,}"$', text_of(c), re.M)]
        found += [f"{page}: an image without alternative text: {image[:60]}" for text in said
                  for image in re.findall(r"!\[\]\([^)]*\)|<img (?![^>]*alt=.[^'\"])[^>]*>", text)]
    return found


def _targets(text: str) -> list[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def _shown(cell: dict) -> str:
    "The outputs of a cell that may hold links."
    data = [output.get("data", {}) for output in cell.get("outputs", ())]
    return "\n".join("".join(d.get(kind, "")) for d in data for kind in ("text/markdown", "text/html"))


def _anchors(cells: list[dict]) -> set[str]:
    text = "\n".join(text_of(c) for c in cells if c["cell_type"] == "markdown")
    found = {slug(h) for h in headings(cells)}
    return found | set(re.findall(r"\{#([\w.-]+)", text)) | set(re.findall(r'\bid="([\w.-]+)"', text))


def _address(page: str, cells: list[dict]) -> str:
    "Where Quarto puts a page."
    name = re.search(r"^output-file: (\S+)$", text_of(cells[0]), re.MULTILINE)
    folder, _, file = page.rpartition("/")
    return (folder + "/" if folder else "") + (name[1] if name else re.sub(r"\.\w+$", ".html", file))


def _hole(site: Path, page: str, target: str, anchors: dict, published: dict) -> str:
    "What is wrong with a link, if anything."
    if target.startswith(SITE):
        place, _, anchor = target.removeprefix(SITE).partition("#")
        to = published.get(place)
    elif re.match(r"[a-z]+:", target):
        return ""
    else:
        place, _, anchor = unquote(target).partition("#")
        path = (site / page).parent / place if place else site / page
        if not path.exists():
            return f"no such file: {target}"
        to = path.resolve().relative_to(site.resolve()).as_posix()
        if to not in anchors:
            return ""
    if to is None:
        return f"no such page: {target}"
    return f"no such place: {target}" if anchor and anchor not in anchors[to] else ""


# All of it

def publish(site: Path, root: Path) -> None:
    "Finish the pages that nbdev has put into `site`."
    paths = [p for p in sorted(site.rglob("*.ipynb")) if "_docs" not in p.parts]
    books = {p: json.loads(p.read_text(encoding="utf-8")) for p in paths}
    glossary = site / "start" / "20_glossary.ipynb"
    spellings = terms(books[glossary])
    sources = {path: _source(root / "nbs" / path.relative_to(site)) for path in paths}
    owned = {path: found[1] for path in paths if (found := re.search(r"^#\| default_exp (\S+)", sources[path], re.MULTILINE))}
    addresses = {path: _address(path.relative_to(site).as_posix(), book["cells"]) for path, book in books.items()}
    modules = {addresses[path]: module for path, module in owned.items()}
    wanted: dict[str, set[str]] = {}
    for path, book in books.items():
        drop_chance_links(book["cells"], addresses[path], modules, sources[path])
        for page, anchor in symbol_links("\n".join(text_of(c) + _shown(c) for c in book["cells"])):
            wanted.setdefault(page, set()).add(anchor)
    for path, book in books.items():
        cells, page = book["cells"], path.relative_to(site).as_posix()
        describe_figures(cells)
        cite(cells)
        if path != glossary:
            link_terms(cells, spellings, "../" * page.count("/") + "start/20_glossary.ipynb")
        add_links_line(cells, page)
        book["cells"] = add_anchors(cells, wanted.get(addresses[path], set()))
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    owners = {module: path.relative_to(site).as_posix() for path, module in owned.items()}
    (site / "results.qmd").write_text(results_page(root), encoding="utf-8")
    (site / "api.qmd").write_text(api_page(root / "realign_core", owners), encoding="utf-8")


def _source(path: Path) -> str:
    return "\n".join(text_of(cell) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
