"""Which prompts are rendered and tokenized on the event loop, and which in vLLM's thread. vLLM's renderer is real."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm")

from vllm.renderers import renderer_from_config
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams, TokenizeParams

from deployments.seam import short_work
from deployments.seam.args import frontend_config, parse_args
from models import tiny_random

SHORT, LONG = "A word. ", "A word. " * short_work.SHORT_CHARS
TEMPLATE = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tiny_random.write(tmp_path_factory.mktemp("model"))
    with mock.patch.dict(os.environ, VLLM_TARGET_DEVICE="cpu"):
        return frontend_config(parse_args("tiny", {"model": str(model), "dtype": "float32"}, {}))


class Watched:
    """A renderer, and the threads in which it worked."""

    def __init__(self, config: Any, *, trusts_templates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.renderer = renderer_from_config(config)
        self.tokenized_in: list[threading.Thread] = []
        self.rendered_in: list[threading.Thread] = []
        for method, threads in (("__call__", self.tokenized_in), ("apply_chat_template", self.rendered_in)):
            self._watch(type(self.renderer.tokenizer), method, threads, monkeypatch)
        short_work.do_at_once(self.renderer, trusts_templates=trusts_templates)

    @staticmethod
    def _watch(tokenizer: type, method: str, threads: list[threading.Thread], monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(tokenizer, method)

        def noted(*args: Any, **options: Any) -> Any:
            threads.append(threading.current_thread())
            return original(*args, **options)

        monkeypatch.setattr(tokenizer, method, noted)

    async def ask(self, text: str, **options: Any) -> Any:
        """Render one message as vLLM's chat does; return token ids."""
        params = ChatParams(chat_template=TEMPLATE, chat_template_kwargs={"tokenize": False, **options})
        messages: Any = [{"role": "user", "content": text}]
        _, prompt = await self.renderer.render_messages_async(messages, params)
        (tokens,) = await self.renderer.tokenize_prompts_async([prompt], TokenizeParams(max_total_tokens=None))
        return tokens["prompt_token_ids"]

    @property
    def here(self) -> tuple[bool, bool]:
        """Whether the latest prompt was rendered, and tokenized, in this thread."""
        this = threading.current_thread()
        return self.rendered_in[-1] is this, self.tokenized_in[-1] is this


@pytest.fixture
def watched(config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    made = Watched(config, trusts_templates=False, monkeypatch=monkeypatch)
    assert type(made.renderer) is HfRenderer
    yield made
    made.renderer.shutdown()


@pytest.mark.asyncio
async def test_a_short_prompt_never_leaves_the_event_loops_thread(watched: Watched) -> None:
    await watched.ask(SHORT)
    assert watched.here == (True, True)


@pytest.mark.asyncio
async def test_a_long_prompt_is_worked_on_in_another_thread(watched: Watched) -> None:
    await watched.ask(LONG)
    assert watched.here == (False, False)


@pytest.mark.asyncio
async def test_tools_of_any_size_are_rendered_in_another_thread(watched: Watched) -> None:
    await watched.ask(SHORT, tools=[{"type": "function", "function": {"name": "f"}}])
    assert watched.here == (False, True)


@pytest.mark.asyncio
async def test_where_requests_bring_templates_none_runs_on_the_event_loop(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(config, trusts_templates=True, monkeypatch=monkeypatch)
    await watched.ask(SHORT)
    assert watched.here == (False, True)
    watched.renderer.shutdown()


@pytest.mark.asyncio
async def test_both_ways_come_to_the_same_tokens(watched: Watched) -> None:
    here = await watched.ask(SHORT)
    with mock.patch.object(short_work, "SHORT_CHARS", -1):
        there = await watched.ask(SHORT)
    assert watched.here == (False, False)
    assert here == there != []


@pytest.mark.asyncio
async def test_of_many_prompts_at_once_some_go_to_the_thread(watched: Watched) -> None:
    text = "A word. " * (short_work.SHORT_CHARS // 16)
    params = TokenizeParams(max_total_tokens=None)
    prompts: Any = [{"prompt": text} for _ in range(40)]
    await watched.renderer.tokenize_prompts_async(prompts, params)
    here = [thread is threading.current_thread() for thread in watched.tokenized_in]
    assert len(here) == 40
    assert 0 < sum(here) <= short_work.AT_ONCE_CHARS / len(text)
    await watched.ask(SHORT)
    assert watched.here == (True, True)


@pytest.mark.parametrize(
    ("conversation", "chars"),
    [
        ([{"role": "user", "content": "Hello"}], 21),
        ([{"role": "user", "content": [{"type": "text", "text": "Hello"}] * 2}], 42),
        ([{"role": "user", "content": [{"type": "image"}]}], None),
        ([{"role": "user", "content": None}], None),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], None),
        ([{"role": "user", "content": ""}] * 1000, 16_000),
    ],
)
def test_a_conversation_has_a_size_if_it_is_plain_text(conversation: Any, chars: int | None) -> None:
    assert short_work._chars(conversation) == chars
