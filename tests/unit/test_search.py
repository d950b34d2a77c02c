"""Searching: by words, by meaning, by both; and what a search refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import BadRequest, DocumentsUnavailable, EngineUnavailable, NotFound
from deployments.retrieval.records import Attachment, Ranking
from tests.unit.house import house, stub_embed

pytestmark = pytest.mark.asyncio

TEXTS = ("A car drives on the road.", "The automobile was red.", "A cat sleeps.", "Bread is baked at dawn.")


async def test_words_alone_without_an_embedding_model(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        store, files = await made.store_of(*TEXTS)
        (hit,) = await made.searcher.search(None, [store], ["cars"])
        assert (hit.file_id, hit.filename, hit.text, hit.position) == (files[0], "a.txt", TEXTS[0], 0)
        assert (hit.start, hit.end) == (0, len(TEXTS[0]))
        assert 0 < hit.score < 1


@pytest.mark.parametrize("fusion", ["rrf", "weighted"])
async def test_meaning_finds_what_words_do_not(tmp_path: Path, fusion: str) -> None:
    async with house(tmp_path, embed=stub_embed, fusion=fusion) as made:
        store, files = await made.store_of(*TEXTS)
        hits = await made.searcher.search(None, [store], ["car"], max_results=2)
        assert [hit.file_id for hit in hits] == files[:2]
        assert 1 >= hits[0].score > hits[1].score > 0
        words = await made.searcher.search(None, [store], ["car"], ranking=Ranking(embedding_weight=0))
        assert [hit.file_id for hit in words] == files[:1]
        meaning = await made.searcher.search(None, [store], ["car"], ranking=Ranking(text_weight=0), max_results=2)
        assert {hit.file_id for hit in meaning} == set(files[:2])


async def test_several_stores_and_queries_are_searched_as_one(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        stores = [(await made.store_of(f"number{i} zebra"))[0] for i in range(50)]
        hits = await made.searcher.search(None, stores, ["zebra"], max_results=50)
        assert {hit.store_id for hit in hits} == set(stores)
        hits = await made.searcher.search(None, stores, ["number3", "number7"])
        assert {hit.text for hit in hits} == {"number3 zebra", "number7 zebra"}
        assert len(await made.searcher.search(None, stores, ["zebra"], max_results=3)) == 3


async def test_results_below_the_threshold_are_left_out(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        store, _ = await made.store_of(*TEXTS)
        hits = await made.searcher.search(None, [store], ["red automobile car"])
        cut = await made.searcher.search(
            None, [store], ["red automobile car"], ranking=Ranking(score_threshold=hits[0].score)
        )
        assert (len(hits), cut) == (2, hits[:1])


async def test_filters_narrow_both_legs(tmp_path: Path) -> None:
    async with house(tmp_path, embed=stub_embed) as made:
        store, old = await made.store_of("a car", year=1990.0)
        new = await made.upload("an automobile")
        await made.ingestion.attach(None, store, Attachment(new, {"year": 2020.0}))
        await made.indexed(store)
        for kind, files in (("gt", [new]), ("lt", old)):
            filters = {"type": kind, "key": "year", "value": 2000}
            hits = await made.searcher.search(None, [store], ["car"], filters=filters)
            assert [hit.file_id for hit in hits] == files


async def test_reranking_reorders_unless_it_is_left_out(tmp_path: Path) -> None:
    async def stub_score(query: str, texts: Any) -> list[float]:
        return [1 / len(text) for text in texts]

    async with house(tmp_path, score=stub_score) as made:
        store, (long, short) = await made.store_of("zebra zebra zebra, that is it", "a zebra of a kind")
        assert [h.file_id for h in await made.searcher.search(None, [store], ["zebra"])] == [short, long]
        plain = await made.searcher.search(None, [store], ["zebra"], ranking=Ranking(ranker="none"))
        assert [h.file_id for h in plain] == [long, short]


async def test_query_embedding_and_words_go_on_at_once(tmp_path: Path) -> None:
    started, searched = asyncio.Event(), asyncio.Event()

    async def waiting_stub_embed(texts: Any) -> Any:
        if texts == ["car"]:
            started.set()
            await searched.wait()
        return await stub_embed(texts)

    async with house(tmp_path, embed=waiting_stub_embed) as made:
        store, _ = await made.store_of(*TEXTS)
        real = made.searcher._reader.by_words

        async def by_words(*args: Any) -> Any:
            found = await real(*args)
            searched.set()
            return found

        made.searcher._reader.by_words = by_words  # type: ignore[method-assign]
        assert await made.searcher.search(None, [store], ["car"])
        assert started.is_set()


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"store_ids": []}, "vector_store_ids"),
        ({"store_ids": ["vs_x"] * 101}, "vector_store_ids"),
        ({"queries": []}, "query"),
        ({"queries": [" "]}, "query"),
        ({"queries": ["x" * 20_000]}, "query"),
        ({"queries": ["x"] * 33}, "query"),
        ({"max_results": 0}, "max_num_results"),
        ({"max_results": 51}, "max_num_results"),
        ({"ranking": Ranking("best")}, "ranking_options"),
        ({"ranking": Ranking(score_threshold=1.5)}, "ranking_options"),
        ({"ranking": Ranking(score_threshold=float("nan"))}, "ranking_options"),
        ({"ranking": Ranking(text_weight=-1)}, "ranking_options"),
        ({"ranking": Ranking(text_weight=0, embedding_weight=0)}, "ranking_options"),
        ({"filters": {"type": "like"}}, "filters"),
    ],
)
async def test_wrong_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], param: str) -> None:
    async with house(tmp_path, start=False) as made:
        store = await made.ingestion.create_store(None)
        call = {"store_ids": [store.id], "queries": ["x"], **arguments}
        with pytest.raises(BadRequest) as refused:
            await made.searcher.search(None, call.pop("store_ids"), call.pop("queries"), **call)
        assert refused.value.param == param


async def test_an_unknown_store_is_404_and_an_empty_one_is_empty(tmp_path: Path) -> None:
    async with house(tmp_path, embed=stub_embed, start=False) as made:
        store = await made.ingestion.create_store(None)
        assert await made.searcher.search(None, [store.id], ["x"]) == []
        for unknown in ("vs_nope", "'; drop table", ""):
            with pytest.raises(NotFound):
                await made.searcher.search(None, [store.id, unknown], ["x"])


async def test_a_store_deleted_while_it_is_searched_is_404_and_the_others_answer(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        kept, _ = await made.store_of("a zebra")
        gone, _ = await made.store_of("a zebra")

        begun, deleted = asyncio.Event(), False

        async def ask(store: str) -> list[str]:
            outcomes, last = [], False
            while not last:
                last = deleted
                try:
                    outcomes.append(str(len(await made.searcher.search(None, [store], ["zebra"]))))
                except NotFound:
                    outcomes.append("404")
                begun.set()
            return outcomes

        asking = [asyncio.create_task(ask(store)) for store in (kept, gone, gone)]
        await begun.wait()
        await made.ingestion.delete_store(None, gone)
        deleted = True
        of_kept, *of_gone = await asyncio.gather(*asking)
        assert set(of_kept) == {"1"}
        for outcomes in of_gone:
            assert set(outcomes) <= {"1", "404"}
            assert outcomes[-1] == "404"


async def test_a_late_or_absent_embedding_model_is_a_clear_503(tmp_path: Path) -> None:
    async def late_stub_embed(texts: Any) -> Any:
        await asyncio.Event().wait()

    async def absent_stub_embed(texts: Any) -> Any:
        raise EngineUnavailable("The embedding model has no engine.")

    async with house(tmp_path, embed=stub_embed) as made:
        store, _ = await made.store_of(*TEXTS)
        made.searcher._embed = absent_stub_embed
        with pytest.raises(EngineUnavailable):
            # In a task of its own: until Python 3.11.4, one whose group has failed takes timeouts for cancellations.
            await asyncio.create_task(made.searcher.search(None, [store], ["car"]))
    async with house(tmp_path, embed=late_stub_embed, search_timeout_s=0.5) as made:
        with pytest.raises(DocumentsUnavailable, match=r"longer than 0\.5 s"):
            await made.searcher.search(None, [store], ["car"])


async def test_a_model_that_changed_its_dimension_is_refused_clearly(tmp_path: Path) -> None:
    async with house(tmp_path, embed=stub_embed) as made:
        store, _ = await made.store_of(*TEXTS)

        async def narrow_stub_embed(texts: Any) -> Any:
            return (await stub_embed(texts))[:, :32]

        made.searcher._embed = narrow_stub_embed
        with pytest.raises(BadRequest, match="64 dimensions"):
            await made.searcher.search(None, [store], ["car"])
