"""What the document store holds, as small frozen structs. They cross processes; HTTP's models stay in `api`.

`owner` is whose a thing is: None where there are no keys. Times ending in `_us` are microseconds since the epoch, drawn
by the one writer so that no two are equal: lists are ordered by them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypeVar

Attribute = str | float | bool
Attributes = Mapping[str, Attribute]
FileStatus = Literal["in_progress", "completed", "failed", "cancelled"]
ErrorCode = Literal["server_error", "unsupported_file", "invalid_file"]

T = TypeVar("T")


def new_id(prefix: str) -> str:
    """Return a fresh id such as `file-…` or `vs_…`; `prefix` includes its separator."""
    return prefix + secrets.token_hex(12)


@dataclass(frozen=True, slots=True)
class Chunking:
    """OpenAI's static strategy: both in tokens."""

    max_tokens: int = 800
    overlap_tokens: int = 400


@dataclass(frozen=True, slots=True)
class File:
    """An uploaded file; its bytes lie beside the tables."""

    id: str
    owner: str | None
    filename: str
    bytes: int
    created_us: int
    purpose: str
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class VectorStore:
    """A vector store.

    Attributes:
        expires_after_days: Days after the last use at which it expires.
        last_active_at: Seconds since the epoch; noted to the hour, not to the second.
        embedding_model: The name of the model its vectors were made with; None if it is searched by words alone.
        dimension: Of those vectors, 0 without any.
    """

    id: str
    owner: str | None
    name: str
    description: str | None
    created_us: int
    last_active_at: int
    expires_after_days: int | None = None
    state: Literal["open", "expired"] = "open"
    metadata: Mapping[str, str] = field(default_factory=dict)
    embedding_model: str | None = None
    dimension: int = 0

    @property
    def expires_at(self) -> int | None:
        """Seconds since the epoch, or None if it does not expire."""
        days = self.expires_after_days
        return None if days is None else self.last_active_at + days * 86_400


@dataclass(frozen=True, slots=True)
class VectorStoreFile:
    """A file in a vector store, and how far its indexing has come: the durable queue of the Indexer's work."""

    store_id: str
    file_id: str
    owner: str | None
    filename: str
    created_us: int
    status: FileStatus
    chunking: Chunking
    attributes: Attributes = field(default_factory=dict)
    error_code: ErrorCode | None = None
    error_message: str | None = None
    usage_bytes: int = 0
    batch_id: str | None = None


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that is to be in a vector store; `chunking` None leaves it to us."""

    file_id: str
    attributes: Attributes = field(default_factory=dict)
    chunking: Chunking | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Files attached together."""

    id: str
    store_id: str
    owner: str | None
    created_us: int
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class FileCounts:
    """How many files of a store or batch are in which state."""

    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    usage_bytes: int = 0

    @property
    def total(self) -> int:
        return self.in_progress + self.completed + self.failed + self.cancelled


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a file's text.

    Attributes:
        start, end: Where it lies in the text that was read from the file, in characters.
        tokens: Its length.
    """

    text: str
    start: int
    end: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """How results are put in order.

    Attributes:
        ranker: "none" leaves out reranking; "auto" reranks where a rerank model is configured.
        score_threshold: Results below it are left out; scores lie between 0 and 1.
        embedding_weight, text_weight: What the two legs of hybrid search count.
    """

    ranker: str = "auto"
    score_threshold: float = 0.0
    embedding_weight: float = 1.0
    text_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found.

    Attributes:
        score: Between 0 and 1, higher is better. What it means depends on how it was ranked: see docs/documents.md.
        position: The chunk's number within its file.
        start, end: Where it lies in the file's text, in characters.
    """

    store_id: str
    file_id: str
    filename: str
    score: float
    text: str
    position: int
    start: int
    end: int
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list."""

    data: list[T]
    has_more: bool


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which page of a list: at most one of `after` and `before`, both ids."""

    limit: int = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    before: str | None = None


MAX_ATTRIBUTES: Final = 16
MAX_ATTRIBUTE_KEY_CHARS: Final = 64
MAX_ATTRIBUTE_VALUE_CHARS: Final = 512
