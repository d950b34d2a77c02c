"""Markers out of a text, however it is cut."""

from __future__ import annotations

import random

import pytest

from deployments.grounding.citations import Citation, CitationReader, read

IDS = ("k3f9", "b2c1", "k3f8")


def streamed(text: str, cuts: list[int]) -> tuple[str, list[Citation]]:
    reader = CitationReader(IDS)
    clean, citations = "", []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        said, found = reader.feed(text[start:end])
        clean += said
        for citation in found:
            assert citation.index <= len(clean), "a citation came before the text it belongs to"
        citations += found
    return clean + reader.end(), citations


@pytest.mark.parametrize(
    ("text", "clean", "citations"),
    [
        ("The tide turns [k3f9].", "The tide turns.", [(14, "k3f9")]),
        ("The tide turns[k3f9].", "The tide turns.", [(14, "k3f9")]),
        ("Two  [k3f9]", "Two ", [(4, "k3f9")]),
        ("Both [k3f9] [b2c1].", "Both.", [(4, "k3f9"), (4, "b2c1")]),
        ("Both [k3f9, b2c1].", "Both.", [(4, "k3f9"), (4, "b2c1")]),
        ("[k3f9] first", " first", [(0, "k3f9")]),
        ("ends [k3f9]", "ends", [(4, "k3f9")]),
        ("Unknown [z9z9].", "Unknown [z9z9].", []),
        ("Half known [k3f9, z9z9].", "Half known [k3f9, z9z9].", []),
        ("a[0] and [k3f", "a[0] and [k3f", []),
        ("[[k3f9]]", "[]", [(1, "k3f9")]),
        ("nested [k3[b2c1]f9]", "nested [k3f9]", [(10, "b2c1")]),
        ("Größe 🌊 [k3f9]!", "Größe 🌊!", [(7, "k3f9")]),
        ("", "", []),
        (" ", " ", []),
    ],
)
def test_known_markers_go_and_their_places_stay(text: str, clean: str, citations: list[tuple[int, str]]) -> None:
    assert read(text, IDS) == (clean, [Citation(*each) for each in citations])


def test_without_passages_nothing_is_held_back() -> None:
    reader = CitationReader(())
    assert [reader.feed(" "), reader.feed("[k3f9")] == [(" ", []), ("[k3f9", [])]


def test_text_is_let_go_as_soon_as_it_can_be_no_marker() -> None:
    reader = CitationReader(IDS)
    assert [reader.feed(delta)[0] for delta in ("see", " [", "k", "4", " ", "[", "k3f9", "]", ".")] == [
        *("see", "", "", " [k4", "", "", "", "", ".")
    ]


def test_what_is_held_back_is_bounded() -> None:
    reader = CitationReader(IDS)
    said = sum(len(reader.feed(delta)[0]) for delta in ["["] + ["k3f9, "] * 1000)
    assert 6001 - said < 64


@pytest.mark.parametrize("seed", range(30))
def test_any_cut_gives_what_the_whole_gives(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [
        "[k3f9]",
        "[b2c1]",
        "[z9z9]",
        "[k3f9, b2c1]",
        "[k3f9,",
        "[k",
        "3f9]",
        "[",
        "]",
        " ",
        "  ",
        "ab",
        "é🌊",
        ", ",
    ]
    for _ in range(200):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
        assert streamed(text, cuts) == read(text, IDS), (text, cuts)
        assert streamed(text, list(range(len(text)))) == read(text, IDS), text
