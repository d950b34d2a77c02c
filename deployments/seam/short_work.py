"""Short prompts are rendered and tokenized where the request is, not in vLLM's thread for it.

On its way to that thread and back a request waits for the interpreter's lock twice, up to 5 ms each time that the event
loop is busy, and all requests wait for one thread: for a prompt of a few hundred tokens that is many times the work.
Long prompts still go there, and so does whatever runs a template that came with a request, which vLLM stops after a
while.

Source: `vllm/renderers/base.py` (`_tokenize_prompt_async`), `vllm/renderers/hf.py` (`_apply_chat_template_async`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

SHORT_CHARS: Final = 4096
"""About a thousand tokens, and a millisecond."""
AT_ONCE_CHARS: Final = 8 * SHORT_CHARS
"""For all prompts in one turn of the event loop: a request for embeddings may bring two thousand of them."""
_OF_A_PART: Final = 16


class _Budget:
    """What may be done in one turn of the event loop."""

    def __init__(self) -> None:
        self._left = AT_ONCE_CHARS

    def take(self, chars: int) -> bool:
        """Return whether a prompt of so many characters may be worked on now; if so, it counts."""
        if chars > min(SHORT_CHARS, self._left):
            return False
        if self._left == AT_ONCE_CHARS:
            asyncio.get_running_loop().call_soon(self._renew)
        self._left -= max(1, chars)
        return True

    def _renew(self) -> None:
        self._left = AT_ONCE_CHARS


def do_at_once(renderer: Any, *, trusts_templates: bool) -> None:
    """Have a renderer do short work at once.

    Args:
        renderer: vLLM's, for a model of text. One whose tokenizer is not a fast one is left as it is.
        trusts_templates: Whether requests may bring templates of their own.
    """
    if not getattr(renderer.tokenizer, "is_fast", False):
        return
    budget = _Budget()
    tokenize, tokenize_in_thread = renderer._tokenize_prompt, renderer._tokenize_prompt_async

    async def tokenize_prompt(prompt: Any, params: Any) -> Any:
        if budget.take(len(prompt["prompt"])):
            return tokenize(prompt, params)
        return await tokenize_in_thread(prompt, params)

    renderer._tokenize_prompt_async = tokenize_prompt
    if trusts_templates or not hasattr(renderer, "_apply_chat_template_async"):
        return
    from vllm.renderers.hf import HfRenderer, safe_apply_chat_template

    if type(renderer) is not HfRenderer:
        return
    apply_in_thread = renderer._apply_chat_template_async

    async def apply_chat_template(model_config: Any, tokenizer: Any, conversation: Any, **options: Any) -> Any:
        chars = None if options.get("tools") or options.get("documents") else _chars(conversation)
        if chars is not None and budget.take(chars):
            return safe_apply_chat_template(model_config, tokenizer, conversation, **options)
        return await apply_in_thread(model_config, tokenizer, conversation, **options)

    renderer._apply_chat_template_async = apply_chat_template


def _chars(conversation: Sequence[Mapping[str, Any]]) -> int | None:
    """Return about how many characters the messages have; None if they are more than plain text."""
    chars = 0
    for message in conversation:
        if any(value for key, value in message.items() if key not in ("role", "content")):
            return None
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                return None
            chars += len(text) + _OF_A_PART
    return chars
