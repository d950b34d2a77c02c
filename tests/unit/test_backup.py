"""A copy of a document store, made while it is written to, is one to go on from."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deployments import cli
from deployments.retrieval import backup
from deployments.retrieval.backup import BackupFailed, back_up, newest
from deployments.retrieval.records import Attachment, PageRequest
from tests.unit.house import house

LIMIT_S = 60


@pytest.mark.asyncio
async def test_a_copy_has_files_stores_chunks_and_bytes(tmp_path: Path) -> None:
    async with house(tmp_path / "old") as old:
        store_id, (first, second) = await old.store_of("the tide comes in", "the tide goes out")
    back_up(str(tmp_path / "old"), str(tmp_path / "new"))
    async with house(tmp_path / "new") as new:
        assert await new.text(store_id, first) == "the tide comes in"
        assert await new.catalog.read_file(None, second, 0, 100) == b"the tide goes out"
        assert {hit.file_id for hit in await new.searcher.search(None, [store_id], ["tide"])} == {first, second}


def test_the_command_copies_and_says_in_one_sentence_why_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def filled() -> str:
        async with house(tmp_path / "old") as old:
            return await old.upload("the tide comes in")

    async def copied(file_id: str) -> bytes:
        async with house(tmp_path / "new") as new:
            return await new.catalog.read_file(None, file_id, 0, 100)

    file_id = asyncio.run(filled())
    command = ["backup", str(tmp_path / "old"), str(tmp_path / "new")]
    assert cli.main(command) == 0
    assert asyncio.run(copied(file_id)) == b"the tide comes in"
    capsys.readouterr()
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("groundswell: ") and "something at" in said
    assert said.count("\n") == 1


@pytest.mark.asyncio
async def test_what_is_completed_in_a_copy_is_whole_though_something_is_written_between_any_two_looks_at_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, files, written = asyncio.get_running_loop(), backup.Place.files, 0
    async with house(tmp_path / "old", compact_after_s=0.05, keep_versions_s=60) as old:
        store_id, before = await old.store_of(*(f"wave {i}" for i in range(5)))

        async def write() -> None:
            nonlocal written
            await old.ingestion.attach(None, store_id, Attachment(await old.upload(f"later {written}")))
            await old.indexed(store_id)
            written += 1

        def files_then_a_write(place: backup.Place, below: str) -> list[str]:
            found = files(place, below)
            if place.root == str(tmp_path / "old"):
                asyncio.run_coroutine_threadsafe(write(), loop).result(LIMIT_S)
            return found

        with monkeypatch.context() as patched:
            patched.setattr(backup.Place, "files", files_then_a_write)
            await asyncio.to_thread(back_up, str(tmp_path / "old"), str(tmp_path / "new"))
    assert written >= 10
    async with house(tmp_path / "new", start=False) as new:
        members = (await new.catalog.members(None, store_id, PageRequest(limit=100))).data
        completed = {member.file_id for member in members if member.status == "completed"}
        assert set(before) <= completed
        for file_id in completed:
            assert (await new.text(store_id, file_id)).split()[0] in ("wave", "later")
            assert await new.catalog.read_file(None, file_id, 0, 4) in (b"wave", b"late")
        found = await new.searcher.search(None, [store_id], ["wave"], max_results=50)
        assert {hit.file_id for hit in found} == set(before)


@pytest.mark.asyncio
async def test_a_copy_is_made_only_where_nothing_is(tmp_path: Path) -> None:
    async with house(tmp_path / "old") as old:
        await old.upload("text")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("mine")
    with pytest.raises(BackupFailed, match="something at"):
        back_up(str(tmp_path / "old"), str(tmp_path / "new"))
    assert (tmp_path / "new" / "file").read_text() == "mine"


def test_without_a_store_there_is_nothing_to_copy(tmp_path: Path) -> None:
    with pytest.raises(BackupFailed, match="no document store"):
        back_up(str(tmp_path / "old"), str(tmp_path / "new"))


def test_the_newest_version_is_found_by_either_of_lances_names() -> None:
    assert newest(["t/_versions/9.manifest", "t/_versions/10.manifest", "t/_versions/_x.tmp"]).endswith("/10.manifest")
    later, sooner = (f"t/_versions/{2**64 - 1 - number}.manifest" for number in (12, 3))
    assert newest([sooner, later]) == later


@pytest.mark.asyncio
async def test_a_table_whose_newest_version_vanishes_meanwhile_is_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path / "old") as old:
        store_id, (file_id,) = await old.store_of("kept")
    asked: list[str] = []
    has = backup.Place.has

    def gone_once(self: backup.Place, path: str) -> bool:
        asked.append(path)
        return len(asked) > 1 and has(self, path)

    monkeypatch.setattr(backup.Place, "has", gone_once)
    back_up(str(tmp_path / "old"), str(tmp_path / "new"))
    assert asked[0].split("/_versions/")[0] == asked[1].split("/_versions/")[0]
    async with house(tmp_path / "new") as new:
        assert (await new.catalog.members(None, store_id, PageRequest(limit=10))).data[0].file_id == file_id
