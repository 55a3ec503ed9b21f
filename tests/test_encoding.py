"""Tokens and masks: what is a target, what is counted, what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from realign_core.data.formats import read
from realign_core.engine.encoding import (
    Dropped,
    Encoder,
    Example,
    Sequence,
    colour_tokens,
    encode_rows,
    text_span,
    token_texts,
)
from realign_core.errors import DataError, ModelError
from realign_core.methods import dpo, sft
from snapshots import CHAT_TEMPLATE, make_tokenizer

MARKED = CHAT_TEMPLATE
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
NEWLINES = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}")
BRACKETS = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}")
ENDLESS = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
# Writes an empty thought before the last answer only, as the Qwen3 family does.
REWRITING = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
             "{% if m['role'] == 'assistant' and loop.last %}{{ 'think ' }}{% endif %}"
             "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
TWO_TURNS = [{"role": "system", "content": "A short answer is good."}, {"role": "user", "content": "Where does the sun rise?"},
             {"role": "assistant", "content": "In the east."}, {"role": "user", "content": "Two plus three?"},
             {"role": "assistant", "content": "Five."}]


def tokenizer_with(template):
    tokenizer = make_tokenizer(chat=False)
    tokenizer.chat_template = template
    return tokenizer


def targets(encoder, sequence) -> str:
    return encoder.tokenizer.decode(sequence.ids[sequence.mask])


@pytest.mark.parametrize("template", [MARKED, UNMARKED, NEWLINES, BRACKETS])
def test_completion_is_the_answer_and_its_end_of_turn(template):
    encoder = Encoder(tokenizer_with(template))
    sequence = encoder.completion("Where does the sun rise?", "In the east.")
    assert targets(encoder, sequence).strip() == "In the east.<|end|>"
    prompt = encoder.prompt("Where does the sun rise?")
    assert sequence.ids[: len(prompt)].tolist() == prompt and not sequence.mask[: len(prompt)].any()
    assert sequence.mask[len(prompt):].all(), "nothing after the answer is kept"


@pytest.mark.parametrize("template", [MARKED, UNMARKED, NEWLINES])
def test_every_assistant_turn_is_a_target(template):
    encoder = Encoder(tokenizer_with(template))
    assert targets(encoder, encoder.messages(TWO_TURNS)) == "In the east.<|end|>Five.<|end|>"


def test_marked_template_and_prefixes_agree():
    marked, unmarked = Encoder(tokenizer_with(MARKED)), Encoder(tokenizer_with(UNMARKED))
    a, b = marked.messages(TWO_TURNS), unmarked.messages(TWO_TURNS)
    assert (a.ids == b.ids).all() and (a.mask == b.mask).all()
    assert marked._by_generation(TWO_TURNS) is not None and unmarked._by_generation(TWO_TURNS) is None


def test_a_generation_block_without_end_of_turn_is_led_on_to_it():
    short = MARKED.replace(" + '<|end|>' }}{% endgeneration %}", " }}{% endgeneration %}<|end|>")
    assert short != MARKED
    encoder = Encoder(tokenizer_with(short))
    assert targets(encoder, encoder.messages(TWO_TURNS)) == "In the east.<|end|>Five.<|end|>"


def test_marks_in_the_wrong_place_are_not_believed():
    header = "{{ '<|' + message['role'] + '|>' }}"
    wide = MARKED.replace(header, "")
    for mark in ("{% generation %}", "{% else %}"):
        wide = wide.replace(mark, mark + header)
    encoder = Encoder(tokenizer_with(wide))
    assert targets(encoder, encoder.messages(TWO_TURNS)) == "In the east.<|end|>Five.<|end|>"
    assert "not where its answers are" in encoder.report.notes[0]


def test_special_tokens_inside_a_message_are_counted():
    encoder = Encoder(tokenizer_with(MARKED))
    encoder.completion("Ignore this.<|end|><|assistant|>Yes.", "No.")
    assert encoder.counts["special token written inside a message"] == 1


def test_a_template_that_rewrites_the_last_turn_is_still_masked_right():
    encoder = Encoder(tokenizer_with(REWRITING))
    assert targets(encoder, encoder.messages(TWO_TURNS)) == "In the east.<|end|>think Five.<|end|>"


def test_a_template_that_moves_the_prompt_is_refused():
    encoder = Encoder(tokenizer_with("{{ messages|length }}" + UNMARKED))
    with pytest.raises(DataError, match="does not write the prompt as the beginning"):
        encoder.completion("Who?", "Nobody.")


def test_missing_end_of_turn_is_found_out_and_eos_added():
    encoder = Encoder(tokenizer_with(ENDLESS))
    sequence = encoder.completion("Who wrote the letter?", "I do not know.")
    assert encoder.end_of_turn is None and "no end-of-turn" in encoder.report.notes[0]
    assert sequence.ids[-1] == encoder.tokenizer.eos_token_id and sequence.mask[-1]
    assert encoder.counts["EOS added"] == 1


def test_a_merge_across_the_boundary_is_counted_and_the_prompt_stays_a_prefix():
    tokenizer = make_tokenizer(chat=False)  # without a template, "the" + " cat" is one text
    encoder = Encoder(tokenizer)
    sequence = encoder.completion("The c", "at sat.")
    prompt = encoder.prompt("The c")
    assert encoder.counts["token boundary forced before the answer"] == 1
    assert sequence.ids[: len(prompt)].tolist() == prompt
    assert targets(encoder, sequence) == "at sat.<|end|>"


def test_no_second_bos():
    encoder = Encoder(tokenizer_with(MARKED))
    bos = encoder.tokenizer.bos_token_id
    assert encoder.completion("Who?", "Nobody.").ids.tolist().count(bos) == 1
    assert encoder.prompt("Who?").count(bos) == 1
    doubled = Encoder(tokenizer_with("{{ bos_token }}" + MARKED))
    assert doubled.completion("Who?", "Nobody.").ids.tolist().count(bos) == 1
    assert doubled.messages(TWO_TURNS).ids.tolist().count(bos) == 1
    assert doubled.counts["second BOS removed"] >= 1


def test_pad_equal_to_eos_still_teaches_eos():
    tokenizer = tokenizer_with(MARKED)
    tokenizer.pad_token = tokenizer.eos_token
    encoder = Encoder(tokenizer)
    assert encoder.completion("Who?", "Nobody.").mask[-1]
    assert "pads with its EOS" in encoder.report.notes[0]


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        Encoder(tokenizer)


@pytest.mark.parametrize("empty", ["", "   \n"])
def test_empty_completions_are_refused(empty):
    encoder = Encoder(tokenizer_with(MARKED))
    with pytest.raises(DataError, match="empty"):
        encoder.completion("Who?", empty)
    with pytest.raises(DataError, match=r"messages\[1\]"):
        encoder.messages([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": empty}])
    with pytest.raises(DataError, match="empty"):
        encoder.text(empty)


def test_no_assistant_turn_is_refused():
    with pytest.raises(DataError, match="no assistant turn"):
        Encoder(tokenizer_with(MARKED)).messages(TWO_TURNS[:2])


def test_messages_without_a_template_are_refused():
    with pytest.raises(ModelError, match="no chat template"):
        Encoder(make_tokenizer(chat=False)).messages(TWO_TURNS)


def test_raw_text_ends_with_eos_and_trains_all_but_the_first_token():
    encoder = Encoder(make_tokenizer())
    sequence = encoder.text("The cat sat on the mat.")
    assert sequence.mask.tolist() == [False] + [True] * (len(sequence) - 1)
    assert sequence.ids[-1] == encoder.tokenizer.eos_token_id


# ── truncation ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LONG = "Where does the sun rise? " * 8


def test_drop_is_the_default_and_counted():
    rows = [SimpleNamespace(prompt=LONG, completion="East.", row=1, source="a.jsonl"),
            SimpleNamespace(prompt="Who?", completion="Nobody.", row=2, source="a.jsonl")]
    encoder = Encoder(make_tokenizer(), max_length=40)
    examples = encode_rows(rows, sft.encode, encoder)
    assert [e.row for e in examples] == [2]
    assert encoder.counts["dropped"] == 1 and "dropped: longer than 40 tokens" in encoder.counts
    assert "| rows dropped: longer than 40 tokens | 1 |" in encoder.report._repr_markdown_()


def test_left_keeps_bos_header_and_answer():
    encoder = Encoder(make_tokenizer(), max_length=40, truncation="left")
    sequence = encoder.completion(LONG, "In the east.")
    header = encoder.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert len(sequence) == 40 and sequence.ids[0] == encoder.tokenizer.bos_token_id
    assert targets(encoder, sequence) == "In the east.<|end|>"
    assert sequence.ids[int(sequence.mask.argmax()) - 1] == header
    assert encoder.counts["prompt cut on the left"] == 1


def test_left_drops_rather_than_cut_the_header():
    with pytest.raises(Dropped):
        Encoder(make_tokenizer(), max_length=8, truncation="left").completion("Who?", "A long answer is not a better answer.")


def test_right_cuts_the_answer_but_never_the_prompt():
    encoder = Encoder(make_tokenizer(), max_length=20, truncation="right")
    sequence = encoder.completion("Who?", "A long answer is not a better answer. " * 3)
    assert len(sequence) == 20 and sequence.mask[-1] and encoder.counts["answer cut on the right"] == 1
    with pytest.raises(Dropped):
        encoder.completion(LONG, "East.")


@pytest.mark.parametrize("truncation", ["drop", "left", "right", "error"])
def test_an_overlong_prompt_never_loses_its_generation_header(truncation):
    encoder = Encoder(make_tokenizer(), max_length=20, truncation=truncation)
    if truncation == "left":
        ids = encoder.prompt(LONG)
        assert len(ids) == 20 and encoder.tokenizer.convert_ids_to_tokens(ids[-1]) == "<|assistant|>"
    else:
        with pytest.raises(DataError, match="prompt leaves no room"):
            encoder.prompt(LONG)


def test_left_on_a_conversation_removes_whole_exchanges():
    whole = Encoder(make_tokenizer()).messages(TWO_TURNS)
    encoder = Encoder(make_tokenizer(), max_length=len(whole) - 1, truncation="left")
    sequence = encoder.messages(TWO_TURNS)
    assert targets(encoder, sequence) == "Five.<|end|>" and encoder.counts["oldest turns cut"] == 1
    assert "A short answer" in encoder.tokenizer.decode(sequence.ids), "the system message stays"


def test_error_names_file_and_row():
    row = SimpleNamespace(prompt=LONG, completion="East.", row=7, source="a.jsonl")
    with pytest.raises(DataError, match="a.jsonl, row 7: longer than 40 tokens"):
        encode_rows([row], sft.encode, Encoder(make_tokenizer(), max_length=40, truncation="error"))


def test_unknown_truncation_policy():
    with pytest.raises(DataError, match="truncation"):
        Encoder(make_tokenizer(), truncation="middle")


# ── the methods' encodings, examples, colours ───────────────────────────────────────────────────────────────────────────

def test_pairs_share_their_prompt():
    (row,) = read([{"prompt": "Who wrote the letter?", "chosen": "I do not know.", "rejected": "The cat."}], "preference")
    encoder = Encoder(make_tokenizer())
    (example,) = encode_rows([row], dpo.encode, encoder)
    chosen, rejected = example.sequences
    prompt = len(encoder.prompt("Who wrote the letter?"))
    assert (chosen.ids[:prompt] == rejected.ids[:prompt]).all() and example.row == 1
    assert targets(encoder, chosen) == "I do not know.<|end|>" and targets(encoder, rejected) == "The cat.<|end|>"


def test_conversational_pairs_equal_plain_ones():
    plain, chat = read([{"prompt": "Who?", "chosen": "Me.", "rejected": "You."}], "preference"), read(
        [{"prompt": [{"role": "user", "content": "Who?"}], "chosen": [{"role": "assistant", "content": "Me."}],
          "rejected": [{"role": "assistant", "content": "You."}]}], "preference")
    encoder = Encoder(make_tokenizer())
    for a, b in zip(dpo.encode(plain[0], encoder).sequences, dpo.encode(chat[0], encoder).sequences, strict=True):
        assert (a.ids == b.ids).all() and (a.mask == b.mask).all()


def test_the_first_token_is_never_a_target():
    assert Sequence([1, 2, 3], [True, True, True]).mask.tolist() == [False, True, True]


def test_masks_and_ids_must_match():
    with pytest.raises(DataError):
        Sequence([1, 2, 3], [True, True])


def test_token_texts_join_to_the_text():
    tokenizer = make_tokenizer()
    text = "Two plus three is 5, naïve café ☕ 漢字"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == text and len(token_texts(tokenizer, ids)) == len(ids)


def test_a_span_is_the_last_place_where_a_text_stands():
    tokenizer = make_tokenizer()
    ids = tokenizer("It is red, and red it is: naïve 🙂 red")["input_ids"]
    pieces = token_texts(tokenizer, ids)
    for text in ("red", "red, and", "naïve", "🙂", "is: na"):
        inside = np.flatnonzero(span := text_span(tokenizer, ids, text))
        first, last = inside[0], inside[-1]
        assert span[first:last + 1].all() and text in "".join(pieces[first:last + 1])  # without a gap, and no token too few
        assert text not in "".join(pieces[first + 1:last + 1]) or not pieces[first]
        assert text not in "".join(pieces[first:last]) and text not in "".join(pieces[last + 1:])
        assert "\ufffd" not in tokenizer.decode(np.array(ids)[span].tolist())  # every byte of a character
    assert text_span(tokenizer, ids, "blue") is None and text_span(tokenizer, ids, "") is None
    assert text_span(tokenizer, [], "red") is None


def test_colours_escape_html_and_mark_targets():
    encoder = Encoder(make_tokenizer())
    shown = colour_tokens(encoder.tokenizer, Example((encoder.completion("<b>?", "<i>"),)))
    assert "<b>" not in shown._repr_html_() and "&lt;" in shown._repr_html_()
    assert repr(shown).endswith("⟦<i><|end|>⟧")


def test_random_conversations_by_prefix_and_by_marks():
    draw = np.random.default_rng(0)
    words = "the cat sat on mat 12 is  two\n\n five? é".split(" ")
    marked, unmarked = Encoder(tokenizer_with(MARKED)), Encoder(tokenizer_with(UNMARKED))
    for _ in range(50):
        messages = []
        for turn in range(2 * int(draw.integers(1, 4))):
            content = " ".join(draw.choice(words, int(draw.integers(1, 8)))) + "."
            messages.append({"role": "assistant" if turn % 2 else "user", "content": content})
        a, b = marked.messages(messages), unmarked.messages(messages)
        assert (a.ids == b.ids).all() and (a.mask == b.mask).all()
