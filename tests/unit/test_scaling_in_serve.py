"""What an Engine says of its waiting requests reaches the policy: through Serve's own classes, without Ray.

`Engine` → Serve's wrapper of it in a replica → a report → Serve's state of the deployment in its controller → the
policy that the app names. Engines are not real: vLLM is left out, and requests are told to them by hand.
"""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.constants import RAY_SERVE_RUN_SYNC_IN_THREADPOOL
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve._private.replica import UserCallableWrapper

from deployments.app import engine_options
from deployments.config import FleetConfig, ModelConfig
from deployments.engine import Engine
from deployments.fleet.autoscaling import QUEUED_TOKENS, Waits
from deployments.metrics import NoMetrics
from deployments.outline import outline

pytestmark = pytest.mark.asyncio
DEPLOYMENT = DeploymentID("Engine-m", "groundswell")
REPLICA = ReplicaID("r0", DEPLOYMENT)


def model(**options: Any) -> ModelConfig:
    limits = {"autoscaling_config": {"max_replicas": 8, "upscale_delay_s": 0}}
    return ModelConfig.model_validate({"name": "m", "engine_args": {"model": "./m"}, "deployment": limits, **options})


class Nothing:
    """Stands in for `TokenEngine`: it has no work, and notes in which thread it is asked for its statistics."""

    errored, unfinished, seconds_since_step = False, 0, 0.0

    def __init__(self) -> None:
        self.asked_in: set[int] = set()

    @property
    def stats(self) -> Any:
        self.asked_in.add(threading.get_ident())
        return SimpleNamespace(steps=0)

    def shutdown(self) -> None: ...


class EngineOfNothing(Engine):
    """An Engine around no vLLM: it is opened, and never asked for a token."""

    async def __init__(self, model: ModelConfig, fleet: FleetConfig) -> None:  # type: ignore[misc]
        nothing: Any = Nothing()
        self._open(model, fleet, "r0", nothing, NoMetrics())


async def in_a_replica(model: ModelConfig) -> UserCallableWrapper:
    """Return the Engine as Serve has it in a replica."""
    wrapper = UserCallableWrapper(
        EngineOfNothing,
        (model, FleetConfig()),
        {},
        deployment_id=DEPLOYMENT,
        run_sync_methods_in_threadpool=RAY_SERVE_RUN_SYNC_IN_THREADPOOL,
        run_user_code_in_separate_thread=False,
        local_testing_mode=True,
        deployment_config=DeploymentConfig(),
        actor_id="",
    )
    await wrapper.initialize_callable()
    return wrapper


def in_the_controller(model: ModelConfig) -> DeploymentAutoscalingState:
    """Return what Serve's controller knows of the deployment, one replica of which runs."""
    options = engine_options(model, outline(model), gpu=False)
    config = DeploymentConfig(autoscaling_config=options["autoscaling_config"], num_replicas=None)
    replica_config: Any = None
    state = DeploymentAutoscalingState(DEPLOYMENT)
    state.register(DeploymentInfo(config, replica_config, start_time_ms=0, deployer_job_id=""), 1)
    state.update_running_replica_ids([REPLICA])
    return state


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deployments.seam.wire", SimpleNamespace(Codec=object))


async def test_prompts_that_wait_in_an_engine_bring_others() -> None:
    scaled = model(scaling={"queued_prompt_tokens": 1000})
    replica, state = await in_a_replica(scaled), in_the_controller(scaled)
    replica._callable._waits.begin("a", 3500, arrived=time.time())

    said = replica.call_record_autoscaling_stats()
    assert said is not None, "Serve found nothing to ask"
    stats: Any = await said
    assert stats[QUEUED_TOKENS] == 3500
    now = time.time()
    series: Any = {name: [TimeStampedValue(now, value)] for name, value in stats.items()}
    state.record_request_metrics_for_replica(ReplicaMetricReport(REPLICA, series, now))
    assert state.get_decision_num_replicas(1) == 4


async def test_a_model_without_targets_reports_nothing() -> None:
    replica = await in_a_replica(model())
    assert replica.call_record_autoscaling_stats() is None


async def test_serve_asks_in_the_thread_that_changes_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = await in_a_replica(model(scaling={"queued_prompt_tokens": 1000}))
    asked_in: set[int] = replica._callable._llm.asked_in

    def stats(waits: Waits, now: float) -> dict[str, float]:
        asked_in.add(threading.get_ident())
        return {}

    monkeypatch.setattr(Waits, "stats", stats)
    for asked in (replica.call_user_health_check(), replica.call_record_autoscaling_stats()):
        assert asked is not None
        await asked
        assert asked_in == {threading.get_ident()}
        asked_in.clear()
