"""Many texts into vectors, by calls as large as the embedding model can take. Knows no store and no Ray.

A call that fails is not repeated as it was: the next ones are smaller, down to one text, and what the others brought is
kept. So a model that is slow, or that fails at one text, still gets everything else done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from deployments.errors import BadRequest, PublicError
from deployments.retrieval.batching import batches, text_bytes
from deployments.retrieval.parsing import Unreadable
from deployments.retrieval.ports import Embed, Vectors

logger = logging.getLogger("ray.serve.groundswell.indexer")

_CALLS_AT_ONCE: Final = 4
_SMALLER: Final = 4
_LARGER_AFTER_CALLS: Final = 8
_FAILURES_BESIDE_A_PROBE: Final = 3
_VANISHINGS_BESIDE_A_PROBE: Final = 30  # a replica may be lost by chance, and by a text that kills it
_OVERLOADED: Final = 429
_AWAY: Final = 503
_PROBE: Final = "Is there anybody?"


@dataclass(slots=True, eq=False)
class Text:
    """A text that is to have a vector.

    Attributes:
        vector: Of one dimension, once it is made.
        failures: Calls with this text alone that failed, from the second on directly after one that did not.
        vanishings: Likewise, with the model away.
        refused: Why there will be none.
    """

    text: str
    vector: Vectors | None = None
    failures: int = 0
    vanishings: int = 0
    refused: Unreadable | None = None


class Embedder:
    """See the module's docstring.

    Args:
        embed: The model.
        batch_texts: In one call, at most.
        timeout_s: Of one call.
    """

    def __init__(self, embed: Embed, *, batch_texts: int, timeout_s: float) -> None:
        self._embed = embed
        self._batch_texts = batch_texts
        self._timeout_s = timeout_s
        self._most = self._texts = batch_texts * _CALLS_AT_ONCE  # under way at once
        self._well = 0  # calls since the last change of that

    async def embed(self, texts: Sequence[Text]) -> None:
        """Make the vectors that are missing; those that are made stay, should others fail.

        Raises:
            Unreadable: The model refuses one of the texts, or fails at it again and again and at another not each time.
            Exception: The model, or the way to it, failed. To be tried again after a while.
        """
        todo = [text for text in texts if text.vector is None]
        if refused := next((text.refused for text in todo if text.refused), None):
            raise refused
        failures: list[tuple[int, Exception]] = []
        at = 0

        async def work() -> None:
            nonlocal at
            while at < len(todo) and not failures:
                some = next(batches(todo[at : at + min(self._texts, self._batch_texts)], lambda t: text_bytes(t.text)))
                at += len(some)
                try:
                    await self._fill(some)
                except Exception as error:
                    failures.append((len(some), error))

        await asyncio.gather(*(work() for _ in range(max(1, self._texts // self._batch_texts))))
        for _, error in failures:
            if isinstance(error, Unreadable):
                raise error
        if failures:
            self._take_smaller(max(size for size, _ in failures))
            raise failures[0][1]
        if len({len(text.vector) for text in texts if text.vector is not None}) > 1:
            for text in texts:
                text.vector = None
            raise RuntimeError("the embedding model has changed its dimension")

    async def _fill(self, texts: Sequence[Text]) -> None:
        alone = texts[0] if len(texts) == 1 else None
        if alone is not None and (alone.failures or alone.vanishings):
            await self._call([_PROBE])  # is it the text, or is the model away?
        try:
            made = await self._call([text.text for text in texts])
        except Unreadable:
            raise
        except Exception as error:
            status = error.status if isinstance(error, PublicError) else None
            if alone is not None and status != _OVERLOADED:
                alone.failures += status != _AWAY
                alone.vanishings += status == _AWAY
                if alone.failures > _FAILURES_BESIDE_A_PROBE or alone.vanishings > _VANISHINGS_BESIDE_A_PROBE:
                    logger.warning("The embedding model fails at one text: %s: %s", type(error).__name__, error)
                    alone.refused = Unreadable("server_error", "The embedding model fails at a part of this file.")
                    raise alone.refused from None
            raise
        for text, vector in zip(texts, made, strict=True):
            text.vector = vector
        self._well += 1
        if self._well >= _LARGER_AFTER_CALLS:
            self._texts, self._well = min(self._most, 2 * self._texts), 0

    async def _call(self, texts: list[str]) -> Vectors:
        async with asyncio.timeout(self._timeout_s):
            try:
                return await self._embed(texts)
            except BadRequest as error:
                raise Unreadable("invalid_file", error.message) from None

    def _take_smaller(self, failed: int) -> None:
        self._texts, self._well = max(1, failed // _SMALLER), 0
        logger.warning("A call with %d texts failed; the next have %d, one at a time", failed, self._texts)
