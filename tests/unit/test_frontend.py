"""vLLM's front end in a Router decides what it would decide beside an engine with the same options."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

pytest.importorskip("vllm")

from fastapi import Request, Response
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from tests.unit.scripted_fleet import ScriptedFleet, scripted_app

COMPLETION: Final = {"model": "tiny", "prompt": "Hello", "max_tokens": 64}


async def ask(folder: Path, body: dict[str, Any], **options: Any) -> tuple[httpx.Response, ScriptedFleet]:
    """Send a completion to the app of a model with these options."""
    app, fleet, client = await scripted_app(folder, **options)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        answer = await http.post("/v1/completions", json=COMPLETION | body)
    client.shutdown()
    return answer, fleet


@pytest.mark.asyncio
@pytest.mark.parametrize("parameter", [{"logit_bias": {"5": 10}}, {"min_p": 0.5}])
async def test_what_engines_that_speculate_would_ignore_is_refused(parameter: dict[str, Any], tmp_path: Path) -> None:
    answer, fleet = await ask(tmp_path, parameter, speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    assert (answer.status_code, fleet.prompts) == (400, [])
    assert "speculative decoding" in answer.json()["error"]["message"]
    answer, _ = await ask(tmp_path, parameter)
    assert answer.status_code == 200


@pytest.mark.asyncio
async def test_a_drafters_checkpoint_serves_the_model_that_it_drafts_for(tmp_path: Path) -> None:
    drafter, target = tmp_path / "drafter", tmp_path / "target"
    drafter.mkdir()
    config = {
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": str(target)},
        },
        "transformer_layer_config": {"model_type": "llama", "hidden_size": 64},
    }
    (drafter / "config.json").write_text(json.dumps(config))
    answer, fleet = await ask(target, {}, model=str(drafter))
    assert (answer.status_code, fleet.prompts) == (200, ["Hello"])
    answer, fleet = await ask(target, {"min_p": 0.5}, model=str(drafter))
    assert (answer.status_code, fleet.prompts) == (400, [])


@pytest.mark.asyncio
async def test_prompt_logprobs_are_refused_where_engines_would_say_wrong_ones(tmp_path: Path) -> None:
    answer, fleet = await ask(tmp_path, {"prompt_logprobs": 1}, kv_sharing_fast_prefill=True)
    assert (answer.status_code, fleet.prompts) == (400, [])
    assert "kv-sharing-fast-prefill" in answer.json()["error"]["message"]


@pytest.mark.asyncio
@pytest.mark.parametrize(("interval", "events"), [(1, 9), (4, 3)])
async def test_a_streamed_answer_comes_in_pieces_of_stream_interval(interval: int, events: int, tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.tokens = lambda text: list(range(300, 309))  # type: ignore[method-assign]
    app, _, client = await scripted_app(tmp_path, fleet, stream_interval=interval)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        answer = await http.post("/v1/completions", json=COMPLETION | {"stream": True, "return_token_ids": True})
    client.shutdown()
    said = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    pieces = [choice["token_ids"] for event in said for choice in event["choices"]]
    assert [token for piece in pieces for token in piece] == list(range(300, 309))
    assert len(pieces) == events


@pytest.mark.asyncio
@pytest.mark.parametrize("wanted", [None, False])
async def test_requests_are_watermarked_where_engines_can(wanted: bool | None, tmp_path: Path) -> None:
    _, _, client = await scripted_app(tmp_path, watermark_config={"key": 1})
    params = SamplingParams(max_tokens=4, watermarking=wanted)
    request = await client._process("r", {"type": "token", "prompt_token_ids": [1, 2, 3]}, params)
    client.shutdown()
    assert request.sampling_params is not None
    assert request.sampling_params.watermarking is (wanted is None)


@pytest.mark.asyncio
async def test_a_picture_seen_through_an_adapter_is_named_after_it(tmp_path: Path) -> None:
    _, _, client = await scripted_app(tmp_path, enable_lora=True, enable_tower_connector_lora=True)
    client.shutdown()
    assert client.input_processor._get_mm_identifier("picture", LoRARequest("sql", 1, "./sql")) == "sql:picture"


async def signed(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    answer = await call_next(request)
    answer.headers["x-signed"] = "yes"
    return answer


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("middleware", "encoding", "by"),
    [
        ([], None, None),
        ("starlette.middleware.gzip.GZipMiddleware", "gzip", None),
        ([f"{__name__}.signed", "fastapi.middleware.gzip.GZipMiddleware"], "gzip", "yes"),  # not where it is defined
    ],
)
async def test_middleware_that_users_bring_is_there_whatever_path_names_it(
    middleware: str | list[str], encoding: str | None, by: str | None, tmp_path: Path
) -> None:
    answer, _ = await ask(tmp_path, {"logprobs": 5}, middleware=middleware)
    assert answer.status_code == 200
    assert (answer.headers.get("content-encoding"), answer.headers.get("x-signed")) == (encoding, by)


CARRIED: Final = {
    "cache_config.kv_sharing_fast_prefill",
    "diffusion_config.canvas_length",
    "lora_config.default_mm_loras",
    "lora_config.enable_tower_connector_lora",
    "model_config",
    "observability_config",
    "reasoning_config.enabled",
    "speculative_config",  # that there is one, by `speculates`
    "structured_outputs_config.reasoning_parser",
    "watermark_config",
}
LEFT_AT_DEFAULT: Final = {
    "one engine and one front end, as far as a Router can tell": {
        "parallel_config._api_process_count",
        "parallel_config._api_process_rank",
        "parallel_config.data_parallel_size",
        "parallel_config.data_parallel_size_local",
        "parallel_config.local_engines_only",
    },
    "a lower bound of what engines hold: the largest item of a modality fits at any value": {
        "scheduler_config.enable_chunked_prefill",
        "scheduler_config.max_num_batched_tokens",
        "scheduler_config.max_num_seqs",
    },
    "pictures are hashed, which is right at any value": {"cache_config.enable_prefix_caching"},
    "read by what a Router does not run": {"profiler_config.profiler", "shutdown_timeout"},
}


def test_all_that_the_front_end_reads_of_the_config_is_carried_or_left_out_by_reason() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    vllm = Path(spec.submodule_search_locations[0])
    files = [vllm / "v1/engine/input_processor.py", vllm / "multimodal/encoder_budget.py"]
    for folder in ("openai", "anthropic", "generate", "serve", "pooling", "launchers/api_server"):
        files += (vllm / "entrypoints" / folder).rglob("*.py")
    files += (vllm / "renderers").rglob("*.py")
    source = "\n".join(file.read_text() for file in files if file.name != "offline.py")

    fields = {field.name for field in dataclasses.fields(VllmConfig)}
    parts = {name for name in fields if name.endswith("_config") and name != "model_config"}
    read = {
        f"{part}.{name}" for part, name in re.findall(r"\b([a-z_]+_config)\.(?=([a-z_]+))", source) if part in parts
    }
    whole = set(re.findall(r"\b(?:vllm_config|self\.config)\.([a-z_]+)", source)) & fields
    read |= {name for name in whole if not any(each.startswith(f"{name}.") for each in read)}
    assert read == CARRIED.union(*LEFT_AT_DEFAULT.values()), "carry it in `frontend_config`, or say here why not"
