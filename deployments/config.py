"""What `serve_config.yaml` may say under `args`. Knows no Ray and no vLLM.

vLLM's own options are passed through (`engine_args`, `frontend_args`) and checked by vLLM's own parser in
`deployments.seam.args`; Serve's deployment options (`deployment`) are checked by Serve.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from deployments.errors import ConfigError
from deployments.request_body import MIN_BYTES_PER_S

ROUTER_NAME: Final = "Router"
INDEXER_NAME: Final = "Indexer"
RETRIEVER_NAME: Final = "Retriever"
LONGEST_STREAM_S: Final = 600.0
"""What draining waits for, in Serve and in HAProxy. Raise `graceful_shutdown_timeout_s` if streams last longer."""
MAX_NUM_SEQS: Final = 256
"""Of a model that does not say: vLLM's default hangs on the GPU's memory, which Router and autoscaler cannot see."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FleetConfig(_Frozen):
    """Bounds and timeouts of the path between the Router and its engines."""

    max_attempts: int = Field(
        3, ge=1, description="How often in a row one request may be placed without getting a token further."
    )
    max_engine_failures: int = Field(
        10,
        ge=1,
        description="How many engine failures one request may meet in all, however far it gets between them; and how "
        "often in a row it may lose its place before any engine had it.",
    )
    retry_delay_s: float = Field(1.0, ge=0, description="Before a request is placed for the third time in a row.")
    connect_timeout_s: float = Field(10.0, gt=0, description="An engine gives up on a Router it cannot reach.")
    completeness_timeout_s: float = Field(
        5.0, gt=0, description="After an engine says 'end', how long its last deltas may still be on their way."
    )
    heartbeat_interval_s: float = Field(1.0, gt=0)
    heartbeat_timeout_s: float = Field(10.0, gt=0, description="Silence after which a peer counts as gone.")
    engine_stall_timeout_s: float = Field(
        60.0, gt=0, description="Work waiting and no engine step for this long means hung. Keep above the longest step."
    )
    max_unsent_messages: int = Field(8192, ge=16, description="Bound of an engine's send buffer to one Router.")
    max_unread_messages: int = Field(8192, ge=16, description="Bound of a Router's receive buffer from one engine.")


class KeysConfig(_Frozen):
    """Where the API keys are. What stands there: `deployments.access.keys.KeyEntry`."""

    file: str | None = Field(None, min_length=1, description="JSON, YAML or TOML, readable by every Router.")
    reread_interval_s: float = Field(5.0, gt=0, description="How often to look whether the file has changed.")


class RouterConfig(_Frozen):
    """The Router deployment."""

    deployment: dict[str, Any] = Field({}, description="Serve deployment options, merged over our defaults.")
    env: dict[str, str] = Field({}, description="Environment of the Router's process.")
    keys: KeysConfig | None = Field(None, description="Callers need an API key; or set GROUNDSWELL_API_KEYS.")
    isolate_prefix_cache: bool = Field(
        False, description="Prompts of one key reuse no KV cache of another's, and cannot be guessed by its timing."
    )
    page: bool = Field(True, description="Whether `/` answers with the page, with or without keys.")
    max_body_bytes: int = Field(32 * 2**20, ge=1024)
    min_body_bytes_per_s: int = Field(
        MIN_BYTES_PER_S, ge=0, description="A body that falls a minute behind gets 408; 0 limits its silence alone."
    )
    max_items: int = Field(2048, ge=1, description="Messages, prompts, texts or tools in one request.")
    max_header_count: int = Field(100, ge=10)
    max_header_bytes: int = Field(32 * 2**10, ge=1024)
    max_queued_requests: int = Field(
        512, ge=0, description="Requests one Router holds per model beyond what its running engines can work on."
    )
    request_timeout_s: float | None = Field(
        None, gt=0, description="Deadline of each request; a client may ask for less in `x-request-timeout-seconds`."
    )
    max_unread_s: float = Field(60.0, gt=0, description="A client that leaves its answer unread this long is cut off.")
    max_queue_wait_s: float = Field(
        10.0, gt=0, description="Requests that would wait longer for an engine, at its present pace, get 429."
    )
    fleet: FleetConfig = FleetConfig()


