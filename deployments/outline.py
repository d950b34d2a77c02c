"""What Serve must know of a model before anything has loaded vLLM: many seconds that nothing would overlap with.

Where an option is written so that only vLLM's own parser can tell what it means, that one is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployments.config import MAX_NUM_SEQS, ModelConfig


@dataclass(frozen=True)
class Outline:
    """As much of a model's options as decides how Serve runs its engines.

    Attributes:
        names: Every name that selects the model: its own, its aliases, its LoRA adapters.
        max_num_seqs: Of one engine's batch.
        gpus: Of one engine.
    """

    names: tuple[str, ...]
    max_num_seqs: int
    gpus: int


def outline(model: ModelConfig) -> Outline:
    """Return a model's outline.

    Raises:
        ConfigError: Its options had to be parsed, and cannot be.
    """
    options = {key.replace("-", "_"): value for key, value in {**model.frontend_args, **model.engine_args}.items()}
    return _read(model.name, options) or _parsed(model)


def _read(name: str, options: Mapping[str, Any]) -> Outline | None:
    """Return what plain values say; None where a value is not plain."""
    names = options.get("served_model_name", [name])
    adapters = options.get("lora_modules") or []
    sizes = [
        options.get(key, default)
        for key, default in (("max_num_seqs", MAX_NUM_SEQS), ("tensor_parallel_size", 1), ("pipeline_parallel_size", 1))
    ]
    names = [names] if isinstance(names, str) else names
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
        return None
    if not isinstance(adapters, list) or not all(_is_adapter(each) for each in adapters):
        return None
    return Outline((*names, *(adapter["name"] for adapter in adapters)), sizes[0], sizes[1] * sizes[2])


def _is_adapter(given: Any) -> bool:
    return isinstance(given, dict) and isinstance(given.get("name"), str)


def _parsed(model: ModelConfig) -> Outline:
    from deployments.seam.args import model_names, parse_args

    args = parse_args(model.name, model.engine_args, model.frontend_args)
    gpus = args.tensor_parallel_size * args.pipeline_parallel_size
    return Outline(tuple(model_names(args)), args.max_num_seqs, gpus)
