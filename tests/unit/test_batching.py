"""Things that travel, in pieces."""

from __future__ import annotations

from deployments.retrieval.batching import MESSAGE_BYTES, batches, text_bytes


def test_runs_keep_the_order_and_lose_nothing() -> None:
    items = [str(i) for i in range(1000)]
    runs = list(batches(items, text_bytes, most=64))
    assert [item for run in runs for item in run] == items
    assert max(len(run) for run in runs) == 64


def test_runs_fit_a_message_but_for_single_items() -> None:
    items = ["x" * size for size in (10, MESSAGE_BYTES, 10, 2 * MESSAGE_BYTES, 600_000, 600_000)]
    assert [len(run) for run in batches(items, text_bytes)] == [1, 1, 1, 1, 1, 1]
    assert [len(run) for run in batches(["x" * 400_000] * 5, text_bytes)] == [2, 2, 1]


def test_nothing_makes_no_runs() -> None:
    assert list(batches([], text_bytes)) == []
