"""Short prompts are rendered and tokenized where the request is, not in vLLM's thread for it.

On its way to that thread and back a request waits for the interpreter's lock twice, up to 5 ms each time that the event
loop is busy, and all requests wait for one thread: for a prompt of a few hundred tokens that is many times the work.
Long prompts still go there, and so does whatever runs a template that came with a request, which vLLM stops after a
while.

Source: `vllm/renderers/base.py` (`_tokenize_prompt_async`), `vllm/renderers/hf.py` (`_apply_chat_template_async`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

SHORT_CHARS: Final = 4096
"""About a thousand tokens, and a millisecond."""
_OF_A_PART: Final = 16


def do_at_once(renderer: Any, *, trusts_templates: bool) -> None:
    """Have a renderer do short work at once.

    Args:
        renderer: vLLM's, for a model of text. One whose tokenizer is not a fast one is left as it is.
        trusts_templates: Whether requests may bring templates of their own.
    """
    if not getattr(renderer.tokenizer, "is_fast", False):
        return
    tokenize, tokenize_in_thread = renderer._tokenize_prompt, renderer._tokenize_prompt_async

    async def tokenize_prompt(prompt: Any, params: Any) -> Any:
        if len(prompt["prompt"]) <= SHORT_CHARS:
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
        if _is_short(conversation) and not options.get("tools") and not options.get("documents"):
            return safe_apply_chat_template(model_config, tokenizer, conversation, **options)
        return await apply_in_thread(model_config, tokenizer, conversation, **options)

    renderer._apply_chat_template_async = apply_chat_template


def _is_short(conversation: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the messages are plain text, and few."""
    left = SHORT_CHARS
    for message in conversation:
        if message.get("tool_calls"):
            return False
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                return False
            left -= len(text) + _OF_A_PART
        if left < 0:
            return False
    return True
