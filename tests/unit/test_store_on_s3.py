"""The document store on S3: the same, by another URI. The S3 is moto's, a stand-in that knows conditional writes."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.errors import NotFound
from deployments.retrieval.backup import BackupFailed, back_up
from deployments.retrieval.records import Attachment, PageRequest
from deployments.retrieval.writer import Fenced
from tests.e2e.serving import free_port
from tests.unit.house import house, stub_embed

pytest.importorskip("moto")
pytest.importorskip("flask_cors")

STARTS_WITHIN_S = 60


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """Storage options of an S3 with a bucket `docs`."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{port}/docs", method="PUT")
                request.add_header(
                    "Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"
                )
                with urllib.request.urlopen(request, timeout=5):
                    break
            except OSError:
                assert time.monotonic() < deadline, "moto did not start"
                time.sleep(0.2)
        yield {
            "aws_access_key_id": "test",
            "aws_secret_access_key": "test",
            "aws_region": "us-east-1",
            "aws_endpoint": f"http://127.0.0.1:{port}",
            "allow_http": "true",
        }
    finally:
        process.kill()
        process.wait()


@pytest.mark.asyncio
async def test_documents_live_on_s3_by_changing_one_uri(s3: dict[str, str]) -> None:
    async with house("s3://docs/store", storage_options=s3, embed=stub_embed) as made:
        store, (one, two) = await made.store_of("first zebra", "second zebra")
        assert len(await made.searcher.search(None, [store], ["zebra"])) == 2
        assert await made.catalog.read_file(None, one, 6, 100) == b"zebra"
        await made.ingestion.delete_file(None, one)
        assert [h.file_id for h in await made.searcher.search(None, [store], ["zebra"])] == [two]
        await made.writer.compact(f"chunks_{store}", keep_versions_s=600)
        async with house("s3://docs/store", storage_options=s3, embed=stub_embed) as successor:
            with pytest.raises(Fenced):
                await made.ingestion.delete_file(None, two)
            file = await successor.upload("third zebra")
            await successor.ingestion.attach(None, store, Attachment(file))
            await successor.indexed(store)
            assert len(await made.searcher.search(None, [store], ["zebra"])) == 2
            assert len((await made.catalog.files(None, PageRequest())).data) == 2
            await successor.ingestion.delete_store(None, store)
            with pytest.raises(NotFound):
                await made.searcher.search(None, [store], ["zebra"])


@pytest.mark.asyncio
async def test_a_backup_goes_from_a_folder_to_s3_and_back(s3: dict[str, str], tmp_path: Path) -> None:
    async with house(tmp_path / "old") as old:
        store_id, (file_id,) = await old.store_of("the tide comes in")
    back_up(str(tmp_path / "old"), "s3://docs/backup", target_options=s3)
    with pytest.raises(BackupFailed, match="already"):
        back_up(str(tmp_path / "old"), "s3://docs/backup", target_options=s3)
    back_up("s3://docs/backup", str(tmp_path / "new"), source_options=s3)
    async with house("s3://docs/backup", storage_options=s3) as there:
        assert await there.text(store_id, file_id) == "the tide comes in"
    async with house(tmp_path / "new") as new:
        assert await new.catalog.read_file(None, file_id, 0, 100) == b"the tide comes in"
        assert [hit.file_id for hit in await new.searcher.search(None, [store_id], ["tide"])] == [file_id]