class GroundingConfig(_Frozen):
    """`file_search` in chat and responses: what a search may cost, and what happens without one."""

    search_timeout_s: float = Field(5.0, gt=0, description="A later search counts as failed.")
    max_num_results: int = Field(10, ge=1, le=50, description="Passages a search returns unless the request says.")
    max_query_chars: int = Field(
        2000, ge=2, description="Of a longer question, its beginning and its end are searched."
    )
    max_passage_tokens: int = Field(
        8192, ge=1, description="Passages in one prompt, however much the model could take."
    )
    output_reserve_tokens: int = Field(
        1024,
        ge=1,
        description="Kept for an answer whose length the request leaves open; a quarter of the context at most.",
    )
    allow_without_documents: bool = Field(
        False,
        description="Answer without documents, and say so, when they cannot be searched. A request may say otherwise.",
    )


class AssistantConfig(_Frozen):
    """A model name of its own: another model, and vector stores that are searched for each question.

    Attributes:
        name: What clients put into `model`.
        model: The model that answers, by any of its names.
        instructions: Come before those of the request.
        owner: Name of the API key whose stores these are; without it, of whoever asks.
        sources_in_text: End the text in a list of what it cites, for clients that show nothing else.
        allow_without_documents: Answer without documents, and say so in the text, when they cannot be searched.
    """

    name: str = Field(min_length=1, max_length=200)
    model: str = Field(min_length=1, max_length=200)
    vector_store_ids: tuple[str, ...] = Field(min_length=1, max_length=16)
    instructions: str | None = None
    max_num_results: int | None = Field(None, ge=1, le=50)
    owner: str | None = None
    sources_in_text: bool = False
    allow_without_documents: bool = False


class ScalingConfig(_Frozen):
    """Engines by how long requests wait, beside how many there are: `deployments.fleet.autoscaling`."""

    ttft_target_s: float | None = Field(
        None, gt=0, description="Nine of ten requests should have their first token by then."
    )
    queued_prompt_tokens: int | None = Field(
        None, ge=1, description="Prompt tokens that may wait for their first token, for each engine."
    )

    @model_validator(mode="after")
    def _says_something(self) -> ScalingConfig:
        if self.ttft_target_s is None and self.queued_prompt_tokens is None:
            raise ValueError("give ttft_target_s, queued_prompt_tokens or both")
        return self


class ModelConfig(_Frozen):
    """One model and the engines that serve it.

    Attributes:
        name: What clients put into `model` (more names: `engine_args.served_model_name`).
        engine_args: vLLM's `AsyncEngineArgs`, by their command-line names with `_` or `-`.
        frontend_args: vLLM's front-end options: chat template, tool and reasoning parsers, LoRA modules, …
        deployment: Serve options of this model's Engine deployment, merged over our defaults.
        env: Environment variables of the engine's processes.
        scaling: Targets beyond ongoing requests, by which engines are added.
    """

    name: str = Field(min_length=1, max_length=200)
    engine_args: dict[str, Any]
    frontend_args: dict[str, Any] = {}
    deployment: dict[str, Any] = {}
    env: dict[str, str] = {}
    scaling: ScalingConfig | None = None

    @field_validator("engine_args")
    @classmethod
    def _names_a_model(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value.get("model"):
            raise ValueError("engine_args.model is missing: a folder or a Hugging Face id")
        return value

    @property
    def deployment_name(self) -> str:
        """The Engine deployment's name in Serve, e.g. for `serve status`."""
        return "Engine-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name)


class DocumentsConfig(_Frozen):
    """The document store, and the Indexer and Retriever deployments over it."""

    uri: str = Field(min_length=1, description="A folder all replicas can reach, or `s3://bucket/prefix`.")
    storage_options: dict[str, str] = Field(
        {}, description="Keys and addresses of S3, by LanceDB's names; what is missing comes from the environment."
    )
    embedding_model: str | None = Field(
        None, description="Name of one of `models`, a pooling model. Without it, stores are searched by words alone."
    )
    rerank_model: str | None = Field(None, description="Name of one of `models`, a score model.")
    language: str = Field("English", description="Of the texts, for stemming and stop words.")
    fusion: Literal["weighted", "rrf"] = Field("weighted", description="How words and meaning become one ranking.")
    max_chunk_size_tokens: int = Field(800, ge=100, le=4096, description="Where the client leaves it to us.")
    chunk_overlap_tokens: int = Field(400, ge=0, description="Likewise. At most half of the size.")
    max_file_bytes: int = Field(512 * 2**20, ge=1)
    max_text_chars: int = Field(20_000_000, ge=1000, description="Of one file, as read from it.")
    max_open_uploads: int = Field(
        16, ge=1, description="More at once get 429, and so does a key with more than half of them."
    )
    parse_workers: int = Field(2, ge=1, description="Files parsed at once, each in a process of its own.")
    parse_timeout_s: float = Field(120.0, gt=0, description="For one file.")
    parse_memory_bytes: int = Field(2 * 2**30, ge=64 * 2**20, description="Address space of each parsing process.")
    embed_batch_texts: int = Field(
        64, ge=1, description="Chunks in one call to the embedding model; fewer after one that failed."
    )
    embed_timeout_s: float = Field(120.0, gt=0, description="Of such a call, before it is tried again.")
    search_timeout_s: float = Field(10.0, gt=0, description="After which a search is a 503.")
    write_timeout_s: float = Field(60.0, gt=0, description="After which a call to the Indexer is a 503.")
    candidates: int = Field(50, ge=50, le=1000, description="What each leg of a search finds, before ranking.")
    compact_after_s: float = Field(5.0, gt=0, description="Tables rest this long before they are compacted.")
    keep_versions_s: float = Field(600.0, ge=1, description="How long old versions of tables can still be read.")
    cache_bytes: int = Field(512 * 2**20, ge=2**20, description="LanceDB's caches, in each replica.")
    indexer: dict[str, Any] = Field({}, description="Serve deployment options of the Indexer.")
    retriever: dict[str, Any] = Field({}, description="Serve deployment options of the Retriever.")

    @model_validator(mode="after")
    def _overlap_is_at_most_half(self) -> DocumentsConfig:
        if self.chunk_overlap_tokens > self.max_chunk_size_tokens / 2:
            raise ValueError("chunk_overlap_tokens must be at most half of max_chunk_size_tokens")
        return self


class TracingConfig(_Frozen):
    """Where spans go. See `deployments.tracing`."""

    otlp_endpoint: str = Field(min_length=1, description="Of an OpenTelemetry collector, `http://host:4317` for gRPC.")
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of requests that are traced, of those whose client has not decided it."
    )


