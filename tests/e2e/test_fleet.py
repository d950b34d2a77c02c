"""Several models, two Routers, and engines that come and go with the load, on the real engine."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from models import tiny_random
from tests.e2e.serving import ROOT, Served, serving, wait_for

HELLO: Any = [{"role": "user", "content": "Hello there"}]
CITY: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCALES_WITHIN_S = 240


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tiny_random.write(ROOT / "models" / "tiny-random", lora=True)
    with serving(Path(__file__).with_name("fleet_config.yaml"), tmp_path_factory.mktemp("state")) as served:
        yield served


@pytest.fixture(scope="module")
def base(fleet: Served) -> str:
    return f"http://127.0.0.1:{fleet.port}"


@pytest.fixture(scope="module")
def client(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=SCALES_WITHIN_S)


def replicas(base: str, model: str) -> int:
    return int(requests.get(f"{base}/health", timeout=30).json()["replicas"][model])


def test_all_names_are_listed(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list().data} == {"tiny", "adapted", "embedder"}


def test_an_adapter_answers_by_its_own_name(client: openai.OpenAI) -> None:
    texts = {
        name: client.completions.create(model=name, prompt="one two", max_tokens=12, temperature=0).choices[0].text
        for name in ("tiny", "adapted")
    }
    assert texts["tiny"] != texts["adapted"]


def test_a_tool_that_must_be_called_is_called(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[CITY], tool_choice={"type": "function", "function": {"name": "weather"}}
    )
    calls: Any = answer.choices[0].message.tool_calls
    assert json.loads(calls[0].function.arguments) == {"city": "Oslo"}


def test_reasoning_is_told_apart_from_the_answer(base: str) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "chat_template_kwargs": {"thinking": True}}
    message = requests.post(f"{base}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]
    assert message.get("reasoning") and not message.get("content")


def test_structured_output_follows_its_schema(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY["function"]["parameters"]}}
    answer: Any = client.chat.completions.create(model="tiny", messages=HELLO, response_format=schema)
    message = answer.choices[0].message
    assert json.loads(message.content) == {"city": "Oslo"}


def test_the_responses_api_streams(client: openai.OpenAI) -> None:
    events = [
        event.type for event in client.responses.create(model="tiny", input="hi", max_output_tokens=4, stream=True)
    ]
    assert events[0] == "response.created"
    assert events[-1] in ("response.completed", "response.incomplete")


def test_anthropic_messages_are_answered(base: str) -> None:
    body = {"model": "tiny", "max_tokens": 4, "messages": HELLO}
    assert requests.post(f"{base}/v1/messages", json=body, timeout=60).json()["type"] == "message"


def test_tokenize_and_detokenize_are_inverse(base: str) -> None:
    tokens = requests.post(f"{base}/tokenize", json={"model": "tiny", "prompt": "one two"}, timeout=60).json()["tokens"]
    text = requests.post(f"{base}/detokenize", json={"model": "tiny", "tokens": tokens}, timeout=60).json()["prompt"]
    assert "one two" in text


def test_from_zero_the_first_request_is_held_until_an_engine_is_up(client: openai.OpenAI, base: str) -> None:
    wait_for(lambda: replicas(base, "embedder") == 0, "no engine before the first request", SCALES_WITHIN_S)
    answer = client.embeddings.create(model="embedder", input=["one", "two"], encoding_format="float")
    assert [len(item.embedding) for item in answer.data] == [256, 256]


def test_a_pooling_model_scores_and_reranks(base: str) -> None:
    body = {"model": "embedder", "query": "one", "documents": ["one", "seven eight nine"]}
    ranked = requests.post(f"{base}/v1/rerank", json=body, timeout=SCALES_WITHIN_S).json()["results"]
    assert ranked[0]["index"] == 0
    pair = {"model": "embedder", "text_1": "one", "text_2": ["one"]}
    assert requests.post(f"{base}/score", json=pair, timeout=SCALES_WITHIN_S).json()["data"][0][
        "score"
    ] == pytest.approx(1, abs=1e-3)


def test_a_pooling_model_does_not_chat(base: str) -> None:
    answer = requests.post(
        f"{base}/v1/chat/completions", json={"model": "embedder", "messages": HELLO}, timeout=SCALES_WITHIN_S
    )
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


def test_load_brings_a_second_engine_without_cutting_a_stream_and_both_work(client: openai.OpenAI, base: str) -> None:
    wait_for(lambda: replicas(base, "tiny") == 1, "one engine before the load", SCALES_WITHIN_S)
    stop = threading.Event()
    finished: list[tuple[int, str | None]] = []

    def stream() -> None:
        while not stop.is_set():
            chunks = list(
                client.completions.create(
                    model="tiny",
                    prompt="one two",
                    max_tokens=200,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
            )
            usage = chunks[-1].usage
            reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
            finished.append((usage.completion_tokens if usage else 0, reasons[-1]))

    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(stream) for _ in range(12)]
        try:
            wait_for(lambda: replicas(base, "tiny") == 2, "a second engine", SCALES_WITHIN_S)
            before = engine_work(base)
            wait_for(lambda: len(before_and_after(base, before)) == 2, "both engines have new work", SCALES_WITHIN_S)
        finally:
            stop.set()
        for done in streams:
            done.result()
    assert set(finished) == {(200, "length")}


def engine_work(base: str) -> dict[str, float]:
    """Return generated tokens by engine replica, from vLLM's own metrics on Ray's endpoint."""
    text = requests.get(f"{base}/metrics", timeout=30).text
    found = re.findall(r'^ray_vllm_generation_tokens_total\{[^}]*ReplicaId="([^"]+)"[^}]*\} ([0-9.e+]+)', text, re.M)
    return {replica: float(value) for replica, value in found}


def before_and_after(base: str, before: dict[str, float]) -> list[str]:
    return [replica for replica, value in engine_work(base).items() if value > before.get(replica, 0)]


def test_without_work_the_last_engine_leaves(base: str) -> None:
    wait_for(lambda: replicas(base, "embedder") == 0, "back to zero", SCALES_WITHIN_S)
