"""OpenAI's HTTP API of files and vector stores, over an Indexer that writes and a Retriever that reads.

An ASGI app by itself. Every error leaves it in OpenAI's shape. Uploads go to disk as they arrive, and on in pieces;
downloads come in pieces: no file is ever in memory as a whole.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Scope

from deployments.config import DocumentsConfig
from deployments.dispatch import ClientGone, while_connected
from deployments.errors import (
    OPAQUE,
    BadRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PublicError,
)
from deployments.request_body import MIN_BYTES_PER_S, bounded
from deployments.retrieval.batching import MESSAGE_BYTES, batches
from deployments.retrieval.filters import checked_attributes
from deployments.retrieval.records import (
    Attachment,
    Attributes,
    Batch,
    Chunk,
    Chunking,
    File,
    FileCounts,
    FileStatus,
    Hit,
    Page,
    PageRequest,
    Ranking,
    VectorStore,
    VectorStoreFile,
)

logger = logging.getLogger("ray.serve.groundswell.router")

PREFIXES: Final = ("/v1/files", "/v1/vector_stores")
PURPOSES: Final = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
STATUSES: Final = ("in_progress", "completed", "failed", "cancelled")
MAX_BATCH_FILES: Final = 2000

_ALL_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
_FILES_A_MESSAGE: Final = 1000
_FORM_OVERHEAD_BYTES: Final = 2**20
_MAX_NAME_CHARS: Final = 255
_MAX_METADATA: Final = (16, 64, 512)


class IndexerApi(Protocol):
    """What the API needs of the Indexer; see `ingestion.Ingestion`."""

    async def begin_upload(self, owner: str | None) -> str: ...
    async def upload(self, file_id: str, offset: int, data: bytes) -> None: ...
    async def finish_upload(
        self, file_id: str, filename: str, purpose: str, expires_after_s: int | None = None
    ) -> File: ...
    async def abort_upload(self, file_id: str) -> None: ...
    async def delete_file(self, owner: str | None, file_id: str) -> None: ...
    async def create_store(
        self,
        owner: str | None,
        name: str = "",
        description: str | None = None,
        metadata: Mapping[str, str] | None = None,
        expires_after_days: int | None = None,
        attachments: Sequence[Attachment] = (),
    ) -> VectorStore: ...
    async def update_store(self, owner: str | None, store_id: str, changes: Mapping[str, Any]) -> VectorStore: ...
    async def delete_store(self, owner: str | None, store_id: str) -> None: ...
    async def attach(self, owner: str | None, store_id: str, attachment: Attachment) -> VectorStoreFile: ...
    async def check_attachable(self, owner: str | None, store_id: str, attachments: Sequence[Attachment]) -> None: ...
    async def attach_batch(
        self, owner: str | None, store_id: str, attachments: Sequence[Attachment], batch_id: str | None = None
    ) -> Batch: ...
    async def set_attributes(
        self, owner: str | None, store_id: str, file_id: str, attributes: Attributes
    ) -> VectorStoreFile: ...
    async def detach(self, owner: str | None, store_id: str, file_id: str) -> None: ...
    async def cancel_batch(self, owner: str | None, store_id: str, batch_id: str) -> Batch: ...


class RetrieverApi(Protocol):
    """What the API needs of the Retriever; see `catalog.Catalog` and `search.Searcher`."""

    async def file(self, owner: str | None, file_id: str) -> File: ...
    async def files(self, owner: str | None, page: PageRequest, purpose: str | None = None) -> Page[File]: ...
    async def read_file(self, owner: str | None, file_id: str, offset: int, length: int) -> bytes: ...
    async def store(self, owner: str | None, store_id: str) -> tuple[VectorStore, FileCounts]: ...
    async def stores(self, owner: str | None, page: PageRequest) -> Page[tuple[VectorStore, FileCounts]]: ...
    async def members(
        self,
        owner: str | None,
        store_id: str,
        page: PageRequest,
        status: FileStatus | None = None,
        batch_id: str | None = None,
    ) -> Page[VectorStoreFile]: ...
    async def member(self, owner: str | None, store_id: str, file_id: str) -> VectorStoreFile: ...
    async def batch(self, owner: str | None, store_id: str, batch_id: str) -> tuple[Batch, FileCounts]: ...
    async def chunks(self, owner: str | None, store_id: str, file_id: str, first: int) -> list[Chunk]: ...
    async def search(
        self,
        owner: str | None,
        store_ids: Sequence[str],
        queries: Sequence[str],
        *,
        max_results: int = 10,
        filters: Any = None,
        ranking: Ranking | None = None,
    ) -> list[Hit]: ...


# Bodies of requests. What they do not name is ignored, as vLLM does.


class _Auto(msgspec.Struct, tag_field="type", tag="auto"):
    pass


class _StaticSizes(msgspec.Struct):
    max_chunk_size_tokens: int
    chunk_overlap_tokens: int


class _Static(msgspec.Struct, tag_field="type", tag="static"):
    static: _StaticSizes


_Strategy = _Auto | _Static | None


class _ExpiresAfter(msgspec.Struct):
    anchor: str
    days: int


class _CreateStore(msgspec.Struct):
    name: str | None = None
    description: str | None = None
    file_ids: list[str] | None = None
    chunking_strategy: _Strategy = None
    expires_after: _ExpiresAfter | None = None
    metadata: dict[str, str] | None = None


class _UpdateStore(msgspec.Struct):
    name: str | msgspec.UnsetType | None = msgspec.UNSET
    expires_after: _ExpiresAfter | msgspec.UnsetType | None = msgspec.UNSET
    metadata: dict[str, str] | msgspec.UnsetType | None = msgspec.UNSET


class _Attach(msgspec.Struct):
    file_id: str
    attributes: Any = None
    chunking_strategy: _Strategy = None


class _AttachBatch(msgspec.Struct):
    file_ids: list[str] | None = None
    files: list[_Attach] | None = None
    attributes: Any = None
    chunking_strategy: _Strategy = None


class _SetAttributes(msgspec.Struct):
    attributes: Any


class _Hybrid(msgspec.Struct):
    embedding_weight: float = 1.0
    text_weight: float = 1.0


class _RankingOptions(msgspec.Struct):
    ranker: str | None = None
    score_threshold: float | None = None
    hybrid_search: _Hybrid | None = None


class _Search(msgspec.Struct):
    query: str | list[str]
    filters: Any = None
    max_num_results: int | None = None
    ranking_options: _RankingOptions | None = None


B = TypeVar("B", bound=msgspec.Struct)
Handler = Callable[[Request], Awaitable[Response]]
OwnerOf = Callable[[Scope], str | None]


def documents_app(
    indexer: IndexerApi,
    retriever: RetrieverApi,
    config: DocumentsConfig,
    *,
    max_body_bytes: int,
    min_body_bytes_per_s: int = MIN_BYTES_PER_S,
    owner_of: OwnerOf = lambda scope: None,
    key_of: OwnerOf = lambda scope: None,
) -> Starlette:
    """Return the app of all paths under `PREFIXES`.

    Args:
        indexer: Writes.
        retriever: Reads.
        config: Bounds.
        max_body_bytes: Of bodies other than uploads.
        min_body_bytes_per_s: What all bodies keep up.
        owner_of: Whose files and vector stores the request may see; None for those that are nobody's.
        key_of: The name of the key that asks; None where there are no keys.
    """
    return _Api(indexer, retriever, config, max_body_bytes, min_body_bytes_per_s, owner_of, key_of).app()


class _Api:
    def __init__(
        self,
        indexer: IndexerApi,
        retriever: RetrieverApi,
        config: DocumentsConfig,
        max_body_bytes: int,
        min_body_bytes_per_s: int,
        owner_of: OwnerOf,
        key_of: OwnerOf,
    ) -> None:
        self._indexer, self._retriever = indexer, retriever
        self._config = config
        self._max_body_bytes, self._min_body_bytes_per_s = max_body_bytes, min_body_bytes_per_s
        self._owner_of, self._key_of = owner_of, key_of
        self._uploads: Counter[str | None] = Counter()  # by key

    def app(self) -> Starlette:
        store, member = "/v1/vector_stores/{store_id}", "/v1/vector_stores/{store_id}/files/{file_id}"
        batch = "/v1/vector_stores/{store_id}/file_batches/{batch_id}"
        table: list[tuple[str, str, Handler]] = [
            ("POST", "/v1/files", self._upload),
            ("GET", "/v1/files", self._list_files),
            ("GET", "/v1/files/{file_id}", self._get_file),
            ("DELETE", "/v1/files/{file_id}", self._delete_file),
            ("GET", "/v1/files/{file_id}/content", self._get_file_content),
            ("POST", "/v1/vector_stores", self._create_store),
            ("GET", "/v1/vector_stores", self._list_stores),
            ("GET", store, self._get_store),
            ("POST", store, self._update_store),
            ("DELETE", store, self._delete_store),
            ("POST", f"{store}/search", self._search),
            ("POST", f"{store}/files", self._attach),
            ("GET", f"{store}/files", self._list_members),
            ("GET", member, self._get_member),
            ("POST", member, self._update_member),
            ("DELETE", member, self._detach),
            ("GET", f"{member}/content", self._get_member_content),
            ("POST", f"{store}/file_batches", self._attach_batch),
            ("GET", batch, self._get_batch),
            ("POST", f"{batch}/cancel", self._cancel_batch),
            ("GET", f"{batch}/files", self._list_members),
        ]
        by_path: dict[str, dict[str, Handler]] = {}
        for method, path, handler in table:
            by_path.setdefault(path, {})[method] = handler
        routes = [Route(path, _endpoint(path, on), methods=_ALL_METHODS) for path, on in by_path.items()]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_route})

    def _owner(self, request: Request) -> str | None:
        return self._owner_of(request.scope)

    # Files

    async def _upload(self, request: Request) -> Response:
        key, most = self._key_of(request.scope), self._config.max_open_uploads
        share = most if key is None else max(1, most // 2)  # so that one key's leave room for another's
        if self._uploads.total() >= most or self._uploads[key] >= share:
            raise Overloaded("Too many uploads at once.", retry_after_s=5)
        self._uploads[key] += 1
        try:
            form = await self._form(request)
            try:
                taking = self._take(self._owner(request), form)
                return JSONResponse(_file(await while_connected(taking, request.receive)))
            finally:
                await form.close()
        finally:
            self._uploads[key] -= 1
            self._uploads += Counter()  # forget who has none

    async def _form(self, request: Request) -> FormData:
        most = self._config.max_file_bytes
        bounded = self._bounded(request, most + _FORM_OVERHEAD_BYTES, _too_large(most))
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise BadRequest("Files are uploaded as multipart/form-data, with the fields `file` and `purpose`.")
        try:
            return await bounded.form(max_files=1, max_fields=16, max_part_size=64 * 2**10)
        except MultiPartException as error:
            raise BadRequest(f"The form cannot be read: {error.message}") from None
        except HTTPException as error:
            raise BadRequest(f"The form cannot be read: {error.detail}") from None

    async def _take(self, owner: str | None, form: FormData) -> File:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise BadRequest("The field `file` is missing, or is not a file.", param="file")
        if purpose not in PURPOSES:
            raise BadRequest(f"`purpose` must be one of {', '.join(PURPOSES)}.", param="purpose")
        if (file.size or 0) > self._config.max_file_bytes:
            raise _too_large(self._config.max_file_bytes)
        expires_after_s = _seconds(form)
        file_id = await self._indexer.begin_upload(owner)
        try:
            offset = 0
            while piece := await file.read(MESSAGE_BYTES):
                await self._indexer.upload(file_id, offset, piece)
                offset += len(piece)
            return await self._indexer.finish_upload(file_id, _name(file.filename), str(purpose), expires_after_s)
        except BaseException:
            await self._indexer.abort_upload(file_id)
            raise

    async def _list_files(self, request: Request) -> Response:
        page = _page(request, most=10_000, default=10_000)
        owner, purpose = self._owner(request), request.query_params.get("purpose")
        files: list[File] = []
        while True:
            limit = min(_FILES_A_MESSAGE, page.limit - len(files))
            found = await self._retriever.files(owner, replace(page, limit=limit), purpose)
            files = found.data + files if page.before else files + found.data
            if not found.has_more or len(files) == page.limit:
                return _list([_file(file) for file in files], found.has_more)
            page = replace(page, before=files[0].id) if page.before else replace(page, after=files[-1].id)

    async def _get_file(self, request: Request) -> Response:
        return JSONResponse(_file(await self._retriever.file(self._owner(request), request.path_params["file_id"])))

    async def _delete_file(self, request: Request) -> Response:
        file_id = request.path_params["file_id"]
        await self._indexer.delete_file(self._owner(request), file_id)
        return _deleted("file", file_id)

    async def _get_file_content(self, request: Request) -> Response:
        owner, file_id = self._owner(request), request.path_params["file_id"]
        file = await self._retriever.file(owner, file_id)
        first = await self._retriever.read_file(owner, file_id, 0, MESSAGE_BYTES)

        async def pieces() -> AsyncIterator[bytes]:
            piece, offset = first, 0
            while piece:
                yield piece
                offset += len(piece)
                piece = await self._retriever.read_file(owner, file_id, offset, MESSAGE_BYTES)

        headers = {"content-length": str(file.bytes)}
        return StreamingResponse(pieces(), media_type="application/octet-stream", headers=headers)

    # Vector stores

    async def _create_store(self, request: Request) -> Response:
        body = await self._body(request, _CreateStore)
        file_ids = _batch_ids(body.file_ids or [], "file_ids")
        chunking = _chunking(body.chunking_strategy)
        store = await self._indexer.create_store(
            self._owner(request),
            _short(body.name, "name") or "",
            _short(body.description, "description"),
            _metadata(body.metadata),
            _days(body.expires_after),
            [Attachment(file_id, {}, chunking) for file_id in file_ids],
        )
        return JSONResponse(_store(store, FileCounts(in_progress=len(set(file_ids)))))

    async def _list_stores(self, request: Request) -> Response:
        found = await self._retriever.stores(self._owner(request), _page(request))
        return _list([_store(store, counts) for store, counts in found.data], found.has_more)

    async def _get_store(self, request: Request) -> Response:
        store, counts = await self._retriever.store(self._owner(request), request.path_params["store_id"])
        return JSONResponse(_store(store, counts))

    async def _update_store(self, request: Request) -> Response:
        body = await self._body(request, _UpdateStore)
        changes: dict[str, Any] = {}
        if not isinstance(body.name, msgspec.UnsetType):
            changes["name"] = _short(body.name, "name") or ""
        if not isinstance(body.metadata, msgspec.UnsetType):
            changes["metadata"] = _metadata(body.metadata)
        if not isinstance(body.expires_after, msgspec.UnsetType):
            changes["expires_after_days"] = _days(body.expires_after)
        owner, store_id = self._owner(request), request.path_params["store_id"]
        await self._indexer.update_store(owner, store_id, changes)
        return JSONResponse(_store(*await self._retriever.store(owner, store_id)))

    async def _delete_store(self, request: Request) -> Response:
        store_id = request.path_params["store_id"]
        await self._indexer.delete_store(self._owner(request), store_id)
        return _deleted("vector_store", store_id)

    async def _search(self, request: Request) -> Response:
        body = await self._body(request, _Search)
        queries = [body.query] if isinstance(body.query, str) else body.query
        searching = self._retriever.search(
            self._owner(request),
            [request.path_params["store_id"]],
            queries,
            max_results=10 if body.max_num_results is None else body.max_num_results,
            filters=body.filters,
            ranking=_ranking(body.ranking_options),
        )
        hits = await while_connected(searching, request.receive)
        data = [
            {
                "file_id": hit.file_id,
                "filename": hit.filename,
                "score": hit.score,
                "attributes": hit.attributes,
                "content": [{"type": "text", "text": hit.text}],
            }
            for hit in hits
        ]
        return JSONResponse(
            {
                "object": "vector_store.search_results.page",
                "search_query": queries,
                "data": data,
                "has_more": False,
                "next_page": None,
            }
        )

    # Files in vector stores

    async def _attach(self, request: Request) -> Response:
        body = await self._body(request, _Attach)
        attachment = _attachment(body.file_id, body.attributes, body.chunking_strategy)
        member = await self._indexer.attach(self._owner(request), request.path_params["store_id"], attachment)
        return JSONResponse(_member(member))

    async def _list_members(self, request: Request) -> Response:
        status: Any = request.query_params.get("filter")
        if status is not None and status not in STATUSES:
            raise BadRequest(f"`filter` must be one of {', '.join(STATUSES)}.", param="filter")
        batch_id = request.path_params.get("batch_id")
        found = await self._retriever.members(
            self._owner(request), request.path_params["store_id"], _page(request), status, batch_id
        )
        return _list([_member(member) for member in found.data], found.has_more)

    async def _get_member(self, request: Request) -> Response:
        params = request.path_params
        return JSONResponse(
            _member(await self._retriever.member(self._owner(request), params["store_id"], params["file_id"]))
        )

    async def _update_member(self, request: Request) -> Response:
        body, params = await self._body(request, _SetAttributes), request.path_params
        member = await self._indexer.set_attributes(
            self._owner(request), params["store_id"], params["file_id"], checked_attributes(body.attributes)
        )
        return JSONResponse(_member(member))

    async def _detach(self, request: Request) -> Response:
        params = request.path_params
        await self._indexer.detach(self._owner(request), params["store_id"], params["file_id"])
        return _deleted("vector_store.file", params["file_id"])

    async def _get_member_content(self, request: Request) -> Response:
        params = request.path_params
        place = (self._owner(request), params["store_id"], params["file_id"])
        chunks = await self._retriever.chunks(*place, 0)

        async def page() -> AsyncIterator[bytes]:
            yield b'{"object":"vector_store.file_content.page","data":['
            more, position, end = chunks, 0, 0
            while more:
                for chunk in more:
                    if text := chunk.text[max(0, end - chunk.start) :]:  # neighbours overlap
                        yield (b"," if end else b"") + msgspec.json.encode({"type": "text", "text": text})
                    end = max(end, chunk.end)
                position += len(more)
                more = await self._retriever.chunks(*place, position)
            yield b'],"has_more":false,"next_page":null}'

        return StreamingResponse(page(), media_type="application/json")

    async def _attach_batch(self, request: Request) -> Response:
        body = await self._body(request, _AttachBatch)
        if (body.file_ids is None) == (body.files is None):
            raise BadRequest("Give either `file_ids` or `files`.", param="file_ids")
        if body.files is not None:
            _batch_ids([file.file_id for file in body.files], "files")
            attachments = [_attachment(f.file_id, f.attributes, f.chunking_strategy) for f in body.files]
        else:
            file_ids = _batch_ids(body.file_ids or [], "file_ids")
            attachments = [_attachment(f, body.attributes, body.chunking_strategy) for f in file_ids]
        if not attachments:
            raise BadRequest("A batch has at least one file.", param="file_ids" if body.files is None else "files")
        owner, store_id = self._owner(request), request.path_params["store_id"]
        batch = None
        runs = list(batches(attachments, lambda a: 128 + sum(len(k) + len(str(v)) for k, v in a.attributes.items())))
        if len(runs) > 1:  # all or nothing
            bare = [replace(attachment, attributes={}) for attachment in attachments]
            await self._indexer.check_attachable(owner, store_id, bare)
        for some in runs:
            batch = await self._indexer.attach_batch(owner, store_id, some, batch.id if batch else None)
        assert batch is not None
        return JSONResponse(_batch(*await self._retriever.batch(owner, store_id, batch.id)))

    async def _get_batch(self, request: Request) -> Response:
        params = request.path_params
        return JSONResponse(
            _batch(*await self._retriever.batch(self._owner(request), params["store_id"], params["batch_id"]))
        )

    async def _cancel_batch(self, request: Request) -> Response:
        owner, params = self._owner(request), request.path_params
        await self._indexer.cancel_batch(owner, params["store_id"], params["batch_id"])
        return JSONResponse(_batch(*await self._retriever.batch(owner, params["store_id"], params["batch_id"])))

    async def _body(self, request: Request, kind: type[B]) -> B:
        body = await self._bounded(request, self._max_body_bytes).body()
        try:
            return msgspec.json.decode(body or b"{}", type=kind)
        except msgspec.ValidationError as error:
            message = str(error)
            place = re.search(r"at `\$\.?([^`]*)`", message)
            field = re.search(r"required field `([^`]*)`", message)
            param = field[1] if field else place[1] if place else None
            raise BadRequest(f"The body is wrong: {message.replace('`$.', '`')}.", param=param) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"The body is not valid JSON: {error}.") from None

    def _bounded(self, request: Request, most: int, too_large: PublicError | None = None) -> Request:
        least = self._min_body_bytes_per_s
        part = bounded(request.scope, request.receive, most, min_bytes_per_s=least, too_large=too_large)
        return Request(request.scope, part)


def _endpoint(path: str, by_method: Mapping[str, Handler]) -> Handler:
    async def endpoint(request: Request) -> Response:
        try:
            if (handler := by_method.get(request.method)) is None:
                raise MethodNotAllowed(f"{path} takes {', '.join(by_method)}.")
            return await handler(request)
        except PublicError as error:
            return JSONResponse(error.body(), error.status, error.headers())
        except (ClientDisconnect, ClientGone):
            return Response(status_code=499)
        except Exception:
            logger.exception("%s %s failed", request.method, path)
            opaque = PublicError(OPAQUE)
            return JSONResponse(opaque.body(), opaque.status)

    return endpoint


async def _no_route(request: Request, error: Exception) -> Response:
    public = NotFound(f"There is no {request.url.path[:200]} here.")
    return JSONResponse(public.body(), public.status)


def _too_large(most: int) -> PublicError:
    return PayloadTooLarge(f"The file is larger than {most} bytes.", param="file")


# What requests say, checked


def _page(request: Request, *, most: int = 100, default: int = 20) -> PageRequest:
    query = request.query_params
    limit: str = query.get("limit", str(default))
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= most:
        raise BadRequest(f"`limit` must be 1 to {most}.", param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise BadRequest("`order` must be asc or desc.", param="order")
    after, before = query.get("after") or None, query.get("before") or None
    if after and before:
        raise BadRequest("Give `after` or `before`, not both.", param="before")
    return PageRequest(int(limit), "asc" if order == "asc" else "desc", after, before)


def _seconds(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    given = str(seconds)
    if anchor != "created_at" or not given.isascii() or not given.isdigit() or not 3600 <= int(given) <= 2_592_000:
        raise BadRequest(
            "`expires_after` needs the anchor `created_at` and 3600 to 2592000 seconds.", param="expires_after"
        )
    return int(given)


def _days(expires_after: _ExpiresAfter | None) -> int | None:
    if expires_after is None:
        return None
    if expires_after.anchor != "last_active_at" or not 1 <= expires_after.days <= 365:
        raise BadRequest("`expires_after` needs the anchor `last_active_at` and 1 to 365 days.", param="expires_after")
    return expires_after.days


def _chunking(strategy: _Strategy) -> Chunking | None:
    if not isinstance(strategy, _Static):
        return None
    size, overlap = strategy.static.max_chunk_size_tokens, strategy.static.chunk_overlap_tokens
    if not 100 <= size <= 4096:
        raise BadRequest("`max_chunk_size_tokens` must be 100 to 4096.", param="chunking_strategy")
    if not 0 <= overlap <= size / 2:
        raise BadRequest(
            "`chunk_overlap_tokens` must be 0 to half of `max_chunk_size_tokens`.", param="chunking_strategy"
        )
    return Chunking(size, overlap)


def _attachment(file_id: str, attributes: Any, strategy: _Strategy) -> Attachment:
    return Attachment(file_id, checked_attributes(attributes), _chunking(strategy))


def _batch_ids(file_ids: list[str], param: str) -> list[str]:
    if len(file_ids) > MAX_BATCH_FILES:
        raise BadRequest(f"At most {MAX_BATCH_FILES} files at once.", param=param)
    return file_ids


def _ranking(options: _RankingOptions | None) -> Ranking:
    options = options or _RankingOptions()
    hybrid = options.hybrid_search or _Hybrid()
    return Ranking(
        options.ranker or "auto", options.score_threshold or 0.0, hybrid.embedding_weight, hybrid.text_weight
    )


def _metadata(metadata: dict[str, str] | None) -> dict[str, str]:
    keys, key_chars, value_chars = _MAX_METADATA
    given = metadata or {}
    if len(given) > keys or any(len(k) > key_chars or len(v) > value_chars for k, v in given.items()):
        raise BadRequest(
            f"`metadata` has at most {keys} keys of {key_chars} characters, and values of {value_chars}.",
            param="metadata",
        )
    return given


def _short(text: str | None, param: str) -> str | None:
    if text is not None and len(text) > 512:
        raise BadRequest(f"`{param}` has more than 512 characters.", param=param)
    return text


def _name(filename: str | None) -> str:
    """Return a file's name without folders and what cannot be stored or shown."""
    last = re.split(r"[/\\]", filename or "")[-1]
    return "".join(c for c in last if c.isprintable())[-_MAX_NAME_CHARS:] or "upload"


