"""What a Router writes on requests because of who asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from deployments.access.fair_share import LEVEL, FairShare
from deployments.app import assemble
from deployments.config import AppConfig
from deployments.request_scope import Caller, request_scope
from deployments.seam.stamps import Stamps, salt
from models import tiny_random
from tests.unit.recording import Clock

HASH = "0" * 64


def request(priority: int = 0, cache_salt: str | None = None) -> EngineCoreRequest:
    return EngineCoreRequest(
        "r", [1, 2, 3], None, SamplingParams(max_tokens=10), None, 0.0, None, cache_salt, None, priority=priority
    )


def stamped(stamps: Stamps, asked: EngineCoreRequest, **caller: Any) -> EngineCoreRequest:
    with request_scope(Caller("ann", "ann", **caller)):
        stamps.put(asked)
    return asked


def test_without_keys_a_request_stays_as_it_is() -> None:
    asked = request(7, "mine")
    assert Stamps(FairShare(clock=Clock()), isolate_prefix_cache=True).put(asked) is None
    assert (asked.priority, asked.cache_salt) == (7, "mine")


def test_a_clients_own_priority_counts_only_where_its_key_may_set_one() -> None:
    stamps = Stamps(FairShare(clock=Clock()))
    assert stamped(stamps, request(-5)).priority == stamped(Stamps(FairShare(clock=Clock())), request()).priority
    assert stamped(stamps, request(-5), may_set_priority=True).priority < -LEVEL
    assert stamped(stamps, request(5), may_set_priority=True).priority > LEVEL


def test_where_engines_do_not_schedule_by_priority_nothing_is_shared() -> None:
    assert stamped(Stamps(), request(-5)).priority == 0
    assert stamped(Stamps(), request(-5), may_set_priority=True).priority == -5


def test_a_prefix_cache_is_isolated_only_where_that_is_wanted() -> None:
    assert stamped(Stamps(), request(0, "mine")).cache_salt == "mine"
    assert stamped(Stamps(), request()).cache_salt is None
    assert stamped(Stamps(isolate_prefix_cache=True), request()).cache_salt == salt("ann", None)


def test_no_client_can_write_another_keys_salt() -> None:
    salts = {salt(name, given) for name in ("a", "b", "ab") for given in (None, "", "a", "b", salt("a", None))}
    assert len(salts) == 15


@pytest.mark.parametrize(
    ("router", "given", "policy"),
    [
        ({}, {}, "fcfs"),
        ({"env": {"GROUNDSWELL_API_KEYS": f"ann:{HASH}"}}, {}, "priority"),
        ({"keys": {"file": "keys.yaml"}}, {}, "priority"),
        ({"keys": {"file": "keys.yaml"}}, {"scheduling-policy": "fcfs"}, "fcfs"),
    ],
)
def test_with_keys_engines_schedule_by_priority_unless_told_otherwise(
    tmp_path: Path, router: dict[str, Any], given: dict[str, Any], policy: str
) -> None:
    from deployments.seam.args import parse_args

    engine_args = {"model": str(tiny_random.write(tmp_path)), "dtype": "float32", **given}
    config = AppConfig.parse({"models": [{"name": "tiny", "engine_args": engine_args}], "router": router})
    bound, engines, _ = assemble(config, type("StubEngine", (), {}))._bound_deployment.init_args
    (model,) = bound.models
    assert engines["tiny"]._bound_deployment.init_args[0] == model
    assert parse_args(model.name, model.engine_args, model.frontend_args).scheduling_policy == policy
