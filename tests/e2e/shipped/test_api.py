"""The OpenAI API over the fleet, on the real engine, with the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import requests

from tests.e2e.serving import Served

MODEL = "groundling"
HELLO: Any = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def base(served: Served) -> str:
    return f"http://127.0.0.1:{served.port}"


@pytest.fixture(scope="module")
def client(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=120)


def greedy(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, **options)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL]


def test_a_streamed_answer_is_the_same_text_as_a_plain_one(client: openai.OpenAI) -> None:
    plain = greedy(client, max_tokens=32).choices[0].message.content
    most = 0
    for _ in range(3):  # a Router that stood still for a moment sends at once what came meanwhile
        chunks = [c for c in greedy(client, max_tokens=32, stream=True) if c.choices]
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == plain
        most = max(most, len(chunks))
    assert most > 8


def cached(usage: Any) -> int:
    return usage.prompt_tokens_details.cached_tokens or 0


def test_usage_counts_tokens_and_those_from_the_prefix_cache(client: openai.OpenAI) -> None:
    prompt: Any = [{"role": "user", "content": "A long prompt that is sent twice. " * 40}]
    answers = [client.chat.completions.create(model=MODEL, messages=prompt, max_tokens=3) for _ in range(3)]
    usage = max((each.usage for each in answers), key=cached)  # of three, two meet at one of two engines
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert (usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    full = greedy(client, max_tokens=32).choices[0].message.content
    stop = full[8:11]
    choice = greedy(client, max_tokens=32, stop=[stop]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (full[: full.index(stop)], "stop")


def test_several_choices_come_from_one_request(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4, n=2, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_two_prompts_in_one_completion_are_both_answered(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["one two", "three four"], max_tokens=3, echo=True)
    assert [choice.text.startswith(p) for choice, p in zip(answer.choices, ("one", "three"), strict=True)] == [True] * 2


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"model": "nobody", "messages": HELLO}, 404),
        ("/v1/chat/completions", {"model": MODEL, "messages": HELLO, "max_tokens": -1}, 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": HELLO, "use_beam_search": True}, 501),
        ("/v1/responses", {"model": MODEL, "input": "x", "background": True}, 501),
        ("/v1/nothing", {}, 404),
    ],
)
def test_a_bad_request_is_answered_in_openais_shape(base: str, path: str, body: dict[str, Any], status: int) -> None:
    answer = requests.post(base + path, json=body, timeout=60)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
