"""A copy of a document store that is in use, as it was at one time, from and to a folder or S3.

LanceDB changes no file: a commit adds some, and at last a manifest that names them, under `_versions`. So manifests are
listed first, then all else, and what was listed is copied. Compaction may remove a version meanwhile, and its files
with it; then that table is copied again.

Tables are copied in an order in which nothing that is there lacks what it needs: what is `completed` before the chunks
it promises, the names of files before their bytes. What is only half there is what a crash might have left too, and the
next Indexer finishes it. A file that is deleted while the copy is made may be listed in it without its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from pyarrow import fs

from deployments.retrieval.blobs import file_system
from deployments.retrieval.tables import BATCHES, FILES, MEMBERS, STORES, located

_FIRST: Final = tuple(f"{table.name}.lance" for table in (MEMBERS, BATCHES, STORES, FILES))
_VERSIONS: Final = "/_versions/"
_ATTEMPTS: Final = 10
_THREADS: Final = 16
_COPY_BYTES: Final = 8 * 2**20


class BackupFailed(Exception):
    """The copy is not one to restore from."""


@dataclass(frozen=True)
class Place:
    """A folder, wherever it is."""

    system: Any
    root: str

    @classmethod
    def at(cls, uri: str, storage_options: Mapping[str, str]) -> Place:
        return cls(*file_system(located(uri), storage_options))

    def folders(self, below: str) -> list[str]:
        found = self.system.get_file_info(fs.FileSelector(f"{self.root}/{below}", allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def files(self, below: str) -> list[str]:
        """Return the paths of all files below a folder, or below the root, without the root."""
        folder = f"{self.root}/{below}" if below else self.root
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        found = self.system.get_file_info(selector)
        return [info.path.removeprefix(f"{self.root}/") for info in found if info.type == fs.FileType.File]

    def has(self, path: str) -> bool:
        (info,) = self.system.get_file_info([f"{self.root}/{path}"])
        return bool(info.type == fs.FileType.File)

    def remove(self, below: str) -> None:
        for path in self.files(below):
            self.system.delete_file(f"{self.root}/{path}")


def back_up(
    source: str,
    target: str,
    *,
    source_options: Mapping[str, str] | None = None,
    target_options: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Copy a document store; return how many files were copied.

    Args:
        source: `documents.uri` of a server that may be running.
        target: A folder or prefix in which nothing is yet.
        source_options: As `documents.storage_options`.
        target_options: Likewise.
        say: Hears of each part that is done.

    Raises:
        BackupFailed: There is no store, something is at the target, or a table changed faster than it could be copied.
    """
    old, new = Place.at(source, source_options or {}), Place.at(target, target_options or {})
    tables = old.folders("tables")
    if f"{FILES.name}.lance" not in tables:
        raise BackupFailed(f"there is no document store at {source}")
    if new.files(""):
        raise BackupFailed(f"there is something at {target} already")
    copied = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for name in _FIRST:
            copied += _table(old, new, f"tables/{name}", pool)
        # Looked for only now: a store that is in `vector_stores` has its chunks.
        for name in old.folders("tables"):
            if name not in _FIRST:
                copied += _table(old, new, f"tables/{name}", pool)
        say(f"{copied} files of tables")
        blobs = old.files("files")
        gone = set(_copy(old, new, blobs, pool))
        say(f"{len(blobs) - len(gone)} uploaded files")
    return copied + len(blobs) - len(gone)


def _table(old: Place, new: Place, table: str, pool: ThreadPoolExecutor) -> int:
    for _ in range(_ATTEMPTS):
        versions = old.files(f"{table}/_versions")
        if not versions:
            return 0  # deleted with its vector store
        rest = [path for path in old.files(table) if _VERSIONS not in path]
        gone = list(_copy(old, new, [*rest, *versions], pool))
        # Is the newest of these versions gone by now, then files of it may have been gone before they were listed.
        if not gone and old.has(newest(versions)):
            return len(rest) + len(versions)
        new.remove(table)
    raise BackupFailed(f"{table} was changed {_ATTEMPTS} times while it was copied: try again when less is written")


def newest(versions: Sequence[str]) -> str:
    """Return the manifest of the latest version. Lance names them by number, or by 2^64 - 1 less the number."""

    def number(path: str) -> int:
        name = path.rsplit("/", 1)[1].removesuffix(".manifest")
        return 2**64 - 1 - int(name) if len(name) == 20 else int(name)

    return max((path for path in versions if path.endswith(".manifest")), key=number)


def _copy(old: Place, new: Place, paths: Sequence[str], pool: ThreadPoolExecutor) -> Iterator[str]:
    """Copy files; yield those that were gone."""

    def copy(path: str) -> str | None:
        target = f"{new.root}/{path}"
        new.system.create_dir(target.rsplit("/", 1)[0])
        try:
            with (
                old.system.open_input_stream(f"{old.root}/{path}") as read,
                new.system.open_output_stream(target) as to,
            ):
                while data := read.read(_COPY_BYTES):
                    to.write(data)
        except FileNotFoundError:
            return path
        return None

    for gone in pool.map(copy, paths):
        if gone is not None:
            yield gone
