"""What the Router writes on a request because of who asks: its turn, and whose KV cache it may reuse."""

from __future__ import annotations

import hashlib
import json

from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreRequest

from deployments import request_scope
from deployments.access.fair_share import FairShare, Turn, bounded


class Stamps:
    """For one model in one Router.

    Args:
        fair_share: Where engines schedule by priority.
        isolate_prefix_cache: Whether prompts of one key reuse no KV cache of another's.
    """

    def __init__(self, fair_share: FairShare | None = None, *, isolate_prefix_cache: bool = False) -> None:
        self._fair_share, self._isolate = fair_share, isolate_prefix_cache

    def put(self, request: EngineCoreRequest) -> Turn | None:
        """Stamp a request. Where there are no keys, it stays as its client wrote it."""
        caller = request_scope.caller()
        if caller is None:
            return None
        if self._isolate:
            request.cache_salt = salt(caller.name, request.cache_salt)
        level = bounded(request.priority) if caller.may_set_priority else 0
        if self._fair_share is None:
            request.priority = level
            return None
        prompt_tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        params = request.sampling_params
        most, sequences = (0, 1) if params is None else (params.max_tokens, params.n)
        turn = self._fair_share.join(caller.name, prompt_tokens, most, sequences, level=level)
        request.priority = turn.priority
        return turn


def salt(name: str, given: str | None) -> str:
    """Return a key's own salt, with the client's mixed in: no client can write another key's."""
    return hashlib.sha256(json.dumps([name, given]).encode()).hexdigest()
