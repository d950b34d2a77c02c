"""The configuration's shape, without vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.config import AppConfig, merged
from deployments.errors import ConfigError

ASSISTANT = {"name": "a", "model": "alias", "vector_store_ids": ["vs_1"]}
MODEL = {"name": "m", "engine_args": {"model": "./m"}}


def test_a_minimal_config_is_enough() -> None:
    config = AppConfig.parse({"models": [MODEL]})
    assert config.models[0].deployment_name == "Engine-m"


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({}, "models"),
        ({"models": []}, "models"),
        ({"models": [{"name": "m", "engine_args": {}}]}, "engine_args.model is missing"),
        ({"models": [MODEL], "ruoter": {}}, "ruoter"),
        ({"models": [MODEL, MODEL]}, "two models share the name 'm'"),
        ({"models": [MODEL], "router": {"max_body_bytes": -1}}, "max_body_bytes"),
        ({"models": [MODEL], "assistants": [{"name": "a", "model": "m", "vector_store_ids": []}]}, "vector_store_ids"),
        ({"models": [MODEL], "assistants": [ASSISTANT]}, "none without `documents`"),
        ({"models": [MODEL], "documents": {}}, "documents.uri"),
        ({"models": [MODEL], "documents": {"uri": "s", "embedding_model": "x"}}, "embedding_model is 'x'"),
        ({"models": [MODEL], "documents": {"uri": "s", "chunk_overlap_tokens": 401}}, "at most half"),
    ],
)
def test_a_mistake_is_named(args: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        AppConfig.parse(args)


def test_a_hub_id_gives_a_name_that_serve_takes() -> None:
    model = {"name": "Qwen/Qwen3-0.6B", "engine_args": {"model": "Qwen/Qwen3-0.6B"}}
    assert AppConfig.parse({"models": [model]}).models[0].deployment_name == "Engine-Qwen-Qwen3-0.6B"


def test_overrides_merge_key_by_key() -> None:
    assert merged({"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}}) == {"a": {"x": 1, "y": 3}, "b": 1}


@pytest.mark.parametrize(
    ("names", "model", "word"),
    [
        (["a"], "x", "wants the model 'x'"),
        (["m"], "m", "the name 'm' is taken"),
        (["a", "a"], "m", "the name 'a' is taken"),
        (["a"], "a", "wants the model 'a'"),
    ],
)
def test_an_assistant_needs_a_model_and_a_name_of_its_own(names: list[str], model: str, word: str) -> None:
    assistants = [{"name": name, "model": model, "vector_store_ids": ["vs_1"]} for name in names]
    config = AppConfig.parse({"models": [MODEL], "assistants": assistants, "documents": {"uri": "s"}})
    with pytest.raises(ConfigError, match=word):
        config.check_assistants(["m", "alias"])


def test_an_assistants_model_may_go_by_any_of_its_names() -> None:
    AppConfig.parse({"models": [MODEL], "assistants": [ASSISTANT], "documents": {"uri": "s"}}).check_assistants(
        ["m", "alias"]
    )


def test_a_key_nobody_knows_is_named_with_its_nearest_match() -> None:
    with pytest.raises(ConfigError, match="routr: there is no such key; did you mean 'router'"):
        AppConfig.parse({"models": [MODEL], "routr": {}})
