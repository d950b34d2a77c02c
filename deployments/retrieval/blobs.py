"""The bytes of uploaded files, one object each under the store's URI: a folder, or S3."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from pyarrow import fs

from deployments.retrieval.tables import located

_COPY_BYTES: Final = 8 * 2**20
_S3_OPTIONS: Final = {
    "aws_access_key_id": "access_key",
    "aws_secret_access_key": "secret_key",
    "aws_session_token": "session_token",
    "aws_region": "region",
    "aws_endpoint": "endpoint_override",
}


def file_system(place: str, storage_options: Mapping[str, str]) -> tuple[Any, str]:
    """Return where a folder or an `s3://` prefix lies, and its path there."""
    if place.startswith("s3://"):
        options = {_S3_OPTIONS[k]: v for k, v in storage_options.items() if k in _S3_OPTIONS}
        if str(storage_options.get("allow_http", "")).lower() == "true":
            options["scheme"] = "http"
        return fs.S3FileSystem(**options), place.removeprefix("s3://")
    system, path = fs.FileSystem.from_uri(place) if "://" in place else (fs.LocalFileSystem(), place)
    system.create_dir(path)
    return system, str(path)


class BlobMissing(Exception):
    """A file's bytes are not there, though its storage is."""


class Blobs:
    """Files by id. Blocking calls run in threads.

    Args:
        uri: The document store's.
        storage_options: Keys and addresses, by the names LanceDB takes; what is missing comes from the environment.
    """

    def __init__(self, uri: str, storage_options: Mapping[str, str]) -> None:
        self._fs, self._root = file_system(f"{located(uri)}/files", storage_options)

    def _path(self, file_id: str) -> str:
        return f"{self._root}/{file_id}"

    async def create(self, file_id: str) -> BlobWriter:
        """Begin to write a file: a stranger to everybody until its record says it is there."""
        return BlobWriter(await asyncio.to_thread(self._fs.open_output_stream, self._path(file_id)))

    async def read(self, file_id: str, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from `offset`, none past the end.

        Raises:
            FileNotFoundError: It has been deleted.
        """

        def read() -> bytes:
            with self._fs.open_input_file(self._path(file_id)) as file:
                if offset >= file.size():
                    return b""
                file.seek(offset)
                return bytes(file.read(length))

        return await asyncio.to_thread(read)

    @asynccontextmanager
    async def local(self, file_id: str) -> AsyncIterator[Path]:
        """Give a path on this machine at which the file can be read while the block runs.

        Raises:
            BlobMissing: It has been deleted.
        """
        if isinstance(self._fs, fs.LocalFileSystem):
            path = Path(self._path(file_id))
            if await asyncio.to_thread(lambda: not path.exists() and path.parent.exists()):  # or the mount is away
                raise BlobMissing(file_id)
            yield path
            return
        with tempfile.NamedTemporaryFile(prefix="groundswell-") as file:
            offset = 0
            while data := await self._read_or_miss(file_id, offset):
                await asyncio.to_thread(file.write, data)
                offset += len(data)
            file.flush()
            yield Path(file.name)

    async def _read_or_miss(self, file_id: str, offset: int) -> bytes:
        try:
            return await self.read(file_id, offset, _COPY_BYTES)
        except FileNotFoundError:
            raise BlobMissing(file_id) from None

    async def delete(self, file_id: str) -> None:
        """Delete a file, unless it is gone already."""
        with suppress(FileNotFoundError):
            await asyncio.to_thread(self._fs.delete_file, self._path(file_id))

    async def ids(self) -> set[str]:
        """Return the ids of all files there are, those whose upload broke off among them."""
        selector = fs.FileSelector(self._root, allow_not_found=True)
        return {info.base_name for info in await asyncio.to_thread(self._fs.get_file_info, selector)}


class BlobWriter:
    """A file that is being written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.size = 0

    async def write(self, data: bytes) -> None:
        await asyncio.to_thread(self._stream.write, data)
        self.size += len(data)

    async def close(self) -> None:
        await asyncio.to_thread(self._stream.close)
