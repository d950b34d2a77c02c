"""All that the seam relies on in vLLM, so that a version bump fails here, and says what moved."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")

from vllm.engine.protocol import EngineClient
from vllm.outputs import CompletionOutput, PoolingRequestOutput, RequestOutput
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor

from deployments.errors import ConfigError
from deployments.seam import frontend, guard
from deployments.seam.args import engine_args, frontend_config, lora_int_id, parse_args
from deployments.seam.engine_client import FleetClient
from deployments.seam.token_engine import EngineStats, TokenEngine
from deployments.seam.wire import Codec, Delta
from models import tiny_random
from tests.unit.scripted_fleet import scripted_app

# Left at vLLM's own default: they raise NotImplementedError, or mean nothing over a fleet.
LEFT_AT_DEFAULT = {
    "collective_rpc",
    "compute_weight_checksums",
    "finish_weight_update",
    "get_kv_event_sources",
    "get_status",
    "get_weight_version",
    "handle_fault",
    "init_weight_transfer_engine",
    "scale_elastic_ep",
    "shutdown_weight_transfer_engine",
    "start_draft_weight_update",
    "start_weight_update",
    "update_weight_version",
    "update_weights",
}

# Fields of outputs that stay empty.
EMPTY = {
    "metrics": "timings are an engine's own, and a stream may see several: `enable_per_request_metrics` is refused",
    "encoder_prompt": "vLLM leaves it empty too",
    "encoder_prompt_token_ids": "vLLM leaves it empty too",
}


def keywords(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


def test_every_member_of_engine_client_is_served_or_left_out_on_purpose() -> None:
    members = {name for name in vars(EngineClient) if not name.startswith("_")}
    ours = {name for name in vars(FleetClient) if not name.startswith("_")}
    assert members - ours == LEFT_AT_DEFAULT, "vLLM's EngineClient changed: serve the new member or name it here"


def test_generate_and_encode_take_the_keywords_we_know() -> None:
    assert keywords(EngineClient.generate) == {
        "prompt",
        "sampling_params",
        "request_id",
        "prompt_text",
        "lora_request",
        "tokenization_kwargs",
        "trace_headers",
        "priority",
        "data_parallel_rank",
        "session_id",
        "kv_hints",
        "reasoning_ended",
        "reasoning_parser_kwargs",
    }
    assert keywords(EngineClient.encode) == keywords(FleetClient.encode)


def test_the_structs_on_the_wire_have_the_fields_we_know() -> None:
    assert set(EngineCoreOutput.__struct_fields__) == {
        "request_id",
        "new_token_ids",
        "new_logprobs",
        "new_prompt_logprobs_tensors",
        "pooling_output",
        "finish_reason",
        "stop_reason",
        "events",
        "kv_transfer_params",
        "ec_transfer_params",
        "trace_headers",
        "prefill_stats",
        "routed_experts",
        "num_nans_in_logits",
        "mm_cache_miss_hashes",
        "new_sampling_mask",
        "spec_decode_metrics",
        "prompt_token_id_logprobs",
    }
    assert {"request_id", "external_req_id", "reasoning_ended", "lora_request"} <= set(
        EngineCoreRequest.__struct_fields__
    )


@pytest.mark.parametrize(
    ("output", "fields"),
    [
        (
            RequestOutput,
            {
                "request_id",
                "prompt",
                "prompt_token_ids",
                "prompt_logprobs",
                "prompt_token_id_logprobs",
                "outputs",
                "finished",
                "lora_request",
                "num_cached_tokens",
                "num_cache_creation_tokens",
                "kv_transfer_params",
                "ec_transfer_params",
            },
        ),
        (
            CompletionOutput,
            {
                "index",
                "text",
                "token_ids",
                "cumulative_logprob",
                "logprobs",
                "routed_experts",
                "finish_reason",
                "stop_reason",
                "lora_request",
                "sampling_mask",
                "spec_decode_metrics",
                "weight_versions",
            },
        ),
        (PoolingRequestOutput, {"request_id", "outputs", "prompt_token_ids", "num_cached_tokens", "finished", "error"}),
    ],
)
def test_outputs_have_the_fields_we_know(output: type, fields: set[str]) -> None:
    """In the Router vLLM's own OutputProcessor makes them, of what the wire carries."""
    assert keywords(output.__init__) - {"kwargs"} - EMPTY.keys() == fields


