"""What `serve_config.yaml` may say under `args`. Knows no Ray and no vLLM.

vLLM's own options are passed through (`engine_args`, `frontend_args`) and checked by vLLM's own parser in
`deployments.seam.args`; Serve's deployment options (`deployment`) are checked by Serve.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.errors import ConfigError

ROUTER_NAME: Final = "Router"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FleetConfig(_Frozen):
    """Bounds and timeouts of the path between the Router and its engines."""

    max_attempts: int = Field(3, ge=1, description="How often one request may be placed before it fails.")
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


class RouterConfig(_Frozen):
    """The Router deployment."""

    deployment: dict[str, Any] = Field({}, description="Serve deployment options, merged over our defaults.")
    env: dict[str, str] = Field({}, description="Environment of the Router's process.")
    max_body_bytes: int = Field(32 * 2**20, ge=1024)
    max_queued_requests: int = Field(
        512, ge=0, description="Requests one Router holds per model beyond what its running engines can work on."
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
        sources_in_text: End the text in a list of what it cites, for clients that show nothing else.
        allow_without_documents: Answer without documents, and say so in the text, when they cannot be searched.
    """

    name: str = Field(min_length=1, max_length=200)
    model: str = Field(min_length=1, max_length=200)
    vector_store_ids: tuple[str, ...] = Field(min_length=1, max_length=16)
    instructions: str | None = None
    max_num_results: int | None = Field(None, ge=1, le=50)
    sources_in_text: bool = False
    allow_without_documents: bool = False


class ModelConfig(_Frozen):
    """One model and the engines that serve it.

    Attributes:
        name: What clients put into `model` (more names: `engine_args.served_model_name`).
        engine_args: vLLM's `AsyncEngineArgs`, by their command-line names with `_` or `-`.
        frontend_args: vLLM's front-end options: chat template, tool and reasoning parsers, LoRA modules, …
        deployment: Serve options of this model's Engine deployment, merged over our defaults.
        env: Environment variables of the engine's processes.
    """

    name: str = Field(min_length=1, max_length=200)
    engine_args: dict[str, Any]
    frontend_args: dict[str, Any] = {}
    deployment: dict[str, Any] = {}
    env: dict[str, str] = {}

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


class AppConfig(_Frozen):
    """Everything under `args` in `serve_config.yaml`."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    assistants: tuple[AssistantConfig, ...] = ()
    router: RouterConfig = RouterConfig()
    grounding: GroundingConfig = GroundingConfig()

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

    @classmethod
    def parse(cls, args: dict[str, Any]) -> AppConfig:
        """Validate `args`.

        Raises:
            ConfigError: With one line per mistake, each naming its place.
        """
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc'])) or 'args'}: {e['msg']}" for e in error.errors()]
            raise ConfigError("; ".join(lines)) from None


def merged(defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `defaults` with `overrides` laid over it, nested mappings merged key by key."""
    result = dict(defaults)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result
