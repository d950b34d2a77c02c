"""As many engines as this machine has GPUs for. Knows no Ray; how many GPUs there are is an argument.

On a cluster, engines that find no GPU wait for a node that has one. On one machine they would wait for ever, and
nothing would be served meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployments.config import AppConfig
from deployments.errors import ConfigError
from deployments.launch.preflight import OUR_APP, CannotStart
from deployments.outline import gpus_per_engine, outline


@dataclass
class _Engines:
    """Of one model: `deployment` is its mapping in the config, `gpus` what each takes, `count` how many start."""

    name: str
    deployment: dict[str, Any]
    gpus: float
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
        CannotStart: One engine of each model is more than there are GPUs for.
    """
    fitted = copy.deepcopy(dict(content))
    models = [model for application in fitted["applications"] for model in _engines(application, gpu_build)]
    wanted = {id(model): model.count for model in models}
    while (need := sum(model.gpus * model.count for model in models)) > gpus:
        most = max((model for model in models if model.gpus), key=lambda model: model.count)
        if most.count <= 1:
            raise CannotStart(
                f"The models need {need:g} GPU{'s'[: need != 1]} with one engine each, and {gpus:g} can be seen here: "
                "serve fewer, or let engines share one with a fraction as `ray_actor_options.num_gpus`."
            )
        most.count -= 1
    fewer = [model for model in models if model.count < wanted[id(model)]]
    for model in fewer:
        _set_count(model.deployment, model.count)
    return fitted, tuple(
        f"{gpus:g} GPU{'s'[: gpus != 1]} here: {model.name} starts with {model.count} "
        f"engine{'s'[: model.count != 1]}, not {wanted[id(model)]}"
        for model in fewer
    )


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
        found.append(_Engines(model.name, deployment, need, _count(deployment)))
    return found


def _count(deployment: Mapping[str, Any]) -> int:
    fixed = deployment.get("num_replicas")
    if isinstance(fixed, int):
        return fixed
    scaling = deployment.get("autoscaling_config") or {}
    at_least = scaling.get("min_replicas", 1)
    return int(scaling.get("initial_replicas") or at_least)


def _set_count(deployment: dict[str, Any], count: int) -> None:
    if isinstance(deployment.get("num_replicas"), int):
        deployment["num_replicas"] = count
        return
    scaling = deployment["autoscaling_config"]
    for key in ("min_replicas", "initial_replicas"):
        if (scaling.get(key) or 0) > count:
            scaling[key] = count
