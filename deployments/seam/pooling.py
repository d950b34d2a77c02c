"""Texts into vectors and scores, for callers inside the app: vLLM's pooling, without its HTTP models.

Source: `vllm/entrypoints/pooling/{base,scoring}/io_processor.py`, `vllm/v1/engine/async_llm.py` (`encode`).
"""

from __future__ import annotations

import asyncio
import itertools
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from vllm import PoolingParams
from vllm.exceptions import VLLMClientError

from deployments.errors import BadRequest
from deployments.seam.token_engine import TokenEngine

if TYPE_CHECKING:
    import torch
    from vllm.v1.engine import EngineCoreOutput


class Pooling:
    """What a pooling engine makes of texts. Those longer than the model reads are cut off at its length.

    Args:
        engine: The engine; what is given to it at once, it batches.
        args: The model's parsed arguments.
    """

    def __init__(self, engine: TokenEngine, args: Namespace) -> None:
        self._engine, self._args = engine, args
        self._ids = itertools.count()
        self._cross_encoder: Any = None

    async def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return one vector a row, as the model's pooler makes them (most are of length 1).

        Raises:
            BadRequest: vLLM refuses a text, or the model does not embed.
        """
        await self._require("embed", "make embeddings")
        prompts = [(text, PoolingParams(task="embed")) for text in texts]
        return np.stack([pooled.float().numpy() for pooled in await self._pool(prompts)])

    async def score(self, query: str, texts: Sequence[str]) -> list[float]:
        """Return how well each text answers the query, between 0 and 1: by a cross-encoder, which reads both at once.

        Raises:
            BadRequest: vLLM refuses a text, or the model is no cross-encoder.
        """
        await self._require("classify", "score texts")
        processor = self._processor()
        rendered = await asyncio.gather(*(self._render_pair(processor, query, text) for text in texts))
        pooled = await self._pool([(pair["prompts"], pair["params"]) for pair in rendered])
        return [float(scores.reshape(-1)[0]) for scores in pooled]

    async def _require(self, task: str, what: str) -> None:
        if task not in await self._engine.supported_tasks():
            raise BadRequest(f"The model {self._args.served_model_name[0]!r} does not {what}.")

    def _processor(self) -> Any:
        if self._cross_encoder is None:
            from vllm.entrypoints.pooling.scoring.io_processor import CrossEncoderIOProcessor
            from vllm.renderers.chat_utils import ChatTemplateConfig

            chat = ChatTemplateConfig(chat_template=self._args.chat_template)
            self._cross_encoder = CrossEncoderIOProcessor(self._engine.vllm_config, self._engine.renderer, chat)
        return self._cross_encoder

    async def _render_pair(self, processor: Any, query: str, text: str) -> Any:
        return await processor.render_async(
            {
                "data_1": query,
                "data_2": text,
                "chat_template": processor.chat_template,
                "max_tokens_per_query": 0,
                "max_tokens_per_doc": 0,
                "tok_params": self._engine.renderer.default_cmpl_tok_params.with_kwargs(truncate_prompt_tokens=-1),
                "prompt_extras": None,
                "skip_mm_cache": False,
                "params": PoolingParams(task="classify"),
                "lora_requests": None,
                "priorities": 0,
            }
        )

    async def _pool(self, prompts: Sequence[tuple[Any, PoolingParams]]) -> list[torch.Tensor]:
        requests = []
        try:
            for prompt, params in prompts:
                requests.append(await self._engine.pooling_request(f"pool-{next(self._ids)}", prompt, params))
        except (VLLMClientError, ValueError) as error:
            raise BadRequest(str(error)) from error
        sinks = [_Pooled() for _ in requests]
        try:
            for request, sink in zip(requests, sinks, strict=True):
                await self._engine.add(request, sink)
            return [await sink.pooled for sink in sinks]
        finally:
            await self._engine.abort(
                [r.request_id for r, s in zip(requests, sinks, strict=True) if not s.pooled.done()]
            )


class _Pooled:
    """Waits for one request's output. Satisfies `token_engine.Sink`."""

    def __init__(self) -> None:
        self.pooled: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()

    def put(self, output: Any) -> None:
        if not self.pooled.done():
            error = output if isinstance(output, Exception) else RuntimeError("the request was aborted")
            self.pooled.set_exception(error)

    def deliver(self, output: EngineCoreOutput, weight_version: str | None) -> None:
        if output.pooling_output is not None and not self.pooled.done():
            self.pooled.set_result(output.pooling_output)
