"""As many engines as a machine has GPUs for, and how many GPUs an engine is for that."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.app import engine_options
from deployments.config import ModelConfig
from deployments.launch import gpus
from deployments.launch.preflight import OUR_APP, CannotStart
from deployments.outline import gpus_per_engine, outline

FRACTION = {"ray_actor_options": {"num_gpus": 0.5}}


def serve_config(*models: dict[str, Any]) -> dict[str, Any]:
    named = [{"name": f"m{i}", "engine_args": {"model": "./m"}, **model} for i, model in enumerate(models)]
    return {"applications": [{"import_path": OUR_APP, "args": {"models": named}}, {"import_path": "other:app"}]}


def fit(here: float, *models: dict[str, Any], gpu_build: bool = True) -> tuple[list[Any], tuple[str, ...]]:
    """Return each model's `deployment` after fitting, and what is said of it."""
    content = serve_config(*models)
    before = repr(content)
    fitted, sentences = gpus.fit(content, here, gpu_build=gpu_build)
    assert repr(content) == before
    return [model["deployment"] for model in fitted["applications"][0]["args"]["models"]], sentences


def test_engines_beyond_the_gpus_do_not_start_and_it_is_said() -> None:
    deployments, sentences = fit(1, {"deployment": {"num_replicas": 2}})
    assert deployments == [{"num_replicas": 1}]
    assert sentences == ("1 GPU here: m0 starts with 1 engine, not 2",)


@pytest.mark.parametrize(
    ("here", "deployment", "gpu_build"),
    [
        (2, {"num_replicas": 2}, True),
        (1, {"num_replicas": 2, **FRACTION}, True),
        (0, {"num_replicas": 2}, False),
        (1, {"autoscaling_config": {"min_replicas": 1, "max_replicas": 8}}, True),
        (1, {"autoscaling_config": {"min_replicas": 0, "max_replicas": 8}}, True),
        (1, {}, True),
    ],
)
def test_what_fits_stays_as_it_is(here: float, deployment: dict[str, Any], gpu_build: bool) -> None:
    assert fit(here, {"deployment": deployment}, gpu_build=gpu_build) == ([deployment], ())


def test_models_give_way_until_all_fit() -> None:
    deployments, sentences = fit(3, {"deployment": {"num_replicas": 4}}, {}, {"deployment": {"num_replicas": 2}})
    assert [deployment.get("num_replicas") for deployment in deployments] == [1, None, 1]
    assert len(sentences) == 2


def test_engines_that_scale_start_with_fewer_and_may_become_as_many() -> None:
    scaling = {"min_replicas": 2, "initial_replicas": 4, "max_replicas": 8}
    deployments, _ = fit(1, {"deployment": {"autoscaling_config": scaling}})
    assert deployments == [{"autoscaling_config": {"min_replicas": 1, "initial_replicas": 1, "max_replicas": 8}}]


FROM_ZERO = {"autoscaling_config": {"min_replicas": 0, "max_replicas": 1}}


@pytest.mark.parametrize(
    ("here", "model", "need"),
    [
        (1, {"engine_args": {"model": "./m", "tensor_parallel_size": 2}}, "2 GPUs"),
        (1, {"engine_args": {"model": "./m", "tensor_parallel_size": 2}, "deployment": FROM_ZERO}, "2 GPUs"),
        (0, {}, "1 GPU"),
        (0, {"deployment": FROM_ZERO}, "1 GPU"),
        (0, {"deployment": FRACTION}, "0.5 GPUs"),
    ],
)
def test_where_not_even_one_engine_fits_the_start_says_so(here: float, model: dict[str, Any], need: str) -> None:
    with pytest.raises(CannotStart, match=f"An engine of m0 takes {need}, and {here} can be seen here"):
        fit(here, model)


def test_where_not_all_models_fit_the_start_says_so() -> None:
    with pytest.raises(CannotStart, match="need 2 GPUs with one engine each, and 1 can be seen here"):
        fit(1, {"deployment": {"num_replicas": 2}}, {})


def test_a_gpu_asked_for_by_name_is_missed_with_the_cpu_build_too() -> None:
    with pytest.raises(CannotStart, match="takes 1 GPU, and 0"):
        fit(0, {"deployment": {"ray_actor_options": {"num_gpus": 1}}}, gpu_build=False)


def share(gpus: float, replicas: int) -> dict[str, Any]:
    return {"deployment": {"num_replicas": replicas, "ray_actor_options": {"num_gpus": gpus}}}


def counts(here: float, *models: dict[str, Any]) -> list[int]:
    return [deployment["num_replicas"] for deployment in fit(here, *models)[0]]


def test_a_share_lies_on_one_gpu() -> None:
    assert counts(2, share(0.6, 3)) == [2], "1.8 of 2, and yet the third finds no room"
    assert counts(7, share(0.14, 49)) == [49]
    assert counts(1, share(0.8, 1), share(0.1, 2)) == [1, 2]


def test_the_model_that_takes_most_gives_way() -> None:
    assert counts(9, share(8, 2), share(0.25, 4)) == [1, 4]


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(
    ("deployment", "engine_args"),
    [
        ({}, {}),
        (FRACTION, {}),
        ({}, {"tensor_parallel_size": 2, "pipeline-parallel-size": 2}),
        ({}, {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}),
        ({"placement_group_bundles": [{"CPU": 1, "GPU": 2}, {"GPU": 1}]}, {}),
        ({"ray_actor_options": {"num_gpus": 0}}, {}),
    ],
)
def test_an_engine_is_as_many_gpus_as_ray_is_asked_for(
    gpu: bool, deployment: dict[str, Any], engine_args: dict[str, Any]
) -> None:
    model = ModelConfig(name="m", engine_args={"model": "./m", **engine_args}, deployment=deployment)
    options = engine_options(model, outline(model), gpu=gpu)
    asked = [*options.get("placement_group_bundles", []), {"GPU": options["ray_actor_options"].get("num_gpus", 0)}]
    if "placement_group_bundles" in deployment:
        asked.pop()  # the actor stands in the group
    assert gpus_per_engine(model, outline(model), gpu=gpu) == sum(bundle.get("GPU", 0) for bundle in asked)
