"""Texts into vectors: what a model cannot take at once it gets in pieces; what it fails at holds up nothing else."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from deployments.errors import BadRequest, DocumentsUnavailable, EngineUnavailable, Overloaded, PublicError
from deployments.retrieval.embedding import Embedder, Text
from deployments.retrieval.parsing import Unreadable

pytestmark = pytest.mark.asyncio


class StubModel:
    """Makes vectors of a text's length at once, or never answers what it cannot take."""

    def __init__(self) -> None:
        self.takes = 10**6
        self.hangs_at = "nothing"
        self.dies_of = "nothing"
        self.away = False
        self.calls: list[int] = []
        self.made: Counter[str] = Counter()

    async def __call__(self, texts: Sequence[str]) -> Any:
        self.calls.append(len(texts))
        if self.away or self.dies_of in texts:
            raise EngineUnavailable("no engine")
        if len(texts) > self.takes or self.hangs_at in texts:
            await asyncio.Event().wait()
        self.made.update(texts)
        return np.array([[len(text), 1.0] for text in texts], np.float32)


@pytest.fixture
def model() -> StubModel:
    return StubModel()


@pytest.fixture
def embedder(model: StubModel) -> Embedder:
    return Embedder(model, batch_texts=64, timeout_s=0.01)


def numbered(n: int) -> list[Text]:
    return [Text(f"text {i}") for i in range(n)]


async def until_done(embedder: Embedder, texts: list[Text], *, most: int = 20) -> int:
    """Embed, again while it fails; return how often it did."""
    for failed in range(most):
        try:
            await embedder.embed(texts)
        except (TimeoutError, EngineUnavailable):
            continue
        return failed
    raise AssertionError("it never ends")


async def test_vectors_are_those_of_their_texts(embedder: Embedder, model: StubModel) -> None:
    texts = [Text("x" * i) for i in range(1, 1000)]
    await embedder.embed(texts)
    assert [text.vector[0] for text in texts if text.vector is not None] == list(range(1, 1000))
    assert max(model.calls) == 64


async def test_a_call_that_failed_is_followed_by_smaller_ones_until_all_is_done(
    embedder: Embedder, model: StubModel
) -> None:
    model.takes = 7
    texts = numbered(300)
    assert await until_done(embedder, texts) >= 2
    assert set(model.made.values()) == {1}, "what is made is not made again"
    assert all(text.vector is not None for text in texts)


async def test_calls_grow_again_once_they_succeed(embedder: Embedder, model: StubModel) -> None:
    model.takes = 7
    await until_done(embedder, numbered(20))
    model.takes = 10**6
    model.calls.clear()
    await embedder.embed(numbered(5000))
    assert model.calls[0] < 7
    assert model.calls[-2] == 64


async def test_a_text_at_which_the_model_hangs_is_refused_and_the_others_are_done(
    embedder: Embedder, model: StubModel
) -> None:
    model.hangs_at = "text 50"
    texts = numbered(100)
    with pytest.raises(Unreadable) as refused:
        await until_done(embedder, texts)
    assert refused.value.code == "server_error"
    model.calls.clear()
    with pytest.raises(Unreadable):
        await embedder.embed(texts)
    assert model.calls == [], "it is known by now"
    await until_done(embedder, texts[:50] + texts[51:])
    assert [text.text for text in texts if text.vector is None] == ["text 50"]


async def test_a_model_that_is_away_refuses_no_text_however_long(embedder: Embedder, model: StubModel) -> None:
    texts, model.away = numbered(1), True
    for _ in range(20):
        with pytest.raises(EngineUnavailable):
            await embedder.embed(texts)
    model.away = False
    await embedder.embed(texts)
    assert texts[0].vector is not None


@pytest.mark.parametrize("error", [Overloaded, DocumentsUnavailable, EngineUnavailable])
async def test_an_overload_refuses_no_text_though_other_calls_get_through(error: type[PublicError]) -> None:
    text, failed = numbered(1), 0

    async def overloaded(texts: Sequence[str]) -> Any:
        nonlocal failed
        if texts[0] == text[0].text and failed < 20:
            failed += 1
            raise error("not now")
        return np.ones((len(texts), 2), np.float32)

    embedder = Embedder(overloaded, batch_texts=64, timeout_s=1)
    for _ in range(20):
        with pytest.raises(error):
            await embedder.embed(text)
    await embedder.embed(text)
    assert text[0].vector is not None


async def test_a_failure_counts_against_a_text_only_beside_a_call_that_succeeds(
    embedder: Embedder, model: StubModel
) -> None:
    texts, model.hangs_at = numbered(1), "text 0"
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await embedder.embed(texts)
        model.takes = 0
        for _ in range(20):
            with pytest.raises(TimeoutError):
                await embedder.embed(texts)
        model.takes = 10**6
    model.hangs_at = "nothing"
    await embedder.embed(texts)
    assert texts[0].vector is not None


async def test_what_the_model_refuses_is_the_files_fault(model: StubModel) -> None:
    async def refuse(texts: Sequence[str]) -> Any:
        raise BadRequest("too long")

    with pytest.raises(Unreadable, match="too long") as refused:
        await Embedder(refuse, batch_texts=2, timeout_s=1).embed(numbered(3))
    assert refused.value.code == "invalid_file"


async def test_vectors_of_two_dimensions_are_made_anew(embedder: Embedder, model: StubModel) -> None:
    texts = numbered(2)
    texts[0].vector = np.zeros(3, np.float32)
    with pytest.raises(RuntimeError, match="dimension"):
        await embedder.embed(texts)
    await embedder.embed(texts)
    assert [len(text.vector) for text in texts if text.vector is not None] == [2, 2]


async def test_a_text_that_its_engine_always_dies_of_is_refused_in_the_end(
    embedder: Embedder, model: StubModel
) -> None:
    texts = numbered(10)
    model.dies_of = "text 3"
    with pytest.raises(Unreadable):
        await until_done(embedder, texts, most=100)
    assert [text.text for text in texts if text.refused] == ["text 3"]
