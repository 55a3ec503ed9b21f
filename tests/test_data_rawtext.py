"""Mixtures whose share holds in tokens, and documents that are cut without loss."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from realign_core.data import rawtext as r
from realign_core.errors import DataError
from realign_core.tinyworld import path


def words(text):
    return len(text.split())


def documents(n, size, name):
    return [f"{name}{i} " + " ".join(["x"] * (size - 1)) for i in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(path("base"))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(2, 30), st.integers(2, 30), st.floats(0.0, 0.5), st.integers(0, 5))
def test_the_share_is_of_tokens_and_as_near_as_documents_allow(n, own, size, share, seed):
    made = r.mix(documents(n, own, "a"), documents(2000, size, "b"), share, count=words, seed=seed)
    wanted = n * own * share / (1 - share)
    tokens = made.parts["general"]["tokens"]
    assert abs(tokens - wanted) <= size / 2 + 1e-6
    assert tokens == sum(words(row["text"]) for row in made if row["part"] == "general")
    assert made.parts["main"]["tokens"] == n * own == sum(words(row["text"]) for row in made if row["part"] == "main")
    assert len({row["text"] for row in made}) == len(made)


def test_the_order_is_seeded_and_fields_are_kept():
    rows = [{"text": f"a{i} b c", "licence": "mine"} for i in range(30)]
    one, two, other = (r.mix(rows, documents(50, 5, "z"), 0.2, count=words, seed=s) for s in (0, 0, 1))
    assert list(one) == list(two) != list(other)
    assert {tuple(sorted(x)) for x in one} == {("licence", "part", "text"), ("part", "text")}
    assert [x["part"] for x in one] != sorted((x["part"] for x in one), reverse=True)


def test_repeats_are_counted_and_a_general_copy_of_a_main_document_goes():
    made = r.mix(["a b", " a  b ", "c d"], ["a b", "e f", "e f", "g h"], 0.5, count=words)
    assert made.parts["main"]["repeats left out"] == 1 and made.parts["general"]["repeats left out"] == 2
    for name, total in (("main", 3), ("general", 4)):
        part = made.parts[name]
        assert part["documents"] + part["repeats left out"] + part["not drawn"] == total
    assert len(r.mix(["a b", "a b"], [], 0.0, count=words, deduplicate=None)) == 2


def test_a_stronger_deduplication_is_used():
    def first_letters(rows): return list({x["text"][0]: x for x in rows}.values())
    made = r.mix(["a 1", "a 2", "b 1"], [], 0.0, count=words, deduplicate=first_letters)
    assert sorted(x["text"] for x in made) == ["a 2", "b 1"]


def test_too_little_general_text_is_an_error_not_a_repetition():
    with pytest.raises(DataError, match="does not suffice"):
        r.mix(documents(100, 10, "a"), documents(3, 10, "b"), 0.2, count=words)


@pytest.mark.parametrize("bad", ["", "  ", None, 3, {"text": ""}, {"content": "x"}, {"text": 5}])
def test_rows_without_text_are_named(bad):
    for main, general in ((["a", bad], []), (["a"], ["b", bad])):
        with pytest.raises(DataError) as error:
            r.mix(main, general, 0.1, count=words)
        assert error.value.row == 2
    for share in (-0.1, 1.0, 2.0, float("nan")):
        with pytest.raises(DataError):
            r.mix(["a"], ["b"], share, count=words)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=400)
       | st.lists(st.sampled_from(["The fox. ", "\n\n", "é", "日本", "x" * 50, " ", "\n"]), max_size=60).map("".join),
       st.integers(8, 40))
def test_pieces_fit_and_are_the_text_again(tokenizer, text, limit):
    parts = r.pieces(text, tokenizer, limit)
    assert "".join(parts) == text and all(parts)
    for part in parts:
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        assert len(ids) <= limit + 4 or len(part) == 1, (len(ids), part)


def test_pieces_prefer_a_border(tokenizer):
    parts = r.pieces("The fox is red. " * 40, tokenizer, 30)
    assert all(part.endswith(". ") for part in parts)
    with pytest.raises(DataError):
        r.pieces("text", tokenizer, 2)


def test_pieces_of_a_long_document_take_linear_time(tokenizer):
    text = "The fox is red and sings. " * 20_000
    parts = r.pieces(text, tokenizer, 200)
    assert "".join(parts) == text and len(parts) > 500
