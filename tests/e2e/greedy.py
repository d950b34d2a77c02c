"""Greedy answers of the model `tiny`, token for token: what clients must get, whatever happens to engines meanwhile.

Where an answer moved to another engine, a prompt is computed in other shapes than single tokens: it may part from the
undisturbed one at two tokens that are equally likely.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import requests

from benchmarks.chaos import TIE_NATS, likelier

LIMIT_S = 480
TOKENS = 200
BEGUN = 20


@dataclass(frozen=True)
class Answer:
    """What a client must get, however it gets it."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    usage: dict[str, int]
    pause_s: float = field(default=0, compare=False)


def ask(url: str, headers: Mapping[str, str], path: str, **body: Any) -> requests.Response:
    return requests.post(
        url + path,
        json={"model": "tiny", **body},
        headers=headers,
        stream=body.get("stream", False),
        timeout=LIMIT_S,
    )


def complete(url: str, headers: Mapping[str, str], prompt: str, **body: Any) -> requests.Response:
    asked = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = ask(url, headers, "/v1/completions", prompt=prompt, **asked, **body)
    assert answer.status_code == 200, answer.text
    return answer


def plain(url: str, prompt: str, *, headers: Mapping[str, str] | None = None) -> Answer:
    answer = complete(url, headers or {}, prompt).json()
    (choice,) = answer["choices"]
    return Answer(choice["text"], tuple(choice["token_ids"]), choice["finish_reason"], _counted(answer["usage"]))


def stream(url: str, prompt: str, begun: Event | None = None, *, headers: Mapping[str, str] | None = None) -> Answer:
    """Read a stream to its end; set `begun` after some tokens."""
    text, tokens, reason, usage, last = "", [], None, {}, ""
    heard, pause_s = time.monotonic(), 0.0
    with complete(url, headers or {}, prompt, stream=True, stream_options={"include_usage": True}) as answer:
        for line in answer.iter_lines():
            if not line.startswith(b"data: "):
                continue
            heard, pause_s = time.monotonic(), max(pause_s, time.monotonic() - heard)
            last = line.removeprefix(b"data: ").decode()
            if last == "[DONE]":
                break
            event = json.loads(last)
            assert "error" not in event, event
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text += choice["text"]
                tokens += choice.get("token_ids") or []
                reason = choice["finish_reason"] or reason
            if begun is not None and len(tokens) >= BEGUN:
                begun.set()
    assert last == "[DONE]"
    return Answer(text, tuple(tokens), reason, _counted(usage), pause_s)


def until_begun(event: Event, answer: Future[Answer]) -> None:
    """Return once `event` is set; where the answer ended before, raise what it ended with."""
    deadline = time.monotonic() + LIMIT_S
    while not event.wait(0.2):
        if answer.done():
            answer.result()
        assert time.monotonic() < deadline, "an answer has not begun"


def assert_undisturbed(
    url: str,
    prompts: Sequence[str],
    answers: Sequence[Answer],
    undisturbed: Sequence[Answer],
    *,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Assert that answers are the undisturbed ones, or part from them at a tie; `url` is asked what is one."""
    for prompt, answer, expected in zip(prompts, answers, undisturbed, strict=True):
        if answer == expected:
            continue
        assert (len(answer.tokens), answer.finish_reason) == (len(expected.tokens), expected.finish_reason), prompt
        assert answer.usage == expected.usage, prompt
        assert answer.tokens != expected.tokens, f"{prompt}: the same tokens, and another text"
        pairs = enumerate(zip(answer.tokens, expected.tokens, strict=True))
        place, pair = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        nats = _likelier(url, headers or {}, prompt, expected.tokens[:place], *pair)
        assert abs(nats) < TIE_NATS, f"{prompt}: token {place} is another, and {nats:.3f} nats likelier"


def _likelier(url: str, headers: Mapping[str, str], prompt: str, said: tuple[int, ...], one: int, other: int) -> float:
    """Return how much likelier an engine finds one token than another behind what was said, in nats."""

    def post(path: str, **body: Any) -> Any:
        answer = ask(url, headers, path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    whole = [*post("/tokenize", prompt=prompt)["tokens"], *said]
    choice = {"max_tokens": 1, "temperature": 0, "logprobs": 5, "return_tokens_as_token_ids": True}
    (likely,) = post("/v1/completions", prompt=whole, **choice)["choices"][0]["logprobs"]["top_logprobs"]
    return likelier(likely, one, other)


def _counted(usage: Mapping[str, Any]) -> dict[str, int]:
    return {key: usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