class AppConfig(_Frozen):
    """Everything under `args` in `serve_config.yaml`."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    assistants: tuple[AssistantConfig, ...] = ()
    router: RouterConfig = RouterConfig()
    grounding: GroundingConfig = GroundingConfig()
    documents: DocumentsConfig | None = Field(None, description="Without it, there are no files and vector stores.")
    tracing: TracingConfig | None = Field(None, description="OpenTelemetry spans. None without it.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> AppConfig:
        for what in ("name", "deployment_name"):
            names = [getattr(model, what) for model in self.models]
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"two models share the {what.replace('_', ' ')} {twice[0]!r}")
        return self

    def check_assistants(self, model_names: Collection[str]) -> None:
        """Check what hangs on all names of the models, which vLLM's own options decide.

        Raises:
            ConfigError: An assistant's model does not exist, or its name is taken.
        """
        taken = set(model_names)
        for assistant in self.assistants:
            if assistant.model not in model_names:
                raise ConfigError(
                    f"assistants: {assistant.name!r} wants the model {assistant.model!r}, which is not here"
                )
            if assistant.name in taken:
                raise ConfigError(f"assistants: the name {assistant.name!r} is taken")
            taken.add(assistant.name)

    @model_validator(mode="after")
    def _assistants_have_documents(self) -> AppConfig:
        if self.assistants and self.documents is None:
            raise ValueError("assistants answer from documents, and there are none without `documents`")
        return self

    @model_validator(mode="after")
    def _documents_name_models(self) -> AppConfig:
        if self.documents is not None:
            names = [model.name for model in self.models]
            for key in ("embedding_model", "rerank_model"):
                name = getattr(self.documents, key)
                if name is not None and name not in names:
                    raise ValueError(f"documents.{key} is {name!r}, and models has only {', '.join(names)}")
        return self

    @classmethod
    def parse(cls, args: dict[str, Any]) -> AppConfig:
        """Validate `args`.

        Raises:
            ConfigError: With one line per mistake, each naming its place.
        """
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc'])) or 'args'}: {_said(e)}" for e in error.errors()]
            raise ConfigError("; ".join(lines)) from None


def _said(error: ErrorDetails) -> str:
    """Return what is wrong; of a key nobody knows, its nearest match."""
    if error["type"] != "extra_forbidden":
        return error["msg"]
    near = difflib.get_close_matches(str(error["loc"][-1]), _keys(), n=1)
    return "there is no such key" + (f"; did you mean {near[0]!r}?" if near else "")


def _keys() -> list[str]:
    return sorted({key for model in _Frozen.__subclasses__() for key in model.model_fields})


def merged(defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `defaults` with `overrides` laid over it, nested mappings merged key by key."""
    result = dict(defaults)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result
