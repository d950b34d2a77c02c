"""Text into chunks: by structure, within the limit, with nothing lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from deployments.retrieval.chunking import chunks
from deployments.retrieval.records import Chunk, Chunking
from deployments.retrieval.tokens import estimate


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def cut(text: str, max_tokens: int, overlap: int = 0) -> list[Chunk]:
    return list(chunks(text, Chunking(max_tokens, overlap), words))


def paragraph(name: str, sentences: int) -> str:
    return " ".join(f"{name} sentence {i} has six words." for i in range(sentences))


def test_a_short_text_is_one_chunk_and_says_where_it_lies() -> None:
    text = "\n\n  One line.  \n"
    (chunk,) = cut(text, 100)
    assert (chunk.text, chunk.tokens) == ("One line.", 2)
    assert text[chunk.start : chunk.end] == chunk.text


@pytest.mark.parametrize("text", ["", " \n\n\t", "\u2003\n"])
def test_nothing_makes_no_chunks(text: str) -> None:
    assert cut(text, 100) == []


def test_chunks_end_before_headings_rather_than_within_sections() -> None:
    text = "\n\n".join(f"# Part {name}\n\n{paragraph(name, 8)}" for name in "ABC")
    assert [chunk.text.split("\n")[0] for chunk in cut(text, 70)] == ["# Part A", "# Part B", "# Part C"]


def test_chunks_end_between_paragraphs_rather_than_within() -> None:
    text = "\n\n".join(paragraph(name, 5) for name in "ABCD")
    for chunk in cut(text, 50):
        assert chunk.text.endswith("sentence 4 has six words.")


def test_long_paragraphs_are_cut_between_sentences() -> None:
    for chunk in cut(paragraph("A", 40), 31):
        assert chunk.text.startswith("A sentence")
        assert chunk.text.endswith("words.")
        assert chunk.tokens <= 31


def test_neighbours_share_whole_sentences_up_to_the_overlap() -> None:
    pieces = cut(paragraph("A", 40), 60, 20)
    for before, after in pairwise(pieces):
        assert before.start < after.start < before.end < after.end
        assert 0 < len(before.text[after.start - before.start :].split()) <= 20


def test_an_overlap_does_not_reach_before_a_heading() -> None:
    text = f"{paragraph('A', 8)}\n\n# Next\n\n{paragraph('B', 8)}"
    first, second = cut(text, 60, 30)
    assert second.text.startswith("# Next")
    assert first.end <= second.start


def test_words_without_sentences_and_characters_without_words_are_cut_too() -> None:
    assert [chunk.tokens for chunk in cut(" ".join(["word"] * 250), 100)] == [100, 100, 50]
    pieces = list(chunks("x" * 10_000, Chunking(100, 50), estimate))
    assert max(chunk.tokens for chunk in pieces) <= 100
    assert pieces[-1].end == 10_000


def test_a_tokenizer_to_which_a_long_word_is_one_token_does_not_make_giant_chunks() -> None:
    pieces = cut("x" * 100_000 + " and " + "\u65e5" * 50_000, 100)
    assert max(len(chunk.text.encode()) for chunk in pieces) <= 100 * 32


def test_no_call_of_the_tokenizer_gets_all_words_of_a_line_as_long_as_a_book() -> None:
    together: list[int] = []

    def count(texts: Sequence[str]) -> list[int]:
        together.append(len(texts))
        return words(texts)

    pieces = list(chunks("word " * 20_000, Chunking(100, 0), count))
    assert [chunk.tokens for chunk in pieces] == [100] * 200
    assert max(together) <= 20_000 / 4


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_no_limit_is_passed_whatever_the_text(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = ["word", "日本語。", "a" * 70, " ", " ", "\n", "\n\n", ". ", "# Head\n", "! ", "\t", "é", "?\u201d "]
    text = "".join(rng.choices(alphabet, k=rng.randint(1, 3000)))
    limit = rng.randint(10, 200)
    pieces = list(chunks(text, Chunking(limit, rng.randint(0, limit // 2)), estimate))
    covered = [False] * len(text)
    for before, after in pairwise(pieces):
        assert before.start < after.start
        assert before.end < after.end
    for chunk in pieces:
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.tokens <= limit
        covered[chunk.start : chunk.end] = [True] * len(chunk.text)
    assert all(seen or character.isspace() for seen, character in zip(covered, text, strict=True))