# What answers say


def _file(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_us // 1_000_000,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _counts(counts: FileCounts) -> dict[str, int]:
    return {
        "in_progress": counts.in_progress,
        "completed": counts.completed,
        "failed": counts.failed,
        "cancelled": counts.cancelled,
        "total": counts.total,
    }


def _store(store: VectorStore, counts: FileCounts) -> dict[str, Any]:
    days = store.expires_after_days
    status = "expired" if store.state == "expired" else "in_progress" if counts.in_progress else "completed"
    return {
        "id": store.id,
        "object": "vector_store",
        "created_at": store.created_us // 1_000_000,
        "name": store.name,
        "description": store.description,
        "usage_bytes": counts.usage_bytes,
        "file_counts": _counts(counts),
        "status": status,
        "expires_after": None if days is None else {"anchor": "last_active_at", "days": days},
        "expires_at": store.expires_at,
        "last_active_at": store.last_active_at,
        "metadata": store.metadata,
    }


def _member(member: VectorStoreFile) -> dict[str, Any]:
    error = None
    if member.error_code is not None:
        error = {"code": member.error_code, "message": member.error_message}
    return {
        "id": member.file_id,
        "object": "vector_store.file",
        "created_at": member.created_us // 1_000_000,
        "usage_bytes": member.usage_bytes,
        "vector_store_id": member.store_id,
        "status": member.status,
        "last_error": error,
        "attributes": member.attributes,
        "chunking_strategy": {
            "type": "static",
            "static": {
                "max_chunk_size_tokens": member.chunking.max_tokens,
                "chunk_overlap_tokens": member.chunking.overlap_tokens,
            },
        },
    }


def _batch(batch: Batch, counts: FileCounts) -> dict[str, Any]:
    return {
        "id": batch.id,
        "object": "vector_store.files_batch",
        "created_at": batch.created_us // 1_000_000,
        "vector_store_id": batch.store_id,
        "status": "cancelled" if batch.cancelled else "in_progress" if counts.in_progress else "completed",
        "file_counts": _counts(counts),
    }


def _list(data: list[dict[str, Any]], has_more: bool) -> Response:
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return JSONResponse({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more})


def _deleted(what: str, item_id: str) -> Response:
    kind = "file" if what == "file" else f"{what}.deleted"
    return JSONResponse({"id": item_id, "object": kind, "deleted": True})
