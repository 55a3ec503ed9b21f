"""The guide, leaf by leaf of the five guides it joins; and the same plan wherever it is asked."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT

from realign_core import cli, guide
from realign_core.data.formats import FAMILIES, FORMATS
from realign_core.errors import ReAlignError
from realign_core.guide import QUESTIONS, SIZES, recommend
from realign_core.methods.registry import Card, entries


def names(goal, **answers) -> list[str]:
    return recommend(goal, **answers).methods


def said(plan) -> str:
    return str(plan)


# Every leaf of the trees (001; 002 scenarios A to D; 004 strategy logic)

LEAVES = [
    # 001: the decision guide
    ("001 teach a new capability", "format", {"data": "demonstrations"}, ["sft"]),
    ("001 can generate pairs", "style", {"data": "pairs"}, ["dpo"]),
    ("001 only binary labels", "style", {"data": "labels"}, ["kto"]),
    ("001 online with a reward", "reward", {"check": "judge"}, ["grpo"]),
    ("001 online with a program", "reward", {"check": "program"}, ["grpo"]),
    # 002 A
    ("002 A, pairs of instruction and response", "format", {"data": "demonstrations", "amount": "typical"}, ["sft"]),
    ("002 A, none: synthetic data first", "format", {"data": "nothing"}, ["sft"]),
    # 002 B
    ("002 B, pairs, memory limited", "style", {"data": "pairs", "memory": "limited"}, ["orpo"]),
    ("002 B, pairs, memory ample", "style", {"data": "pairs", "memory": "ample"}, ["dpo"]),
    ("002 B, thumbs only", "style", {"data": "labels", "memory": "limited"}, ["kto"]),
    # 002 C
    ("002 C, verifiable", "reasoning", {"check": "program", "data": "problems"}, ["sft", "grpo"]),
    ("002 C, verifiable, traces at hand", "reasoning", {"check": "program", "data": "demonstrations"}, ["sft", "grpo"]),
    ("002 C, open-ended, a judge", "reasoning", {"check": "judge"}, ["sft", "online_dpo"]),
    ("002 C, open-ended, a learned reward", "reasoning", {"check": "none", "data": "pairs"}, ["sft", "reward", "online_dpo"]),
    # 002 D
    ("002 D", "maximum", {"check": "judge"}, ["ppo"]),
    ("002 D, reward to be learned", "maximum", {"data": "pairs"}, ["reward", "ppo"]),
    # 004: strategy logic, and its sections
    ("004 facts: CPT", "domain", {"data": "text"}, ["cpt", "sft"]),
    ("004 facts: RAG", "domain", {"amount": "little"}, ["rag"]),
    ("004 facts, internal", "internal", {"data": "text"}, ["cpt", "sft"]),
    ("004 facts, a language", "language", {"data": "text"}, ["cpt", "sft"]),
    ("004 reasoning: cold start, GRPO", "reasoning", {"check": "program"}, ["sft", "grpo"]),
    ("004 style, standard", "style", {"data": "pairs"}, ["dpo"]),
    ("004 style, resource-save", "style", {"data": "pairs", "memory": "limited"}, ["orpo"]),
    ("004 limited data: SFT", "format", {"data": "demonstrations", "amount": "little"}, ["sft"]),
    ("004 limited data: KTO", "style", {"data": "labels", "amount": "little"}, ["kto"]),
    ("004 distillation", "reasoning", {"check": "program", "data": "demonstrations", "amount": "plenty"}, ["sft", "grpo"]),
    ("004 pre-training", "pretrain", {"data": "text"}, ["pretraining", "sft"]),
    # 000: the use cases of its table
    ("000 calibration", "uncertainty", {}, ["calibration"]),
    ("000 anti-hallucination", "hallucination", {}, ["honesty"]),
    ("000 uncensoring", "refusal", {"data": "contrast"}, ["abliteration"]),
    ("000 uncensoring, reversible", "refusal", {"data": "contrast", "reversible": "yes"}, ["steering"]),
    ("000 runtime control", "control", {}, ["steering"]),
    ("000 runtime control, reversible", "control", {"reversible": "yes"}, ["steering"]),
]


@pytest.mark.parametrize(("goal", "answers", "wanted"), [leaf[1:] for leaf in LEAVES], ids=[leaf[0] for leaf in LEAVES])
def test_leaf(goal, answers, wanted):
    assert names(goal, **answers) == wanted


OTHERS = [  # the second name that a leaf of the guides gives
    ("002 B SimPO", "style", {"data": "pairs", "memory": "limited"}, 0, "simpo"),
    ("002 C PPO", "reasoning", {"check": "judge"}, 1, "ppo"),
    ("002 D iterative DPO", "maximum", {"check": "judge"}, 0, "online_dpo"),
    ("004 RLOO", "reasoning", {"check": "program"}, 1, "rloo"),
    ("000 RLVR", "reasoning", {"check": "program"}, 1, "rlvr"),
    ("000 CPO", "style", {"data": "pairs"}, 0, "cpo"),
    ("000 LoRA", "format", {"data": "demonstrations"}, 0, "lora"),
]


@pytest.mark.parametrize(("goal", "answers", "step", "other"), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS])
def test_second_choice(goal, answers, step, other):
    assert any(f"({other})" in text for text in recommend(goal, **answers).steps[step].others)


ROWS = [  # typical volumes: 001 for small models, 004 for 7B to 70B
    ("001 SFT", "format", {"data": "demonstrations"}, 1, 0, "1,000–5,000"),
    ("001 DPO", "style", {"data": "pairs"}, 1, 0, "1,000–3,000"),
    ("001 KTO", "style", {"data": "labels"}, 1, 0, "2,000–5,000"),
    ("001 GRPO", "reward", {"check": "judge"}, 1, 0, "5,000–20,000"),
    ("004 general chat", "format", {"data": "demonstrations"}, 7, 0, "1,000–10,000"),
    ("004 one task", "format", {"data": "demonstrations"}, 7, 0, "500–2,000 (one task)"),
    ("004 gold samples", "format", {"data": "demonstrations", "amount": "little"}, 7, 0, "1,000 (little data)"),
    ("004 cold start", "reasoning", {"check": "program"}, 7, 0, "2,000–5,000"),
    ("004 cold start, a small model", "reasoning", {"check": "program"}, 1, 0, "2,000–5,000"),
    ("004 distillation", "reasoning", {"check": "program", "data": "demonstrations", "amount": "plenty"}, 7, 0,
     "100,000–1,000,000"),
    ("004 DPO", "style", {"data": "pairs"}, 7, 0, "10,000–60,000"),
    ("004 ORPO", "style", {"data": "pairs", "memory": "limited"}, 70, 0, "10,000–60,000"),
    ("004 online RL", "reasoning", {"check": "program"}, 70, 1, "10,000–50,000"),
    ("004 reward model", "maximum", {"data": "pairs"}, 7, 0, "100,000–1,000,000"),
    ("004 domain", "domain", {"data": "text"}, 7, 0, "5,000,000,000–20,000,000,000 tokens"),
    ("004 language", "language", {"data": "text"}, 7, 0, "10,000,000,000–50,000,000,000 tokens"),
    ("004 internal", "internal", {"data": "text"}, 7, 0, "1,000,000,000–5,000,000,000 tokens"),
    ("004 Chinchilla, 7B", "pretrain", {"data": "text"}, 7, 0, "140 billion tokens"),
    ("004 Chinchilla, 70B", "pretrain", {"data": "text"}, 70, 0, "1,400 billion tokens"),
]


@pytest.mark.parametrize(("goal", "answers", "size", "step", "rows"), [case[1:] for case in ROWS], ids=[case[0] for case in ROWS])
def test_volume(goal, answers, size, step, rows):
    assert rows in recommend(goal, **answers, size=size).steps[step].rows


WORDS = [  # advice of the guides that a plan has to repeat
    ("001 rubric threshold of SFT", "format", {"data": "demonstrations"}, "0.80"),
    ("001 margin of a pair", "style", {"data": "pairs"}, "0.15"),
    ("001 balance of KTO", "style", {"data": "labels"}, "60–70 %"),
    ("001 strategy 5", "style", {"data": "scored"}, "strategy 5"),
    ("001 strategies 1 to 4", "style", {"data": "nothing"}, "strategies 1–4"),
    ("001 SFT, then DPO", "format", {"data": "demonstrations"}, "SFT → DPO"),
    ("001 capability first", "reward", {"check": "program"}, "SFT first"),
    ("001 reward hacking", "reward", {"check": "judge"}, "maximised until it breaks"),
    ("002 A synthetic, filtered", "format", {"data": "prompts"}, "a stronger model writes them, a filter"),
    ("002 rejection sampling for the cold start", "reasoning", {"check": "program"}, "rejection sampling"),
    ("002 D why", "maximum", {"check": "judge"}, "static pairs miss"),
    ("002 end: alignment tax", "style", {"data": "pairs"}, "alignment tax"),
    ("002 end: judge", "style", {"data": "pairs"}, "a judge"),
    ("002 end: GSM8K", "reasoning", {"check": "program"}, "GSM8K"),
    ("002 end: IFEval", "format", {"data": "demonstrations"}, "IFEval"),
    ("003 capability retention", "reasoning", {"check": "program"}, "95%"),
    ("003 KL, with its unit", "reasoning", {"check": "program"}, "at most 0.1 nats per token"),
    ("004 mix in general text", "domain", {"data": "text"}, "10–20 % general text"),
    ("004 SFT is not for facts", "domain", {"data": "text"}, "SFT is not for facts"),
    ("004 RAG beside CPT", "domain", {"data": "text"}, "RAG"),
    ("004 tokenizer of a new language", "language", {"data": "text"}, "tokenizer"),
    ("004 over-training", "pretrain", {"data": "text"}, "15 trillion"),
    ("004 PPO's four models", "maximum", {"check": "judge"}, "policy + reference + reward + critic"),
    ("004 GRPO's two models", "reasoning", {"check": "program"}, "policy + reference,"),
    ("000 calibration comes last", "uncertainty", {}, "comes last"),
    ("000 anti-hallucination comes last", "hallucination", {}, "comes last"),
]


@pytest.mark.parametrize(("goal", "answers", "words"), [case[1:] for case in WORDS], ids=[case[0] for case in WORDS])
def test_advice(goal, answers, words):
    assert words in said(recommend(goal, **answers))


CONFLICTS = [
    ("maximum", {"memory": "limited"}, "little memory"), ("maximum", {}, "nothing that could tell it"),
    ("reward", {}, "nothing that could give one"), ("pretrain", {"reversible": "yes"}, "no earlier state"),
    ("pretrain", {"amount": "little"}, "20 tokens"), ("language", {"amount": "little"}, "10 billion tokens")]


@pytest.mark.parametrize(("goal", "answers", "why"), CONFLICTS)
def test_contradictions_are_named(goal, answers, why):
    plan = recommend(goal, **answers)
    assert why in plan.conflict and plan.steps == () and "contradict each other" in said(plan)


def combinations():
    for combination in product(*[q.options for q in QUESTIONS.values()]):
        yield dict(zip(QUESTIONS, combination, strict=True))


def test_every_combination_yields_a_plan_or_a_contradiction():
    reached = set()
    for answers in combinations():
        plan = recommend(**answers)
        assert bool(plan.steps) != bool(plan.conflict)
        assert all(s.why and s.source and s.memory and s.risk and s.paper for s in plan.steps)
        assert bool(plan.evaluate) == bool(plan.steps)
        reached.add(plan.leaf)
    assert reached == {leaf.name for leaf in guide.leaves()}


def test_leaves_have_names_of_their_own():
    found = [leaf.name for leaf in guide.leaves()]
    assert len(found) == len(set(found)) and all(leaf.wants or leaf.conflict for leaf in guide.leaves())


def test_every_role_is_played_and_every_role_of_a_card_exists():
    played = {role for entry in guide.catalogue().values() for role in entry.card.roles}
    assert played == set(guide.ROLES)
    assert {want.role for leaf in guide.leaves() for want in leaf.wants} <= set(guide.ROLES)


def test_every_method_is_somewhere_in_a_plan():
    found = set()
    for answers in combinations():
        for step in recommend(**answers).steps:
            found |= {step.name, *(text.partition("), when ")[0].rpartition("(")[2] for text in step.others)}
    missing = set(entries()) - found - {"rejection"}  # which makes the worked answers of a cold start
    assert not missing, f"no plan has {missing}: give their cards roles, of {', '.join(guide.ROLES)}"


def test_cards_agree_with_their_methods():
    from realign_core.methods.registry import get
    for entry in guide.catalogue().values():
        if entry.page.startswith("methods/") and entry.trains and get(entry.name).rollout is None:
            assert get(entry.name).reference == ("reference" in entry.card.held), entry.name
        assert entry.format in {**FORMATS, **FAMILIES}
        assert entry.card.purpose and entry.card.hazard and entry.card.complexity and entry.card.compute
        assert all(0 < low <= high for low, high in entry.card.rows.values())


# Answers that are none

@pytest.mark.parametrize("answers", [
    {"goal": "world peace"}, {"goal": "style", "data": "vibes"}, {"goal": "style", "check": ""}, {"goal": "style", "data": None},
    {"goal": "style", "memory": 8}, {"goal": ["style"]}, {"goal": "style", "size": 0}, {"goal": "style", "size": -7},
    {"goal": "style", "size": float("nan")}, {"goal": "style", "size": float("inf")}, {"goal": "style", "size": "7B"},
    {"goal": "style", "size": True}])
def test_bad_answers(answers):
    with pytest.raises(ReAlignError, match="is no answer to|wanted billions"):
        recommend(**answers)


def test_a_card_refuses_other_words():
    with pytest.raises(ReAlignError, match="low, medium or high"):
        Card("", "", "", "", "", "", "", complexity="tricky")


# Memory, time, evidence

def test_memory_by_hand():
    sft, ppo = entries()["sft"].card, entries()["ppo"].card
    assert guide.memory_gib(sft, 1.0) == pytest.approx(16e9 / 2**30)
    assert guide.memory_gib(ppo, 1.0) == pytest.approx((2 * 16 + 2 * 2) * 1e9 / 2**30)
    assert guide.memory_gib(ppo, 1.0, True) == pytest.approx((2 * (2 + 16 * guide.SHARE) + 2) * 1e9 / 2**30)


def test_time_by_hand():
    sft = entries()["sft"]
    assert guide.hours(sft, 1.0, 1000) == pytest.approx(6 * 1e9 * 1000 * 512 / 1e14 / 3600)
    dpo = entries()["dpo"]
    assert guide.hours(dpo, 1.0, 1000) == pytest.approx((6 + 2) * 1e9 * 1000 * 2 * 512 / 1e14 / 3600)


def test_less_memory_never_needs_more():
    for answers in combinations():
        if answers["memory"] == "ample" and answers["goal"] != "maximum":
            def held(plan): return sum(len(guide.catalogue()[name].card.held) for name in plan.methods)
            assert held(recommend(**{**answers, "memory": "limited"})) <= held(recommend(**answers))


def test_measured_figures_are_the_records(monkeypatch, tmp_path):
    kept = [r for name in ("full", "seeds") for r in json.loads((ROOT / "results" / f"{name}.json").read_text())]
    for step in recommend("style", data="labels").steps:
        assert len(step.measured) == sum(r["notebook"] == "kto" and r["passed"] and r["budget"] == "full" for r in kept) > 0
    import realign_core
    monkeypatch.setattr(realign_core, "__file__", str(tmp_path / "site" / "realign_core" / "__init__.py"))
    guide.refresh()
    assert recommend("style", data="labels").steps[0].measured == ()  # an installed package has no records
    monkeypatch.undo()
    guide.refresh()


# Commands that really run

def test_commands_can_be_parsed_and_name_pages_and_parameters():
    seen = set()
    for answers in combinations():
        for step in recommend(**answers).steps:
            seen |= set(step.commands)
    assert len(seen) > 20
    for command in seen:
        words = command.partition("#")[0].split()
        if words[0] == "python":
            compile(command.split('"')[1], "command", "exec")
            continue
        args = cli.parser().parse_args(words[1:])
        if args.command == "run":
            cli.check_parameters(cli.find_notebook(args.name[0]), dict(args.parameter))


def test_a_plan_s_commands_run(tmp_path, monkeypatch, capsys):
    from realign_core.tinyworld import World, preference_rows
    monkeypatch.chdir(tmp_path)
    Path("preference.jsonl").write_text("\n".join(json.dumps(row) for row in preference_rows(World(), "style", n=60)))
    check, fit, *_ = recommend("style", data="pairs", memory="limited").steps[0].commands
    assert cli.main(check.split()[1:]) == 0 and "60" in capsys.readouterr().out
    exec(fit.split('"')[1].replace("MODEL", "tinyworld-instruct").replace("out='runs", "steps=1, progress=False, out='runs"), {})
    assert any(Path("out/orpo").glob("*.safetensors"))


def test_a_short_name_means_the_method():
    assert cli.find_notebook("dpo").room == "methods" and cli.find_notebook("workflows/dpo").room == "workflows"


# The same plan in Python, form, terminal and page

def test_form_answers_like_python():
    pytest.importorskip("ipywidgets")
    *menus, answer = guide.form().children
    menus = {menu.tooltip: menu for menu in menus}
    assert all(menus[name].description == question.text for name, question in QUESTIONS.items())
    assert answer.value == guide.as_html(recommend("format"))
    for answers in ({"goal": "style", "data": "labels", "size": 7.0}, {"goal": "maximum", "memory": "limited"},
                    {"goal": "reasoning", "data": "problems", "check": "program", "size": 1.5}):
        now = {name: menu.value for name, menu in menus.items()} | answers
        for name, value in answers.items():
            menus[name].value = value
        assert answer.value == guide.as_html(recommend(**now))


def test_html_escapes():
    from dataclasses import replace
    plan = recommend("style", data="labels")
    assert "<script" not in guide.as_html(replace(plan, notes=("<script>alert(1)</script>",)))


def test_terminal_with_flags(capsys):
    assert cli.main(["guide", "--goal", "style", "--data", "labels", "--size", "1.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == recommend("style", data="labels", size=1.5).dict()
    assert cli.main(["guide", "--goal", "maximum", "--memory", "limited"]) == 1
    assert "contradict each other" in capsys.readouterr().out
    assert cli.main(["guide", "--goal", "fame"]) == 2
    assert "goal='fame' is no answer" in capsys.readouterr().err


def test_terminal_without_a_terminal_asks_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert cli.main(["guide"]) == 2
    assert "--goal is missing" in capsys.readouterr().err


def in_terminal(typed: str, *flags: str) -> tuple[str, int]:
    "What `realign guide` shows in a pseudo-terminal, and its status."
    code = "import sys; from realign_core.cli import main; sys.exit(main(['guide', *sys.argv[1:]]))"
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code, *flags], stdin=follower, stdout=follower, stderr=follower,
                               cwd=ROOT, close_fds=True)
    os.close(follower)
    os.write(leader, typed.encode())
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other side has closed
            break
        if not part:
            break
        shown += part
    os.close(leader)
    return shown.decode().replace("\r\n", "\n"), process.wait(timeout=60)


def test_terminal_asks_one_by_one():
    shown, status = in_terminal("style\nthumbs\n4\n\n\n", "--json")
    assert status == 0
    for name in ("goal", "data", "memory", "reversible"):
        assert QUESTIONS[name].text in shown
    assert QUESTIONS["check"].text not in shown          # does not matter here
    assert "'thumbs' is none of them" in shown
    assert json.loads(shown[shown.index("{\n"):]) == recommend("style", data="labels").dict()


def test_terminal_asks_only_what_the_flags_leave_open():
    answers = iter(["program"])
    said = []
    plan = guide.interview({"goal": "reward", "memory": "ample", "reversible": "no"}, lambda _: next(answers), said.append)
    assert plan == recommend("reward", check="program") and len(said) == 4


def test_terminal_ends_where_the_input_ends():
    shown, status = in_terminal("\x04")
    assert status == 2 and "no answer" in shown and "Traceback" not in shown


def unpacked(table, answers, size):
    "A plan from the page's table, by the same steps as the page's script."
    i = 0
    for question in table["questions"]:
        i = i * len(question["options"]) + list(question["options"]).index(answers[question["name"]])
    found, s = table["plans"][table["index"][i]], list(table["sizes"]).index(size)
    steps = [{**table["kept"][step], **table["kept"][sized[s]]} for step, sized in found["steps"]]
    return {**table["kept"][found["plan"]], "steps": steps, "answers": {**answers, "size": size}}


def test_the_page_s_table_holds_the_same_plans():
    table = json.loads(json.dumps(guide.table()))
    for i, answers in enumerate(combinations()):
        size = SIZES[i % len(SIZES)]
        assert unpacked(table, answers, size) == recommend(**answers, size=size).dict()


def node() -> str | None:
    "A JavaScript engine: the system's, or the one that comes with playwright."
    if found := shutil.which("node"):
        return found
    try:
        import playwright
    except ModuleNotFoundError:
        return None
    path = Path(playwright.__file__).parent / "driver" / "node"
    return str(path) if path.is_file() else None


@pytest.mark.skipif(node() is None, reason="no JavaScript engine here; the table is tested in Python")
def test_the_page_s_script_gives_the_same_plans(tmp_path):
    asked = [({**answers}, SIZES[i % len(SIZES)]) for i, answers in enumerate(combinations()) if i % 7 == 0]
    script = f"{guide._SCRIPT}\nconst T = {json.dumps(guide.table())};\n" + \
        f"console.log(JSON.stringify({json.dumps(asked)}.map(([a, s]) => plan(T, a, s))));"
    (tmp_path / "page.js").write_text(script)
    done = subprocess.run([node(), tmp_path / "page.js"], capture_output=True, text=True, check=True)
    for (answers, size), plan in zip(asked, json.loads(done.stdout), strict=True):
        assert plan == recommend(**answers, size=size).dict()


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    text = guide.page().save(tmp_path / "guide.html").read_text()
    assert text.count("</script>") == 1 and text.startswith("<!doctype html>")
    assert not [word for word in ("src=", "href=", "fetch(", "import ") if word in text.split("start({")[0]]


# Figures and tables

def test_mermaid_has_every_leaf_and_question():
    text = guide.mermaid()
    assert text.count("contradict each other") == sum(bool(leaf.conflict) for leaf in guide.leaves())
    assert all(q.text in text for q in QUESTIONS.values())
    boxes = {line.split("[")[0].split("(")[0].split("{")[0].strip() for line in text.splitlines()[1:] if "-->" not in line}
    ends = {word for line in text.splitlines() if "-->" in line for word in (line.split()[0], line.split()[-1])}
    assert ends == boxes and "dpo" in text


def test_pages_that_are_named_exist():
    for step in {s for answers in combinations() for s in recommend(**answers).steps}:
        assert not step.page or (ROOT / "nbs" / step.page).is_file()
        assert not step.make or cli.find_notebook(f"data/{step.make}")
    import re
    for text in [*guide.EXAMINE.values(), *(page for _, page in guide.CHECKLIST)]:
        for page in re.findall(r"\b(?:data|rewards|evaluate|methods)/\w+", text):
            assert (ROOT / "nbs" / f"{page}.ipynb").is_file(), page


def test_a_planned_method_gives_way_to_its_notebook(monkeypatch):
    from realign_core.methods.registry import Entry
    own = Card("own words", "", "", "", "", "own risk", "own paper")
    entry = Entry("rag", "Retrieval", "", own, "methods/30_rag.ipynb", False)
    monkeypatch.setattr(guide, "entries", lambda: {"rag": entry})
    found = guide.catalogue()["rag"]
    assert found.page and found.card.use == "own words" and found.card.roles == guide.PLANNED["rag"].card.roles
    assert found.card.reversible and found.format == "text"
