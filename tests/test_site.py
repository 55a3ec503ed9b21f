"""The site's part that needs no Quarto: roadmaps, folded solutions, links, figures in words, papers, and the search for holes.

`make test` runs `tools/site.py --check` on the real pages; here the pieces are tried on small pages, faulty ones among them.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as xml

import nbformat
import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import pages
import publish

from realign_core import cli
from realign_core.methods import registry

NOTEBOOKS = cli.list_notebooks(ROOT / "nbs")
BIBLIOGRAPHY = (ROOT / "nbs" / "references.bib").read_text(encoding="utf-8")
FRONT = "---\ntitle: A page\ndescription: Of a test.\noutput-file: page.html\n---"


def markdown(*texts) -> list[dict]:
    return [{"cell_type": "markdown", "metadata": {}, "source": text} for text in texts]


def code(source: str, image: bool = False) -> dict:
    shown = {"output_type": "display_data", "data": {"image/png": "", "text/plain": "<Figure>"}, "metadata": {}}
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": [shown] if image else []}


# The roadmap and the folded solutions

@pytest.mark.parametrize("room", [*cli.ROOMS, "index"])
def test_a_roadmap_lights_one_room(room):
    picture = pages.picture(room)
    tree = xml.fromstring(picture)
    words = [e.text for e in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert words == list(cli.ROOMS) and picture.count("#0b5cad") == (room in cli.ROOMS)
    assert tree.find("{http://www.w3.org/2000/svg}rect").get("fill") == "#ffffff"  # legible on black too
    assert (ROOT / "nbs" / "roadmap" / f"{room}.svg").read_text() == picture


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: f"{n.room}/{n.name}")
def test_every_page_begins_with_its_roadmap(notebook):
    third = publish.text_of(json.loads(notebook.path.read_text(encoding="utf-8"))["cells"][2])
    room = notebook.room if notebook.room in cli.ROOMS else "index"
    assert third.startswith(f"![{pages.said(room)}](") and f"roadmap/{room}.svg)" in third
    for target in re.findall(r"\]\(([^)]+)\)", third):
        assert (notebook.path.parent / target).is_file(), target


def test_tidying_folds_solutions_adds_one_roadmap_and_settles(tmp_path):
    path = tmp_path / "methods" / "01_example.ipynb"
    path.parent.mkdir()
    cells = [nbformat.v4.new_raw_cell(FRONT), nbformat.v4.new_markdown_cell("# A page"),
             *map(nbformat.v4.new_code_cell, ("#| hide\ndef mine_solution(x):\n    return x", "#| hide\nx = 1"))]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    for _ in range(2):
        text = pages.made([cli.read_notebook(path)], tmp_path)[path]
        path.write_text(text)
    assert pages.made([cli.read_notebook(path)], tmp_path)[path] == text
    made = json.loads(text)["cells"]
    assert [publish.text_of(c)[:10] for c in made].count("![Roadmap:") == 1 and len(made) == 5
    assert publish.text_of(made[3]).splitlines()[:3] == [*pages.FOLD, "def mine_solution(x):"]
    assert made[3]["metadata"]["jupyter"]["source_hidden"] and made[4]["metadata"] == {}


# Words for figures

def test_a_figure_is_described_by_where_it_stands_and_what_its_axes_say():
    drawn = 'ax.plot(x, y, label="loss")\nax.set(xlabel="step", ylabel="nats", title="a \\"b\\"")'
    described = '#| fig-alt: "A drawing of the idea."\nplt.show()'
    cells = [*markdown("## The idea\n\nText."), *(code(source, True) for source in (drawn, described, "plot(x)"))]
    publish.describe_figures(cells)
    firsts = [publish.text_of(c).splitlines()[0] for c in cells[1:]]
    assert firsts[0].startswith('#| fig-alt: "Chart in the section The idea; vertical axis: nats; horizontal axis: step')
    assert firsts[0].endswith('curves: loss"') and firsts[1] == '#| fig-alt: "A drawing of the idea."'
    assert yaml.safe_load(firsts[2].removeprefix("#| "))["fig-alt"] == "Chart in the section The idea"


# Papers

def test_every_method_cites_a_paper_that_the_bibliography_has():
    for name in registry.names():
        numbers = publish.PAPER.findall(registry.get(name).card.paper)
        assert numbers, name
        assert all(f"@misc{{arxiv-{n}," in BIBLIOGRAPHY for n in numbers), name


def test_the_bibliography_is_in_order_and_says_everything_once():
    entries = re.findall(r"@misc\{arxiv-(\d{4}\.\d{5}),\n(.*?)\n\}", BIBLIOGRAPHY, re.DOTALL)
    assert [number for number, _ in entries] == sorted({number for number, _ in entries})
    for number, body in entries:
        fields = dict(re.findall(r"^  (\w+) = \{(.+)\},?$", body, re.MULTILINE))
        assert set(fields) == {"author", "title", "year", "eprint", "archiveprefix", "url"} and fields["eprint"] == number
        assert fields["year"][2:] in (number[:2], f"{int(number[:2]) - 1:02}"), number


def test_papers_are_linked_and_listed():
    cells = [{"cell_type": "raw", "metadata": {}, "source": FRONT}, *markdown("See arXiv 2305.18290,\narXiv 2402.03300.")]
    publish.cite(cells)
    front = yaml.safe_load(publish.text_of(cells[0]).strip().strip("-"))
    assert front["nocite"].strip() == "@arxiv-2305.18290, @arxiv-2402.03300"
    assert "arXiv [2305.18290](https://arxiv.org/abs/2305.18290)," in publish.text_of(cells[1])


# The glossary

def test_the_first_use_of_a_term_is_linked_and_nothing_but_prose():
    spellings = publish.terms({"cells": markdown("### Policy (policies)\n\nA model.", "### KL divergence (KL)")})
    assert spellings["policies"] == spellings["Policy"] == "policy-policies"
    not_prose = "| KL |\n\n`KL` and $KL$ and [KL](x.md)\n\n```\nKL\n```\n\n"
    cells = markdown("# The KL", "## KL", not_prose + "non-KL. The KL and the KL of policies.")
    publish.link_terms(cells, spellings, "g.ipynb")
    assert publish.text_of(cells[0]) == "# The KL" and publish.text_of(cells[1]) == "## KL"
    linked = "The [KL](g.ipynb#kl-divergence-kl) and the KL of [policies](g.ipynb#policy-policies)."
    assert publish.text_of(cells[2]) == f"{not_prose}non-KL. {linked}"


@pytest.mark.parametrize(("heading", "expected"), [
    ("The idea", "the-idea"), ("What is wrong, and why?", "what-is-wrong-and-why"), ("1. First", "first"),
    ("`fit` and `load`", "fit-and-load"), ("[A page](x.md)", "a-page"), ("KL divergence (KL)", "kl-divergence-kl"),
    ("pass@k", "passk"), ("Größe", "größe"), ("Named {#own}", "named")])
def test_ids_are_pandocs(heading, expected):
    assert publish.slug(heading) == expected


# Holes

def site(folder, *cells) -> list[str]:
    front = {"cell_type": "raw", "metadata": {}, "source": FRONT}
    (folder / "room").mkdir()
    (folder / "room" / "01_page.ipynb").write_text(json.dumps({"cells": [front, *cells]}))
    (folder / "picture.svg").write_text("<svg/>")
    return publish.problems(folder, "@misc{arxiv-2305.18290,\n}")


def test_a_whole_site_has_no_holes(tmp_path):
    text = ("## The idea\n\n[here](#the-idea) [there](01_page.ipynb#the-idea) [by name](" + publish.SITE + "room/page.html#fit) "
            "![words](../picture.svg) [out](https://example.org) `[not](a.link)`\n\n[]{#fit}")
    assert site(tmp_path, *markdown(text), code('#| fig-alt: "Chart of this and that."\nplot()', True)) == []


@pytest.mark.parametrize(("text", "said"), [
    ("[x](02_none.ipynb)", "no such file: 02_none.ipynb"), ("[x](#nowhere)", "no such place: #nowhere"),
    ("[x](01_page.ipynb#nowhere)", "no such place"), ("![words](none.png)", "no such file: none.png"),
    ("![](../picture.svg)", "an image without alternative text"),
    ('<img src="../picture.svg">', "an image without alternative text"),
    (f"[x]({publish.SITE}room/none.html)", "no such page"), (f"[x]({publish.SITE}room/page.html#fit)", "no such place"),
])
def test_holes_are_found(tmp_path, text, said):
    found = site(tmp_path, *markdown(text))
    assert any(hole.startswith("room/01_page.ipynb: ") and said in hole for hole in found), found


def test_silent_figures_and_unknown_papers_are_found(tmp_path):
    found = site(tmp_path, code("plot()", True))
    assert any("a figure without alternative text" in hole for hole in found)
    front = {"cell_type": "raw", "metadata": {}, "source": FRONT.replace("\n---", "\nnocite: |\n  @arxiv-9999.99999\n---")}
    (tmp_path / "room" / "01_page.ipynb").write_text(json.dumps({"cells": [front]}))
    assert publish.problems(tmp_path, BIBLIOGRAPHY) == ["room/01_page.ipynb: references.bib has no arxiv-9999.99999"]


# Links of the whole

def test_links_to_run_a_page_elsewhere_name_the_page():
    line = publish.links_line("methods/03_dpo.ipynb")
    assert line.count("nbs/methods/03_dpo.ipynb") == 3 and all(word in line for word in ("download", "Colab", "Binder"))
    assert (ROOT / ".binder" / "requirements.txt").read_text().strip() == "-e .[torch,notebooks]"


def test_the_site_is_configured_for_search_two_themes_papers_and_previews():
    found = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert found["website"]["search"] and found["website"]["open-graph"]
    assert set(found["format"]["html"]["theme"]) == {"light", "dark"}
    for name in (found["website"]["image"], found["bibliography"]):
        assert (ROOT / "nbs" / name).is_file(), name
    listed = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    assert {"results.qmd", "api.qmd"} <= {entry["href"] for entry in listed if isinstance(entry, dict) and "href" in entry}


def test_the_index_of_the_library_has_every_public_name(tmp_path):
    modules = {p.relative_to(ROOT / "realign_core").with_suffix("").as_posix().replace("/", "."): "page.ipynb"
               for p in (ROOT / "realign_core").rglob("*.py")}
    page = publish.api_page(ROOT / "realign_core", modules)
    assert "| `fit` |" in page and "| `attempt` | Compare a reader's function" in page and "| `_short` |" not in page
    assert "| `grpo`" not in page and page.count("## realign_core.") > 50


def test_the_page_of_results_holds_both_kept_tables():
    page = publish.results_page(ROOT)
    assert "## Full" in page and "## Seeds" in page and page.count("| quickstart |") >= 2
