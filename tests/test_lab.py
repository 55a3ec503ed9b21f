"""The notebooks as a reader meets them: JupyterLab in a browser, without a screen; and the guide's page, opened as a file.

Skipped where there is no browser.

REALIGN_SCREENSHOTS=DIR keeps a picture of each thing that is looked at, in the light and in the dark theme.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from realign_core import cli, guide

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; make test installs it")
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PATIENCE = 180_000  # ms; the machine may be busy
pytestmark = [pytest.mark.seconds(60),
              pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)}; on Debian: apt-get install chromium")]

WRONG = "def questions(p, half):\n    return 1.96 * p * (1 - p) / half**2"
RIGHT = "def questions(p, half):\n    return math.ceil((1.96 / half) ** 2 * p * (1 - p))"
ANSWERS = [  # to the guide, each beside the ones before
    {"goal": "style", "data": "labels"}, {"size": 1.5}, {"memory": "limited", "data": "pairs"}, {"reversible": "yes"},
    {"goal": "reasoning", "check": "program", "data": "demonstrations", "amount": "plenty"}, {"goal": "maximum"}]


def smoke_copy(source: Path, target: Path) -> None:
    "The notebook as it is in the repository, without outputs, and with a budget of a few steps where it has budgets."
    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", ()):
            assert 'budget = "full"' in cell.source
            cell.source = cell.source.replace('budget = "full"', 'budget = "smoke"')
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab server on copies of two pages: its address, its token, and the folder of its runs."
    top = tmp_path_factory.mktemp("lab")
    for name in ("00_quickstart", "01_choose"):
        smoke_copy(ROOT / f"nbs/start/{name}.ipynb", top / f"nbs/start/{name}.ipynb")
    no_news = top / "JUPYTER_CONFIG_DIR/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    no_news.parent.mkdir(parents=True)
    no_news.write_text('{"fetchNews": "false"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {name: str(top / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "REALIGN_RUNS")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={top / 'nbs'}",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | own  # figures appear in the page, as for readers
    with open(top / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, top / "log")
        yield f"http://127.0.0.1:{port}", token, top / "REALIGN_RUNS"
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    "Return when the server answers."
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def page():
    "A page of the browser that reaches nothing outside this machine."
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def run_all(page, lab, notebook: str) -> None:
    "Open a notebook and run every cell from the menu."
    address, token, _ = lab
    page.goto(f"{address}/lab/tree/{notebook}?reset&token={token}")
    _wait_for_the_kernel(page, f"{address}/api/sessions?token={token}", notebook)
    choose(page, "Run", "Run All Cells")


def _wait_for_the_kernel(page, sessions: str, notebook: str) -> None:
    "Return when the page is connected to an idle kernel: before that, the lab would ask for one."
    for _ in range(PATIENCE // 500):
        page.wait_for_timeout(500)
        found = [s["kernel"] for s in json.load(urllib.request.urlopen(sessions, timeout=30)) if s["path"] == notebook]
        if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in found):
            return
    pytest.fail("no kernel came up")


def choose(page, menu: str, *entries: str) -> None:
    "Click through the menu bar."
    page.get_by_role("menuitem", name=menu, exact=True).click()
    for name in entries:
        label = page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{name}$"))
        page.locator(".lm-Menu-item").filter(has=label).click()


def cell(page, source: str):
    "The code cell that contains `source`."
    return page.locator(".jp-CodeCell").filter(has=page.locator(".jp-InputArea", has_text=source)).first


def show(page, what) -> dict:
    "Scroll until `what` is in sight; its box. Cells get their height when they come into sight, so once is not enough."
    for _ in range(20):
        what.evaluate("element => element.scrollIntoView({block: 'center'})")
        page.wait_for_timeout(200)
        box = what.bounding_box()
        if box and 0 < box["y"] + box["height"] / 2 < 900:
            return box
    pytest.fail("does not come into sight")


def look(page, name: str) -> None:
    "Keep a picture, if somebody wants to see it."
    if folder := os.environ.get("REALIGN_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(500)
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_a_reader_runs_the_quickstart(page, lab):
    "One visit, since starting the lab and the page takes longest: the table, the curves, a wrong answer, the dark theme."
    run_all(page, lab, "start/00_quickstart.ipynb")
    cell(page, "asked = attempt(").get_by_text("[196, 784]").wait_for(state="attached")  # the last cell that is run
    table_and_curves_appear(page)
    a_wrong_answer_explains_itself_and_a_right_one_is_remembered(page, lab[2] / "progress.json")
    figures_can_be_read_in_the_dark_theme(page)


def table_and_curves_appear(page) -> None:
    assert page.locator(".jp-OutputArea-output").filter(has_text="Traceback").count() == 0
    table = cell(page, "table = Rows(").locator("table")
    show(page, table)
    assert {"held-out prompts", "base", "after SFT", "after DPO", "control"} <= set(table.locator("th").all_inner_texts())
    assert "right, word for word" in table.inner_text()
    look(page, "table")
    for source in ("taught = fit(", "figure, axis = plt.subplots"):
        box = show(page, cell(page, source).locator(".jp-OutputArea img, .jp-OutputArea-output svg").last)
        assert box["width"] > 200 and box["height"] > 100, source
        look(page, "curves" if "fit" in source else "chart")


def answer(page, source: str):
    "Replace the stub, run it and the two cells below it; returns the check's cell."
    stub, check = cell(page, "def questions(p, half)"), cell(page, "asked = attempt(")
    show(page, stub)
    stub.locator(".cm-content").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(source)
    prompt = check.locator(".jp-InputPrompt")
    before = prompt.inner_text()
    for _ in range(3):
        page.keyboard.press("Shift+Enter")
    page.wait_for_function("([prompt, old]) => /\\d/.test(prompt.innerText) && prompt.innerText != old",
                           arg=[prompt.element_handle(), before])
    return check


def a_wrong_answer_explains_itself_and_a_right_one_is_remembered(page, kept: Path) -> None:
    error = answer(page, WRONG).locator(".jp-OutputArea-output", has_text="WrongAnswer")
    error.wait_for()
    show(page, error)
    said = " ".join(error.text_content().split())
    assert "Traceback" not in said
    assert "quickstart 1: questions(0.5, 0.07)" in said and "was wanted" in said and "Hint: solve the formula for n" in said
    assert "Explained in nbs/engine/18_exercises.ipynb" in said
    look(page, "wrong-answer")
    assert not kept.exists()
    answer(page, RIGHT).get_by_text("[196, 784]").wait_for()
    assert list(json.loads(kept.read_text())) == ["quickstart 1"]


def figures_can_be_read_in_the_dark_theme(page) -> None:
    darken(page)
    chart = cell(page, "figure, axis = plt.subplots").locator(".jp-OutputArea img")
    show(page, chart)
    look(page, "chart-dark")
    # On a transparent ground the labels would be black on black: each figure brings its own ground.
    assert chart.evaluate("""picture => {
        const pen = new OffscreenCanvas(4, 4).getContext('2d')
        pen.drawImage(picture, 0, 0, 4, 4, 0, 0, 4, 4)
        return pen.getImageData(1, 1, 1, 1).data[3] }""") == 255


def darken(page) -> None:
    choose(page, "Settings", "Theme", "JupyterLab Dark")
    page.locator("body[data-jp-theme-light='false']").wait_for(state="attached")


# The guide: what its form and its page say is what the terminal says

def terminal_says(capsys, answers: dict) -> dict:
    "The plan of `realign guide` with these answers as flags."
    capsys.readouterr()
    status = cli.main(["guide", "--json", *[word for name, value in answers.items() for word in (f"--{name}", str(value))]])
    plan = json.loads(capsys.readouterr().out)
    assert status == bool(plan["conflict"])
    return plan


def says(page, answer, plan: dict) -> None:
    "Wait until `answer` shows this plan, line by line and nothing else; or the contradiction."
    steps = [guide.Step(**step) for step in plan["steps"]]
    heads = [f"{i}. {step.title} ({step.name})" for i, step in enumerate(steps, 1)]
    heads += [head for head, lines in (("Afterwards", plan["evaluate"]), ("Mind", plan["notes"])) if lines]
    lines = [f"{name}: {text}" for step in steps for name, text in guide._lines(step)] + plan["evaluate"] + plan["notes"]
    wanted = {"h4": heads, "li": lines, "pre": ["\n".join(step.commands) for step in steps if step.commands],
              "p": [f"These contradict each other: {plan['conflict']}."] if plan["conflict"] else []}
    end = time.monotonic() + PATIENCE / 1000
    while (shown := {tag: answer.locator(tag).all_text_contents() for tag in wanted}) != wanted:
        assert time.monotonic() < end, f"wanted {wanted}, shown {shown}"
        page.wait_for_timeout(100)


def can_be_read(answer) -> None:
    "Every line stands out from its ground: a contrast of 4.5 and more, as WCAG 2.2 asks in 1.4.3; and none is cut off."
    faults = answer.evaluate("""answer => {
        const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true})
        const rgba = colour => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1)
                                 return [...pen.getImageData(0, 0, 1, 1).data] }
        const light = ([r, g, b]) => [r, g, b].map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
                                              .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0)
        const ground = e => { for (; e; e = e.parentElement) {
            const found = rgba(getComputedStyle(e).backgroundColor)
            if (found[3] == 255) return found }
            const sheet = document.body.appendChild(document.createElement('i'))
            sheet.style.backgroundColor = 'Canvas'
            const found = rgba(getComputedStyle(sheet).backgroundColor)
            sheet.remove()
            return found }
        return [...answer.querySelectorAll('h4, li, pre, p, span, select, label')].filter(e => e.innerText.trim()).map(e => {
            const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x)
            return [e.tagName, e.innerText.slice(0, 30), (a + 0.05) / (b + 0.05), e.scrollWidth - e.clientWidth]
        }).filter(([tag, text, contrast, over]) => contrast < 4.5 || over > 1 && !['SPAN', 'LABEL', 'SELECT'].includes(tag)) }""")
    assert not faults


def test_the_guide_s_form_answers_in_the_lab(page, lab, capsys):
    run_all(page, lab, "start/01_choose.ipynb")
    form = page.locator(".jp-CodeCell").filter(has=page.locator(".widget-dropdown")).first
    form.wait_for(state="attached")
    show(page, form)
    answer = form.locator(".widget-html-content")
    answers = {"goal": "format"}
    says(page, answer, terminal_says(capsys, answers))
    def menu(name): return form.locator(".widget-dropdown", has_text=guide.QUESTIONS[name].text).locator("select")
    for given in [*ANSWERS, {"memory": "ample"}]:
        answers |= given
        for name, value in given.items():
            if name == "size":
                form.locator(".widget-text input").fill(str(value))
                page.keyboard.press("Enter")
            else:
                menu(name).select_option(label=guide.QUESTIONS[name].options[value])
        says(page, answer, terminal_says(capsys, answers))
    assert page.locator(".jp-OutputArea-output").filter(has_text="Traceback").count() == 0
    for theme in ("light", "dark"):
        if theme == "dark":
            darken(page)
        show(page, form)
        can_be_read(form.locator(".jp-OutputArea"))
        look(page, f"form-{theme}")


def test_the_guide_s_page_answers_from_a_file(page, tmp_path, capsys):
    noise = []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: noise.append(request.url) if request.url.startswith("http") else None)
    page.context.set_offline(True)
    page.goto(guide.page().save(tmp_path / "guide.html").as_uri())
    whole, answers = page.locator(".realign-guide"), {"goal": "format"}
    answer = whole.locator("> div")
    says(page, answer, terminal_says(capsys, answers))
    for given in ANSWERS:
        answers |= given
        for name, value in given.items():
            whole.locator(f"select[name={name}]").select_option(str(value))
        says(page, answer, terminal_says(capsys, answers))
    whole.locator("select[name=goal]").select_option("reasoning")
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        for width in (1280, 400):  # a telephone's, too
            page.set_viewport_size({"width": width, "height": 900})
            can_be_read(whole)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), f"{width} px are not enough"
            look(page, f"page-{theme}-{width}")
    assert noise == []


def test_the_guide_s_page_on_the_site_is_what_the_code_says():
    notebook = nbformat.read(ROOT / "nbs/start/01_choose.ipynb", as_version=4)
    kept = [o.data["text/html"] for c in notebook.cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    assert [text for text in kept if "realign-guide" in text] == [guide.page().text], "run nbs/start/01_choose.ipynb again"
