"""What both the writing and the reading side of the store refuse, in the same words."""

from __future__ import annotations

from typing import Final

from deployments.errors import BadRequest, NotFound
from deployments.retrieval.records import VectorStore

_USE_NOTED_AFTER_S: Final = 3600


def use_is_news(store: VectorStore, now: float) -> bool:
    """Whether a use of the store now is to be noted: it expires, and the last use that was noted is a while ago."""
    return store.expires_after_days is not None and store.last_active_at < now - _USE_NOTED_AFTER_S


def check_usable(store: VectorStore, embedding_model: str | None) -> None:
    """Check that a store can be searched and added to here.

    Raises:
        BadRequest: It has expired, or its vectors are another model's.
    """
    if store.state == "expired":
        raise BadRequest(f"The vector store {store.id} has expired.", param="vector_store_id")
    if store.embedding_model is not None and store.embedding_model != embedding_model:
        now = f"uses {embedding_model!r}" if embedding_model else "has no embedding model"
        raise BadRequest(
            f"The vector store {store.id} was made with the embedding model {store.embedding_model!r}, and this server "
            f"{now}: create a new store and attach its files again.",
            param="vector_store_id",
        )


def check_dimension(store: VectorStore, made: int) -> None:
    """Check that vectors of so many dimensions are like those a store has, if it has any.

    Raises:
        BadRequest: They are not, though the model has kept its name.
    """
    if store.dimension and store.dimension != made:
        raise BadRequest(
            f"The vector store {store.id} has vectors of {store.dimension} dimensions, and the embedding model now "
            f"makes {made}: create a new store and attach its files again.",
            param="vector_store_id",
        )


def no_file(file_id: str) -> NotFound:
    """Return the error for a file that is not there, or another's."""
    return NotFound(f"No file with id {file_id[:100]!r}.", param="file_id")


def no_store(store_id: str) -> NotFound:
    """Return the error for a vector store that is not there, or another's."""
    return NotFound(f"No vector store with id {store_id[:100]!r}.", param="vector_store_id")


def no_member(file_id: str) -> NotFound:
    """Return the error for a file that is not in a vector store."""
    return NotFound(f"No file with id {file_id[:100]!r} in this vector store.", param="file_id")


def no_batch(batch_id: str) -> NotFound:
    """Return the error for a file batch that is not there, or another's."""
    return NotFound(f"No file batch with id {batch_id[:100]!r} in this vector store.", param="batch_id")
