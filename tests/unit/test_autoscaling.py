"""How many engines a model gets by how long its requests wait: the policy alone, then in Serve's hands. No Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.fleet.autoscaling import (
    PROMPT_TOKENS,
    QUEUED_TOKENS,
    TTFT,
    WINDOW_S,
    AutoscalingPolicy,
    Snapshot,
    Waits,
    engines_wanted,
)

DEPLOYMENT = DeploymentID("Engine-m", "groundswell")


def wanted(
    *, ttft_target_s: float | None = None, queued_prompt_tokens: int | None = None, **snapshot: Any
) -> tuple[float, str]:
    given = {"running": 2, "target": 2, "ongoing": 4.0, "queued": 0.0, "target_ongoing": 8.0, **snapshot}
    return engines_wanted(Snapshot(**given), ttft_target_s=ttft_target_s, queued_prompt_tokens=queued_prompt_tokens)


class TestTimeToTheFirstToken:
    def test_as_long_as_it_is_met_ongoing_requests_decide(self) -> None:
        assert wanted(ttft_target_s=1, ttft_s=(0.2, 0.3), ongoing=20) == (2.5, "ongoing requests")

    def test_when_it_is_missed_engines_come_in_its_proportion(self) -> None:
        assert wanted(ttft_target_s=1, ttft_s=(1.0, 2.0)) == (3.0, "time to the first token")

    def test_a_backlog_at_most_doubles_them(self) -> None:
        assert wanted(ttft_target_s=1, ttft_s=(60.0, 60.0)) == (4.0, "time to the first token")

    def test_near_the_target_none_is_taken_away(self) -> None:
        assert wanted(ttft_target_s=1, ttft_s=(0.9,), ongoing=1) == (2.0, "time to the first token")

    def test_well_below_it_ongoing_requests_take_them_away(self) -> None:
        assert wanted(ttft_target_s=1, ttft_s=(0.5,), ongoing=1) == (0.125, "ongoing requests")

    def test_while_engines_load_no_more_are_asked_for(self) -> None:
        assert wanted(ttft_target_s=1, ttft_s=(30.0,), target=3) == (3.0, "time to the first token")

    def test_old_waits_say_nothing_of_engines_that_have_just_come(self) -> None:
        assert wanted(ttft_target_s=1, ttft_s=(30.0,), settled_s=WINDOW_S - 1)[0] == 2.0
        assert wanted(ttft_target_s=1, ttft_s=(30.0,), settled_s=WINDOW_S)[0] == 4.0

    def test_it_never_asks_for_fewer_than_ongoing_requests_do(self) -> None:
        assert wanted(ttft_target_s=1, ttft_s=(1.5,), ongoing=80) == (10.0, "ongoing requests")

    def test_nothing_asked_nothing_late(self) -> None:
        assert wanted(ttft_target_s=1, ongoing=0) == (0.0, "ongoing requests")


class TestQueuedPromptTokens:
    def test_each_engine_may_have_so_many_waiting(self) -> None:
        assert wanted(queued_prompt_tokens=1000, queued_tokens=(2000, 1500)) == (3.5, "queued prompt tokens")

    def test_requests_in_routers_count_as_long_as_the_others_are(self) -> None:
        assert wanted(queued_prompt_tokens=1000, queued=10, prompt_tokens=(300, 500))[0] == 4.0

    def test_few_ask_for_nothing(self) -> None:
        assert wanted(queued_prompt_tokens=1000, queued_tokens=(10,)) == (0.5, "ongoing requests")

    def test_the_stronger_of_two_targets_decides(self) -> None:
        both = {"ttft_target_s": 1.0, "queued_prompt_tokens": 1000, "ttft_s": (1.5,)}
        assert wanted(**both, queued_tokens=(2000,)) == (3.0, "time to the first token")
        assert wanted(**both, queued_tokens=(9000,)) == (9.0, "queued prompt tokens")


class TestWhatAnEngineSays:
    def test_a_request_counts_from_its_arrival_in_its_router(self) -> None:
        waits = Waits()
        waits.begin("a", 10, arrived=100.0)
        waits.first_token("a", now=102.0)
        assert waits.stats(now=102.0)[TTFT] == 2.0

    def test_later_tokens_change_nothing(self) -> None:
        waits = Waits()
        waits.begin("a", 10, arrived=100.0)
        for now in (101.0, 105.0, 109.0):
            waits.first_token("a", now)
        assert waits.stats(now=109.0)[TTFT] == 1.0

    def test_nine_of_ten_are_held_against_the_target(self) -> None:
        waits = Waits()
        for i in range(10):
            waits.begin(str(i), 1, arrived=0.0)
            waits.first_token(str(i), now=1.0 + i)
        assert waits.stats(now=10.0)[TTFT] == 9.0

    def test_who_still_waits_counts_with_the_wait_so_far(self) -> None:
        waits = Waits()
        waits.begin("a", 10, arrived=100.0)
        assert waits.stats(now=107.0)[TTFT] == 7.0

    def test_prompts_that_wait_are_queued_until_their_first_token_or_their_end(self) -> None:
        waits = Waits()
        for name, tokens in (("a", 10), ("b", 200), ("c", 3000)):
            waits.begin(name, tokens, arrived=0.0)
        waits.first_token("a", now=1.0)
        waits.forget("b")
        assert waits.stats(now=1.0)[QUEUED_TOKENS] == 3000
        assert waits.stats(now=1.0)[PROMPT_TOKENS] == 1070

    def test_what_was_long_ago_is_forgotten_even_if_nobody_asks(self) -> None:
        waits = Waits()
        for i in range(1000):
            waits.begin(str(i), 1, arrived=float(i))
            waits.first_token(str(i), now=float(i))
        assert len(waits._served) <= WINDOW_S + 1
        assert waits.stats(now=5000.0)[TTFT] == 0.0

    def test_clocks_that_disagree_give_no_negative_waits(self) -> None:
        waits = Waits()
        waits.begin("a", 1, arrived=100.0)
        assert waits.stats(now=99.0)[TTFT] == 0.0
        waits.first_token("a", now=99.5)
        assert waits.stats(now=99.5)[TTFT] == 0.0


class Controller:
    """Serve's controller as far as one deployment's policy sees it: Serve's own wrapper, contexts of our making."""

    def __init__(self, **targets: Any) -> None:
        self.config = AutoscalingConfig(
            min_replicas=1,
            max_replicas=8,
            target_ongoing_requests=8,
            upscale_delay_s=0,
            downscale_delay_s=0,
            metrics_interval_s=1,
            look_back_period_s=3,
        )
        self.policy = _apply_autoscaling_config(AutoscalingPolicy(**targets))
        self.running, self.target, self.now = 1, 1, 1000.0
        self.state: dict[str, Any] = {}

    def ask(self, *, ongoing: float, queued: float = 0.0, **said: float) -> int:
        self.now += 1
        replicas = [ReplicaID(f"r{i}", DEPLOYMENT) for i in range(self.running)]
        context = AutoscalingContext(
            deployment_id=DEPLOYMENT,
            deployment_name="Engine-m",
            app_name="groundswell",
            current_num_replicas=self.running,
            target_num_replicas=self.target,
            running_replicas=replicas,
            total_num_requests=ongoing,
            total_queued_requests=queued,
            aggregated_metrics=lambda: {name: dict.fromkeys(replicas, value) for name, value in said.items()},
            raw_metrics=None,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=8,
            policy_state=self.state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now,
            config=self.config,
        )
        decided, self.state = self.policy(context)
        self.target = min(8, max(1, decided))
        return self.target


