"""Two ranked lists become one: reciprocal rank fusion, and weighted fusion of scores. Pure.

Reciprocal ranks (Cormack, Clarke and Büttcher 2009) need no comparable scores, but give a weak leg as much to say as a
strong one; min-max scores (Bruch, Gai and Ingber 2023) keep how sure a leg is. Both answer scores between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeVar

K = TypeVar("K")
Fusion = Literal["rrf", "weighted"]

RRF_K: Final = 60
_BM25_HALF: Final = 8.0


def fuse(method: Fusion, legs: Sequence[tuple[float, Mapping[K, float]]]) -> dict[K, float]:
    """Fuse legs, each a weight and scores by key, into scores by key.

    A leg with weight 0 has no say, and what it alone has found is left out.
    """
    counted = [(weight, scores) for weight, scores in legs if weight > 0]
    return reciprocal_ranks(counted) if method == "rrf" else weighted(counted)


def reciprocal_ranks(legs: Sequence[tuple[float, Mapping[K, float]]], *, k: int = RRF_K) -> dict[K, float]:
    """Return the weighted sum of 1 / (k + rank), scaled so that first in every leg is 1."""
    fused: dict[K, float] = {}
    total = sum(weight for weight, _ in legs)
    for weight, scores in legs:
        for rank, key in enumerate(_ranked(scores), start=1):
            fused[key] = fused.get(key, 0.0) + weight / total * (k + 1) / (k + rank)
    return fused


def weighted(legs: Sequence[tuple[float, Mapping[K, float]]]) -> dict[K, float]:
    """Return the weighted mean of each leg's min-max scores; what a leg has not found counts as its least."""
    fused: dict[K, float] = {}
    total = sum(weight for weight, _ in legs)
    for weight, scores in legs:
        if not scores:
            continue
        least, most = min(scores.values()), max(scores.values())
        for key, score in scores.items():
            share = (score - least) / (most - least) if most > least else 1.0
            fused[key] = fused.get(key, 0.0) + weight / total * share
    return fused


def bm25_score(score: float) -> float:
    """Return a BM25 score, unbounded, between 0 and 1 and in the same order. 8 becomes 0.5."""
    return score / (score + _BM25_HALF) if score > 0 else 0.0


def cosine_score(distance: float) -> float:
    """Return a cosine distance (0 to 2) as a similarity between 0 and 1."""
    return min(1.0, max(0.0, 1.0 - distance / 2))


def best(scores: Mapping[K, float], limit: int) -> list[tuple[K, float]]:
    """Return the best `limit` keys and scores, best first; ties in the mapping's order."""
    return [(key, scores[key]) for key in _ranked(scores)[:limit]]


def _ranked(scores: Mapping[K, float]) -> list[K]:
    return sorted(scores, key=lambda key: -scores[key])
