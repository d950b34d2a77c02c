"""Two ranked lists become one."""

from __future__ import annotations

import pytest

from deployments.retrieval.fusion import best, bm25_score, cosine_score, fuse, reciprocal_ranks, weighted

WORDS = {"a": 12.0, "b": 6.0, "c": 3.0}
MEANING = {"b": 0.9, "d": 0.8, "a": 0.1}


def test_first_in_every_leg_scores_one_and_found_by_both_beats_found_by_one() -> None:
    assert reciprocal_ranks([(1, {"x": 3}), (1, {"x": 0.2})]) == {"x": pytest.approx(1)}
    fused = reciprocal_ranks([(1, WORDS), (1, MEANING)])
    assert [key for key, _ in best(fused, 4)] == ["b", "a", "d", "c"]


def test_min_max_keeps_how_sure_a_leg_is() -> None:
    fused = weighted([(1, WORDS), (1, MEANING)])
    assert fused["a"] == pytest.approx(0.5)
    assert fused["b"] == pytest.approx((1 / 3 + 1) / 2)
    assert fused["c"] == 0


def test_weights_shift_the_order() -> None:
    for method in ("rrf", "weighted"):
        assert best(fuse(method, [(10, WORDS), (1, MEANING)]), 1)[0][0] == "a"
        assert best(fuse(method, [(1, WORDS), (10, MEANING)]), 1)[0][0] == "b"


def test_a_leg_without_weight_has_no_say() -> None:
    assert set(fuse("rrf", [(1, WORDS), (0, MEANING)])) == set(WORDS)
    assert fuse("weighted", [(0, WORDS), (0, MEANING)]) == {}


def test_empty_and_single_legs() -> None:
    assert fuse("rrf", [(1, {}), (1, {})]) == {}
    assert weighted([(1, {"x": 4.0}), (1, {})]) == {"x": 0.5}


def test_scores_lie_between_nought_and_one_in_the_same_order() -> None:
    scores = [bm25_score(s) for s in (0, 0.1, 8, 40, 1e9)]
    assert scores == sorted(scores)
    assert (scores[0], scores[2]) == (0, 0.5)
    assert scores[-1] <= 1
    assert [cosine_score(d) for d in (0, 1, 2, 2.0001)] == [1, 0.5, 0, 0]


def test_ties_keep_their_order() -> None:
    assert best({"x": 1.0, "y": 1.0, "z": 2.0}, 2) == [("z", 2.0), ("x", 1.0)]