class TestInServesHands:
    def test_engines_come_when_first_tokens_are_late_and_go_when_nothing_is_asked(self) -> None:
        serve = Controller(ttft_target_s=1.0)
        assert serve.ask(ongoing=4, ttft_s=0.4) == 1
        assert serve.ask(ongoing=6, ttft_s=5.0) == 2
        assert serve.ask(ongoing=7, ttft_s=9.0) == 2  # it loads
        serve.running = 2
        assert serve.ask(ongoing=7, ttft_s=9.0) == 2  # it is new
        serve.now += WINDOW_S
        assert serve.ask(ongoing=7, ttft_s=3.0) == 4
        serve.running = 4
        assert serve.ask(ongoing=0, ttft_s=0.0) == 1

    def test_without_a_word_from_any_engine_ongoing_requests_decide(self) -> None:
        serve = Controller(ttft_target_s=1.0, queued_prompt_tokens=1000)
        assert serve.ask(ongoing=17) == 3

    def test_serve_starts_the_first_engine_of_none(self) -> None:
        serve = Controller(queued_prompt_tokens=1000)
        serve.running = serve.target = 0
        assert serve.ask(ongoing=1, queued=1) == 1

    @pytest.mark.parametrize("name", [TTFT, QUEUED_TOKENS])
    def test_serves_own_delays_hold(self, name: str) -> None:
        serve = Controller(ttft_target_s=1.0, queued_prompt_tokens=10)
        serve.config.upscale_delay_s = 3600
        assert serve.ask(ongoing=1, **{name: 100.0}) == 1
