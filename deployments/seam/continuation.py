"""How a generation goes on at another engine: from its prompt and the tokens it already has.

Pure functions of a request. Only what an engine sees is rewritten; text, stop strings, logprobs and usage are made in
the Router, whose state simply goes on. What vLLM counts over an answer's own tokens cannot go on, because an engine
would take the first part for prompt: `why_not` names it. `repetition_penalty` counts the prompt too, so it is safe, and
`reasoning_ended` is read for structured outputs alone. A `seed` does not reproduce the rest: its draws start again.

Source: `vllm/v1/core/sched/utils.py` (`check_stop`), `vllm/v1/sample/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from importlib.metadata import entry_points
from typing import Any, Final

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

_NOT_CONTINUED: Final[dict[str, Callable[[SamplingParams], object]]] = {
    "structured outputs": lambda p: p.structured_outputs,
    "a presence penalty": lambda p: p.presence_penalty,
    "a frequency penalty": lambda p: p.frequency_penalty,
    "bad_words": lambda p: p.bad_words,
    "repetition detection": lambda p: p.repetition_detection,
    "a thinking budget": lambda p: p.thinking_token_budget is not None,
    "a watermark": lambda p: p.watermarking,
    "a replayed trace": lambda p: p.trace_decode_token_ids,
}


def why_no_request(vllm_config: Any) -> str | None:
    """Return what about these engines keeps every generation from going on elsewhere, if anything does."""
    model = vllm_config.model_config
    if model.logits_processors or entry_points(group=LOGITSPROCS_GROUP):
        return "custom logits processors"
    if model.is_diffusion:
        return "a diffusion model"
    if vllm_config.aux_output_config.enable_return_routed_experts:  # another engine returns the first part's again
        return "routed experts returned"
    return None


def why_not(requests: Sequence[EngineCoreRequest]) -> str | None:
    """Return what keeps a request with these sequences from going on once tokens of it are out, if anything does."""
    params = requests[0].sampling_params
    if params is None:
        return "pooling"
    if len(requests) > 1:
        return "several choices"
    if requests[0].prompt_token_ids is None or requests[0].prompt_embeds is not None:
        return "prompt embeddings"
    return next((reason for reason, holds in _NOT_CONTINUED.items() if holds(params)), None)


def reproducible(request: EngineCoreRequest) -> bool:
    """Whether a second run from the start would say the same, and the rest of the first one perhaps not."""
    params = request.sampling_params
    return params is not None and params.seed is not None and params.temperature > 0


def end_of(request: EngineCoreRequest, tokens: Sequence[int], max_model_len: int) -> EngineCoreOutput | None:
    """Return the end that an engine did not come to say, if nothing may follow `tokens`; None if the rest is missing.

    vLLM's scheduler says an end in the output that brings the last token, so that this should not happen. Where it
    does, another engine that is asked for the rest would add a token.
    """
    params = request.sampling_params
    assert params is not None and request.prompt_token_ids is not None
    if tokens and tokens[-1] == params.eos_token_id:
        return EngineCoreOutput("0", [], finish_reason=FinishReason.STOP)
    if tokens and tokens[-1] in (params.stop_token_ids or ()):
        return EngineCoreOutput("0", [], finish_reason=FinishReason.STOP, stop_reason=tokens[-1])
    longest = max_model_len - len(request.prompt_token_ids)
    if len(tokens) >= min(longest, longest if params.max_tokens is None else params.max_tokens):
        return EngineCoreOutput("0", [], finish_reason=FinishReason.LENGTH)
    return None


def rest_of(request: EngineCoreRequest, tokens: Sequence[int]) -> EngineCoreRequest:
    """Return the request for what comes after `tokens`: prompt and budget moved on, prompt logprobs not asked again."""
    assert request.sampling_params is not None and request.prompt_token_ids is not None
    params = copy(request.sampling_params)
    if params.max_tokens is not None:
        params.max_tokens -= len(tokens)
    params.min_tokens = max(0, params.min_tokens - len(tokens))
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        params.prompt_logprobs = params.prompt_logprob_token_ids = params.prompt_logprob_start = None
        params.skip_reading_prefix_cache = False  # vLLM's default, which they alone had changed
    rest = copy(request)
    rest.prompt_token_ids = [*request.prompt_token_ids, *tokens]
    rest.sampling_params = params
    return rest
