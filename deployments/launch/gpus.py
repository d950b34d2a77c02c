"""As many engines as this machine has GPUs for. Knows no Ray; how many GPUs there are is an argument.

On a cluster, engines that find no GPU wait for a node that has one. On one machine they would wait for ever, and
nothing would be served meanwhile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from deployments.config import AppConfig
from deployments.errors import ConfigError
from deployments.launch.preflight import OUR_APP, CannotStart, replicas_at_start
from deployments.outline import gpus_per_engine, outline

_ROUNDING: Final = 1e-4  # Ray's own


@dataclass
class _Engines:
    """Of one model: its `deployment` in the config, what each engine takes, how many are to start, how many do."""

    name: str
    deployment: dict[str, Any]
    gpus: float
    wanted: int
    count: int


def fit(content: Mapping[str, Any], gpus: float, *, gpu_build: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Have no more engines start than there are GPUs for.

    Args:
        content: A Serve config, read and checked.
        gpus: On this machine.
        gpu_build: Whether the vLLM installed here runs on GPUs.

    Returns:
        The config, with fewer engines where it has to be, and a sentence on each model that gets fewer.

    Raises:
        CannotStart: There are not GPUs enough for one engine of each model that starts with any, or not for any of one.
    """
    fitted = copy.deepcopy(dict(content))
    models = [model for application in fitted["applications"] for model in _engines(application, gpu_build)]
    for model in models:
        if model.gpus > gpus + _ROUNDING:
            raise CannotStart(f"An engine of {model.name} takes {_gpus(model.gpus)}, and {gpus:g} can be seen here.")
    while not _have_room(models, int(gpus)):
        reducible = [model for model in models if model.gpus and model.count > 1]
        if not reducible:
            need = sum(model.gpus * model.count for model in models)
            raise CannotStart(
                f"The models need {_gpus(need)} with one engine each, and {gpus:g} can be seen here: serve fewer, or "
                "let engines share one with a fraction as `ray_actor_options.num_gpus`."
            )
        max(reducible, key=lambda model: model.gpus * model.count).count -= 1
    fewer = [model for model in models if model.count < model.wanted]
    for model in fewer:
        _set_count(model.deployment, model.count)
    return fitted, tuple(
        f"{_gpus(gpus)} here: {model.name} starts with {model.count} engine{'s'[: model.count != 1]}, "
        f"not {model.wanted}"
        for model in fewer
    )


def _gpus(number: float) -> str:
    return f"{number:g} GPU{'s'[: number != 1]}"


def _have_room(models: Sequence[_Engines], gpus: int) -> bool:
    """Whether all engines find GPUs: whole ones to themselves, or their share of one, the largest first."""
    free = [1.0] * gpus
    for model in sorted(models, key=lambda model: model.gpus, reverse=True):
        for _ in range(model.count if model.gpus else 0):
            share = min(1.0, model.gpus)
            found = [i for i, left in enumerate(free) if left >= share - _ROUNDING][: math.ceil(model.gpus)]
            if len(found) < math.ceil(model.gpus):
                return False
            for i in found:
                free[i] -= share
    return True


def _engines(application: dict[str, Any], gpu_build: bool) -> list[_Engines]:
    if application["import_path"] != OUR_APP:
        return []
    written = application.get("args") or {}
    found = []
    for model, given in zip(AppConfig.parse(written).models, written["models"], strict=True):
        deployment = given.get("deployment") or {}
        given["deployment"] = deployment
        try:
            known = outline(model)
        except ConfigError as error:
            raise CannotStart(f"The config cannot be served: {error}.") from None
        need = gpus_per_engine(model, known, gpu=gpu_build)
        count = replicas_at_start(deployment)
        found.append(_Engines(model.name, deployment, need, wanted=count, count=count))
    return found


def _set_count(deployment: dict[str, Any], count: int) -> None:
    if isinstance(deployment.get("num_replicas"), int):
        deployment["num_replicas"] = count
        return
    scaling = deployment["autoscaling_config"]
    for key in ("min_replicas", "initial_replicas"):
        if (scaling.get(key) or 0) > count:
            scaling[key] = count
