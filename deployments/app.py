"""The whole app, put together. The only file that knows every part, and the only one that makes deployments."""

from __future__ import annotations

import math
import os
from typing import Any, Final

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.access.keys import configured
from deployments.config import (
    INDEXER_NAME,
    LONGEST_STREAM_S,
    RETRIEVER_NAME,
    ROUTER_NAME,
    AppConfig,
    ModelConfig,
    merged,
)
from deployments.engine import Engine
from deployments.errors import ConfigError
from deployments.indexer import Indexer
from deployments.outline import Outline, has_cuda_build, outline
from deployments.retriever import Retriever
from deployments.router import Router

POLICY: Final = "deployments.fleet.autoscaling:AutoscalingPolicy"
METRICS_INTERVAL_S: Final = 1.0
"""How often Routers report their load. Serve 2.60 reads it here alone, and its own 10 s are longer than the delays."""


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
        config = _by_default(config, scheduling_policy="priority")  # which Routers stamp fair shares with
    if config.tracing is not None:
        config = _by_default(config, otlp_traces_endpoint=config.tracing.otlp_endpoint)
    outlines = {model.name: outline(model) for model in config.models}
    config.check_assistants([name for known in outlines.values() for name in known.names])
    engines = {model.name: _engine(engine, model, config, outlines[model.name]) for model in config.models}
    options = _deployment_options(_router_defaults(), config.router.deployment)
    ingress = serve.ingress()(Router)
    documents = _documents(config, engines) if config.documents is not None else None
    return serve.deployment(ingress, name=ROUTER_NAME, **options).bind(config, engines, documents)


def _by_default(config: AppConfig, **engine_args: Any) -> AppConfig:
    """Give each model's engines these arguments, unless it has its own."""

    def with_them(model: ModelConfig) -> ModelConfig:
        given = {key.replace("-", "_") for key in model.engine_args}
        missing = {key: value for key, value in engine_args.items() if key not in given}
        return model.model_copy(update={"engine_args": {**model.engine_args, **missing}})

    return config.model_copy(update={"models": tuple(with_them(model) for model in config.models)})


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
    retriever = serve.deployment(Retriever, name=RETRIEVER_NAME, **options).bind(
        documents, indexer, embedder, reranker, config.tracing
    )
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
            "metrics_interval_s": METRICS_INTERVAL_S,
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
            "metrics_interval_s": METRICS_INTERVAL_S,
        },
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": LONGEST_STREAM_S,
        "graceful_shutdown_wait_loop_s": 0.5,
    }


def _engine(engine: type, model: ModelConfig, config: AppConfig, known: Outline) -> Application:
    options = engine_options(model, known, gpu=has_cuda_build())
    return serve.deployment(engine, name=model.deployment_name, **options).bind(model, config.router.fleet)


def engine_options(model: ModelConfig, known: Outline, *, gpu: bool) -> dict[str, Any]:
    """Return the Serve options of a model's Engine deployment.

    Args:
        model: With the user's own options, which win.
        known: What its options say.
        gpu: Whether the vLLM installed here runs on GPUs. Where the app is built on a node without, a model says so by
            its `num_gpus`, its placement group, or Ray workers.

    Raises:
        ConfigError: Options that contradict each other.
    """
    given = model.deployment
    own_gpus = (given.get("ray_actor_options") or {}).get("num_gpus") or 0
    gpu = gpu or own_gpus > 0 or "placement_group_bundles" in given or known.executor == "ray"
    if known.executor != "ray" and 1 < known.gpus > own_gpus > 0 and "placement_group_bundles" not in given:
        raise ConfigError(
            f"model {model.name!r}: an engine of {known.gpus} workers needs as many GPUs, and "
            f"ray_actor_options.num_gpus is {own_gpus}: leave that out, or set it to {known.gpus}"
        )
    options = _deployment_options(engine_defaults(known, gpu=gpu), given)
    if "placement_group_bundles" in options and "placement_group_bundles" not in given:
        if own_gpus > 0:
            raise ConfigError(f"model {model.name!r}: its Ray workers hold the GPUs; leave out `num_gpus`")
        _fit_the_group_to_its_actor(options)
    if "placement_group_bundles" in options and options.get("max_replicas_per_node") is not None:
        raise ConfigError(f"model {model.name!r}: Serve takes no `max_replicas_per_node` with a placement group")
    if model.scaling is not None:
        if not options.get("autoscaling_config"):
            raise ConfigError(f"model {model.name!r}: `scaling` needs an `autoscaling_config`, not `num_replicas`")
        if "policy" in options["autoscaling_config"]:
            raise ConfigError(f"model {model.name!r}: `scaling` is a policy already; give one or the other")
        policy = {"policy_function": POLICY, "policy_kwargs": model.scaling.model_dump(exclude_none=True)}
        options["autoscaling_config"] = {**options["autoscaling_config"], "policy": policy}
    return options


def _fit_the_group_to_its_actor(options: dict[str, Any]) -> None:
    """Have the first bundle hold the replica's own actor, and the whole group stand where that may."""
    actor = dict(options["ray_actor_options"])
    first, *others = options["placement_group_bundles"]
    options["placement_group_bundles"] = [{**first, "CPU": actor["num_cpus"]}, *others]
    selector = actor.pop("label_selector", None)
    if selector is not None:
        options.setdefault("placement_group_bundle_label_selector", [selector])
    options["ray_actor_options"] = actor


def engine_defaults(known: Outline, *, gpu: bool) -> dict[str, Any]:
    """Return the Serve options of an Engine deployment, before the user's own are laid over them.

    Args:
        known: What the model's options say.
        gpu: Whether its engines run on GPUs.
    """
    max_num_seqs = known.max_num_seqs
    return {
        **_where(known, gpu=gpu),
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
            "metrics_interval_s": METRICS_INTERVAL_S,
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


def _where(known: Outline, *, gpu: bool) -> dict[str, Any]:
    """Return what one engine takes of the cluster, and how near its parts must be to each other.

    By itself an engine is one actor with all its GPUs, hence on one node, and its workers are its own processes. With
    `distributed_executor_backend: ray` its workers are Ray actors in a placement group of one GPU each: on one node
    while there is tensor parallelism alone, and packed onto as few as hold it where there is a pipeline.
    """
    if not gpu:
        return {"ray_actor_options": {"num_cpus": 0.5}}
    if known.executor != "ray":
        return {"ray_actor_options": {"num_cpus": 1, "num_gpus": known.gpus}}
    return {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 0},
        "placement_group_bundles": [{"CPU": 1, "GPU": 1}, *({"GPU": 1} for _ in range(known.gpus - 1))],
        "placement_group_strategy": "PACK" if known.pipeline_parallel_size > 1 else "STRICT_PACK",
    }
