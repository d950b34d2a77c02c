"""Which Serve options an Engine deployment gets: where its parts stand, how many there are, and by which policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray._private.label_utils import validate_label_selector
from ray.serve._private import constants

from deployments.app import assemble, engine_options
from deployments.config import AppConfig
from deployments.engine import gpus_of, has_workers_elsewhere
from deployments.errors import ConfigError
from deployments.outline import Outline
from tests.serve.stub_engine import StubEngine


def options(deployment: dict[str, Any] | None = None, *, gpu: bool = True, **engine_args: Any) -> dict[str, Any]:
    scaling = engine_args.pop("scaling", None)
    model = {"name": "m", "engine_args": {"model": "./m"}, "deployment": deployment or {}, "scaling": scaling}
    parsed = {"max_num_seqs": 64, **engine_args}
    executor = parsed.pop("distributed_executor_backend", None)
    known = Outline(("m",), executor=executor, **parsed)
    made = engine_options(AppConfig.parse({"models": [model]}).models[0], known, gpu=gpu)
    serve.deployment(StubEngine, name="Engine-m", **made)  # Serve takes them
    return made


class TestWhere:
    def test_an_engine_takes_one_gpu(self) -> None:
        assert options()["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}

    def test_without_gpus_it_takes_none(self) -> None:
        assert options(gpu=False)["ray_actor_options"] == {"num_cpus": 0.5}

    @pytest.mark.parametrize(("tensor", "pipeline"), [(4, 1), (2, 2)])
    def test_a_parallel_engine_is_one_actor_with_all_its_gpus_and_so_on_one_node(
        self, tensor: int, pipeline: int
    ) -> None:
        made = options(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
        assert made["ray_actor_options"]["num_gpus"] == 4
        assert "placement_group_bundles" not in made

    def test_with_ray_workers_a_pipeline_may_span_nodes_and_is_packed_onto_few(self) -> None:
        made = options(tensor_parallel_size=4, pipeline_parallel_size=2, distributed_executor_backend="ray")
        assert made["placement_group_bundles"] == [{"CPU": 1, "GPU": 1}, *[{"GPU": 1}] * 7]
        assert made["placement_group_strategy"] == "PACK"
        assert made["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0}

    def test_with_ray_workers_tensor_parallelism_alone_stays_on_one_node(self) -> None:
        made = options(tensor_parallel_size=2, distributed_executor_backend="ray")
        assert made["placement_group_strategy"] == "STRICT_PACK"

    def test_the_group_holds_the_actor_and_stands_where_that_may(self) -> None:
        selector = {"ray.io/accelerator-type": "H100"}
        made = options(
            {"ray_actor_options": {"num_cpus": 8, "label_selector": selector}},
            tensor_parallel_size=2,
            distributed_executor_backend="ray",
        )
        assert made["placement_group_bundles"][0] == {"CPU": 8, "GPU": 1}
        assert made["placement_group_bundle_label_selector"] == [selector]
        assert "label_selector" not in made["ray_actor_options"]

    def test_a_group_of_the_users_own_stays_as_it_is(self) -> None:
        group = {"placement_group_bundles": [{"CPU": 2, "GPU": 1}, {"GPU": 1}], "placement_group_strategy": "SPREAD"}
        made = options(group, pipeline_parallel_size=2, distributed_executor_backend="ray")
        assert {key: made[key] for key in group} == group

    def test_a_gpu_kind_is_chosen_by_label(self) -> None:
        selector = {"ray.io/accelerator-type": "in(H100,H200)"}
        made = options({"ray_actor_options": {"label_selector": selector}})
        assert made["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1, "label_selector": selector}

    def test_at_most_so_many_on_a_node(self) -> None:
        assert options({"max_replicas_per_node": 2})["max_replicas_per_node"] == 2

    def test_where_the_app_is_built_without_gpus_the_model_says_how_many(self) -> None:
        made = options({"ray_actor_options": {"num_gpus": 1}}, gpu=False)
        assert made["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}

    def test_ray_workers_want_gpus_wherever_the_app_is_built(self) -> None:
        made = options(gpu=False, tensor_parallel_size=2, distributed_executor_backend="ray")
        assert made["placement_group_bundles"] == [{"CPU": 1, "GPU": 1}, {"GPU": 1}]

    def test_beside_ray_workers_the_replica_takes_no_gpu_of_its_own(self) -> None:
        with pytest.raises(ConfigError, match="leave out `num_gpus`"):
            options({"ray_actor_options": {"num_gpus": 2}}, tensor_parallel_size=2, distributed_executor_backend="ray")

    def test_an_engine_without_ray_workers_needs_all_its_gpus_itself(self) -> None:
        with pytest.raises(ConfigError, match=r"2 workers needs as many GPUs, and .*num_gpus is 1"):
            options({"ray_actor_options": {"num_gpus": 1}}, tensor_parallel_size=2)
        assert options({"ray_actor_options": {"num_gpus": 2}}, tensor_parallel_size=2)
        assert options({"ray_actor_options": {"num_gpus": 0.5}})

    def test_so_many_on_a_node_and_a_group_do_not_go_together(self) -> None:
        with pytest.raises(ConfigError, match="max_replicas_per_node"):
            options({"max_replicas_per_node": 1}, pipeline_parallel_size=2, distributed_executor_backend="ray")


DOCS = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
PLACES = re.search(r"### Where engines stand\n+(.*?)\n\n[^|]", DOCS, re.DOTALL)
DOCUMENTED = [yaml.safe_load(code) for code in re.findall(r"`(\w+: .*?)`", PLACES[1] if PLACES else "")]


class TestAsDocumented:
    """The ways to place replicas that docs/configuration.md lists are ones that the app is built with."""

    def test_each_way_is_looked_at(self) -> None:
        said = {key for way in DOCUMENTED for key in way}
        assert said == {"max_replicas_per_node", "ray_actor_options", "engine_args", "router"}

    @pytest.mark.parametrize("way", DOCUMENTED, ids=str)
    def test_the_app_can_be_built_with_it(self, way: dict[str, Any]) -> None:
        model: dict[str, Any] = {"name": "m", "engine_args": {"model": "./m", **way.get("engine_args", {})}}
        args = {"models": [model], "router": way.get("router", {})}
        model["deployment"] = {k: v for k, v in way.items() if k not in ("engine_args", "router")}
        app = assemble(AppConfig.parse(args), StubEngine)
        router = app._bound_deployment
        (engine,) = (bound._bound_deployment for bound in router.init_args[1].values())
        if "max_replicas_per_node" in way:
            assert engine._replica_config.max_replicas_per_node == 1
        if "router" in way:
            assert router._replica_config.max_replicas_per_node == 1
        if "engine_args" in way:
            assert len(engine._replica_config.placement_group_bundles) == 16

    def test_a_label_may_choose_the_nodes_of_every_deployment(self) -> None:
        (chosen,) = [way for way in DOCUMENTED if "ray_actor_options" in way]
        assert validate_label_selector(chosen["ray_actor_options"]["label_selector"]) is None
        args = {
            "models": [{"name": "m", "engine_args": {"model": "./m"}, "deployment": chosen}],
            "router": {"deployment": chosen},
            "documents": {"uri": "./documents", "indexer": chosen, "retriever": chosen},
        }
        router = assemble(AppConfig.parse(args), StubEngine)._bound_deployment
        _, engines, documents = router.init_args
        deployments = [router, *(bound._bound_deployment for bound in (*engines.values(), *documents))]
        assert len(deployments) == 4
        for deployment in deployments:
            selector = deployment._replica_config.ray_actor_options["label_selector"]
            assert selector == chosen["ray_actor_options"]["label_selector"]

    def test_serve_knows_the_variable_that_packs(self) -> None:
        (variable,) = set(re.findall(r"`(RAY_SERVE_\w+)=1`", PLACES[1] if PLACES else ""))
        assert hasattr(constants, variable)


class TestInTheEngine:
    @pytest.mark.parametrize(
        ("assigned", "gpus"),
        [({"CPU": 1.0}, 0), ({"GPU": 0.5}, 0.5), ({"GPU_group_0_ab": 1.0, "GPU_group_ab": 1.0}, 1), ({}, 0)],
    )
    def test_gpus_count_in_a_placement_group_too(self, assigned: dict[str, float], gpus: float) -> None:
        assert gpus_of(assigned) == gpus

    @pytest.mark.parametrize(("backend", "elsewhere"), [("ray", True), ("mp", False), (None, False)])
    def test_ray_workers_hold_the_gpus_themselves(self, backend: str | None, elsewhere: bool) -> None:
        args = {"model": "./m", **({"distributed-executor-backend": backend} if backend else {})}
        model = AppConfig.parse({"models": [{"name": "m", "engine_args": args}]}).models[0]
        assert has_workers_elsewhere(model) is elsewhere


class TestHowMany:
    def test_load_is_reported_more_often_than_the_delay_that_waits_for_it(self) -> None:
        scaling = options()["autoscaling_config"]
        assert scaling["metrics_interval_s"] < scaling["upscale_delay_s"]
        assert scaling["metrics_interval_s"] < scaling["look_back_period_s"]

    def test_targets_become_a_policy_of_serves(self) -> None:
        made = options({"autoscaling_config": {"max_replicas": 8}}, scaling={"ttft_target_s": 0.5})
        deployment = serve.deployment(StubEngine, name="Engine-m", **made)
        config = deployment._deployment_config.autoscaling_config
        assert config.max_replicas == 8
        assert config.policy.policy_kwargs == {"ttft_target_s": 0.5}
        assert config.policy.get_policy().__name__ == "AutoscalingPolicy"

    def test_without_targets_serves_own_policy_stays(self) -> None:
        deployment = serve.deployment(StubEngine, name="Engine-m", **options())
        assert deployment._deployment_config.autoscaling_config.policy.is_default_policy_function()

    def test_targets_need_something_that_scales(self) -> None:
        with pytest.raises(ConfigError, match="needs an `autoscaling_config`"):
            options({"num_replicas": 2}, scaling={"queued_prompt_tokens": 4096})

    def test_two_policies_are_one_too_many(self) -> None:
        with pytest.raises(ConfigError, match="one or the other"):
            options({"autoscaling_config": {"policy": {"policy_function": "a:b"}}}, scaling={"ttft_target_s": 1})

    @pytest.mark.parametrize("scaling", [{}, {"ttft_target_s": 0}, {"ttft": 1}])
    def test_targets_that_say_nothing_are_refused(self, scaling: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="scaling"):
            options(scaling=scaling)
