"""The template lint: no framework needed, what it raises, and defects beside the ones that the notebook plants."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from realign_core.data.templates import CHECKS, VERDICTS, lint, tokenizer_for
from realign_core.errors import ModelError
from snapshots import make_tokenizer

HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
MARKED = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
          "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
          "{% endfor %}") + HEADER


def verdict(template, check, **settings):
    return lint(tokenizer_for(template, **settings)).verdicts[check]


def test_sound_templates_pass_everything():
    for source in ("tinyworld-base", "tinyworld-instruct", make_tokenizer(), tokenizer_for(TURN + HEADER), tokenizer_for(MARKED)):
        report = lint(source)
        assert report.ok and set(report.verdicts.values()) <= {"pass", "n/a"}, report
        assert list(report.verdicts) == list(CHECKS)


@pytest.mark.parametrize("check, template", [
    ("EOS trained", TURN.replace(" + '<|im_end|>\n'", " + '\n'") + HEADER),
    ("EOS trained", MARKED.replace("{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
                                   "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}")),
    ("no double BOS", "{{ bos_token }}{{ bos_token }}" + TURN + HEADER),
    ("prompt is a prefix", TURN + HEADER.replace("assistant\n", "assistant\n<think>\n")),
    ("prompt is a prefix", TURN + HEADER.replace("assistant\n", "model\n")),
    ("marks agree", MARKED.replace("{% generation %}", "").replace("{{ '<|im_start|>' + m['role'] + '\n' }}",
                                                                    "{% generation %}{{ '<|im_start|>' + m['role'] + '\n' }}")
                          .replace("{% endgeneration %}", "").replace("{% endfor %}", "{% endgeneration %}{% endfor %}")),
    ("marks agree", MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'nobody'")),
    ("no empty thoughts", TURN.replace("m['content']", "m['content'].split('</think>')[-1]") + HEADER),
    ("ends in its own turn", "{% for m in messages %}{% if m['role'] == 'user' %}{{ '' if loop.first else '<|end|>' }}{% endif %}"
                             "{{ '\n' + m['role'] + ': ' + m['content'] }}{% endfor %}"
                             "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"),
    ("system kept", TURN.replace("in messages", "in messages if m['role'] != 'system'") + HEADER),
    ("turns are stable", TURN.replace("in messages", "in messages[-2:]") + HEADER)])
def test_planted_defects_fail(check, template):
    report = lint(tokenizer_for(template))
    assert report.verdicts[check] == "fail" and not report.ok, report
    finding = report[check]
    assert finding.why in repr(report) and (finding.evidence is None or repr(finding.evidence))


def test_settings_of_the_tokenizer():
    chatml = TURN + HEADER
    assert verdict(chatml, "PAD is not EOS", pad="<|im_end|>") == "fail"
    assert verdict(chatml, "PAD is not EOS", pad="<|endoftext|>", eos="<|endoftext|>") == "fail"
    assert verdict(chatml, "PAD is not EOS", pad="<|im_end|>", eos="<|endoftext|>") == "fail"
    assert verdict(chatml, "PAD is not EOS", pad=None) == "warn"
    assert verdict(chatml, "EOS trained", eos="<|endoftext|>") == "fail"
    assert verdict(chatml, "no double BOS", bos=None) == "pass"


def test_a_tokenizer_that_writes_its_own_bos():
    from tokenizers.processors import TemplateProcessing
    tokenizer = make_tokenizer()
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    finding = lint(tokenizer)["no double BOS"]
    assert finding.verdict == "warn" and "add_special_tokens=False" in finding.why
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    assert lint(tokenizer).verdicts["no double BOS"] == "warn"


def test_a_merge_across_the_edge_of_the_prompt():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    finding = lint(tokenizer)["prompt is a prefix"]
    assert finding.verdict == "fail" and "merges" in finding.why and len(finding.evidence.sequences) == 2


def test_a_system_message_refused_aloud_is_no_defect():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TURN + HEADER
    finding = lint(tokenizer_for(refusing))["system kept"]
    assert finding.verdict == "pass" and "no system here" in finding.why


def test_a_folder_and_its_stop_tokens(tmp_path):
    tokenizer = tokenizer_for(TURN + HEADER, eos="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    assert lint(tmp_path).verdicts["EOS trained"] == "fail"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for content in ({"eos_token_id": [0, end]}, {"eos_token_id": end}):
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        assert lint(str(tmp_path)).ok
    (tmp_path / "generation_config.json").write_text("[1, 2")
    assert lint(tmp_path).verdicts["EOS trained"] == "fail"


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "{{ raise_exception('never') }}", "{% for", "nothing"])
def test_templates_that_cannot_be_looked_at(template):
    with pytest.raises(ModelError):
        lint(tokenizer_for(template))


def test_sources_that_are_none(tmp_path):
    for source in (tmp_path / "nowhere", tmp_path, "owner/name", make_tokenizer(chat=False)):
        with pytest.raises(ModelError):
            lint(source)


def test_shown_safely():
    report = lint(tokenizer_for(TURN.replace("in messages", "in messages if m['role'] != 'system'") + HEADER))
    page = report._repr_html_()
    assert "<|im_start|>" not in page and "&lt;|im_start|&gt;" in page and "dropped" in page


def test_neither_torch_nor_mlx_is_needed():
    code = ("import sys\nfor name in ('torch', 'mlx', 'mlx.core'): sys.modules[name] = None\n"
            "from realign_core.data.templates import lint\nassert lint('tinyworld-instruct').ok")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.seconds(7)
def test_every_template_that_trl_carries_is_judged():
    from pathlib import Path
    trl = pytest.importorskip("trl")
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    reports = {path.stem: lint(tokenizer_for(path.read_text(encoding="utf-8"))) for path in files}
    assert len(reports) > 20 and all(set(r.verdicts.values()) <= set(VERDICTS) for r in reports.values())
    for name in ("qwen2_5_training", "llama3_training", "gemma3_training"):
        assert set(reports[name].verdicts.values()) == {"pass"}, reports[name]
    assert reports["glm4moe"].verdicts["EOS trained"] == "fail" and reports["glm4moe_training"].verdicts["EOS trained"] == "pass"
    assert reports["qwen3"].verdicts["turns are stable"] == "fail"