@pytest.mark.parametrize("name", ["_add_request", "_run_output_handler", "abort", "get_supported_tasks"])
def test_the_engine_uses_what_async_llm_has(name: str) -> None:
    assert hasattr(AsyncLLM, name)


def test_a_delta_survives_the_wire_and_a_stranger_does_not() -> None:
    codec = Codec()
    delta = Delta(1, 2, 0, EngineCoreOutput("0", [5, 6]))
    batch = codec.decode_deltas([bytes(frame) for frame in codec.encode_deltas("v1", [delta])])
    assert (batch.weight_version, batch.deltas[0].output.new_token_ids) == ("v1", [5, 6])
    with pytest.raises(msgspec.MsgspecError):
        codec.decode_deltas([b"\x00garbage"])


def test_an_adapter_has_the_same_id_in_every_process() -> None:
    assert lora_int_id("sql") == lora_int_id("sql") != lora_int_id("legal")
    assert 0 < lora_int_id("sql") < 2**31


@pytest.mark.parametrize(
    ("engine_args", "frontend_args", "words"),
    [
        ({"model": "m", "dtyp": "float16"}, {}, "engine_args.dtyp is not an option of vLLM; did you mean 'dtype'"),
        ({"model": "m"}, {"tool_call_parsre": "x"}, "did you mean 'tool_call_parser'"),
        ({"model": "m", "dtype": "float17"}, {}, "dtype"),
        ({"model": "m", "port": 1}, {}, "http_options"),
        ({"model": "m", "seed": 1}, {"seed": 2}, "given twice"),
        ({"model": "m", "max_num_queued_reqs": 5}, {}, "router.max_queued_requests"),
        ({"model": "m", "max-num-queued-tokens": 5000}, {}, "router.max_queue_wait_s"),
        ({"model": "m", "data_parallel_size": 2}, {}, "replicas are its data parallelism"),
    ],
)
def test_a_mistaken_option_is_named(engine_args: dict[str, Any], frontend_args: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_args("m", engine_args, frontend_args)


def test_a_key_that_would_guard_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pytest.raises(ConfigError, match="VLLM_API_KEY") as refused:
        parse_args("m", {"model": "m"}, {})
    assert "secret" not in str(refused.value)


def test_every_route_of_vllms_app_is_mounted_or_left_out_by_reason(tmp_path: Path) -> None:
    from vllm.entrypoints.launchers.app import build_app

    args = parse_args("m", {"model": str(tiny_random.write(tmp_path / "model"))}, {})
    routes = {getattr(route, "path", "") for route in build_app(args, ("generate",)).router.routes}
    known = frontend.MOUNTED | {path for paths in frontend.NOT_MOUNTED.values() for path in paths}
    assert routes - known == set(), "vLLM has new routes: mount them or name why not, in seam/frontend.py"


def test_no_route_of_vllms_collides_with_ours() -> None:
    from deployments.web.page import PREFIX

    known = frontend.MOUNTED | {path for paths in frontend.NOT_MOUNTED.values() for path in paths}
    assert not any(path in ("/", "/fleet", PREFIX) or path.startswith(f"{PREFIX}/") for path in known)


def test_totals_add_up_what_vllm_says_of_each_step() -> None:
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

    from deployments.messages import Totals

    stats = EngineStats()
    for first, generated in (([0.5, 0.25], 2), ([], 30)):
        scheduler, iteration = SchedulerStats(), IterationStats()
        scheduler.prefix_cache_stats.record(num_tokens=100, num_hits=16, preempted=False)
        iteration.num_generation_tokens, iteration.time_to_first_tokens_iter = generated, list(first)
        iteration.prompt_token_stats.total = 100 * len(first)
        stats.record(scheduler, iteration)
    stats.record(None, None)
    assert stats.totals == Totals(32, 200, 2, 0.75, 200, 32)


OWN_PARSERS = """
from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

@ToolParserManager.register_module("own_tools")
class OwnTools(Hermes2ProToolParser): ...

@ReasoningParserManager.register_module("own_reasoning")
class OwnReasoning(DeepSeekR1ReasoningParser): ...
"""


@pytest.fixture
def own_parsers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options that bring parsers of the user's own."""
    for manager in (ToolParserManager, ReasoningParserManager):
        monkeypatch.setattr(manager, "lazy_parsers", dict(manager.lazy_parsers))
    file = tmp_path / "own_parsers.py"
    file.write_text(OWN_PARSERS)
    return {
        "tool_parser_plugin": str(file),
        "tool_call_parser": "own_tools",
        "enable_auto_tool_choice": True,
        "reasoning_parser_plugin": str(file),
        "reasoning_parser": "own_reasoning",
    }


@pytest.mark.asyncio
async def test_parsers_that_users_bring_are_there_as_the_app_is_built(
    own_parsers: dict[str, Any], tmp_path: Path
) -> None:
    _, _, client = await scripted_app(tmp_path / "model", **own_parsers)
    assert client.vllm_config.reasoning_config.reasoning_parser == "own_reasoning"


def test_and_as_an_engine_starts(own_parsers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_parsers = {key: value for key, value in own_parsers.items() if "reasoning" in key}
    monkeypatch.setenv(guard.REPLICA_PID, "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(AsyncLLM, "from_vllm_config", lambda config, **options: config)
    model = {"model": str(tiny_random.write(tmp_path / "model")), "max_model_len": 256, "enforce_eager": True}
    config: Any = TokenEngine._build(parse_args("m", model, own_parsers), 0, EngineStats(), False)
    assert config.reasoning_config.reasoning_parser == "own_reasoning"


@pytest.mark.parametrize(
    "options", [{"tool_call_parser": "nobodys", "enable_auto_tool_choice": True}, {"reasoning_parser": "nobodys"}]
)
def test_a_parser_that_nobody_brings_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model 'm': .*nobodys"):
        frontend_config(parse_args("m", {"model": "m"}, options))


def test_options_arrive_as_from_the_command_line() -> None:
    args = parse_args(
        "m",
        {"model": "./m", "dtype": "float16", "max-model-len": 2048, "enable_prefix_caching": False},
        {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "lora_modules": ["sql=./sql"]},
    )
    assert (args.model, args.dtype, args.max_model_len) == ("./m", "float16", 2048)
    assert args.enable_prefix_caching is False
    assert [module.name for module in args.lora_modules] == ["sql"]
    assert args.enable_prompt_tokens_details is True


@pytest.mark.parametrize(
    ("options", "bind", "executor"),
    [
        ({}, "nobind", "UniProcExecutor"),
        ({}, "auto", "MultiprocExecutor"),
        ({"distributed_executor_backend": "mp"}, "nobind", "MultiprocExecutor"),
        ({"tensor_parallel_size": 2}, "nobind", "MultiprocExecutor"),
    ],
)
def test_on_a_cpu_a_single_worker_that_binds_no_threads_runs_in_engine_core(
    options: dict[str, Any], bind: str, executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.executor import Executor

    if not current_platform.is_cpu():
        pytest.skip("this vLLM is not built for CPUs")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = {"model": str(tiny_random.write(tmp_path / "model")), "max_model_len": 256, "enforce_eager": True}
    config = engine_args(parse_args("m", {**model, **options}, {})).create_engine_config()
    assert Executor.get_class(config).__name__ == executor


def test_spans_of_the_engine_are_made_of_what_we_call_them_with() -> None:
    assert keywords(OutputProcessor.do_tracing) == {"engine_core_output", "req_state", "iteration_stats"}
    assert "tracing_enabled" in keywords(OutputProcessor.__init__)
    for struct in (EngineCoreRequest, EngineCoreOutput):
        assert "trace_headers" in {field.name for field in msgspec.structs.fields(struct)}
