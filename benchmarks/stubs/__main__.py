"""The programs that `benchmarks.data_path` starts.

python -m benchmarks.stubs router MODEL PORT   the real Router under uvicorn, before the engine below
python -m benchmarks.stubs channel MODEL …     a real Fleet before it; measures, and prints one JSON line
python -m benchmarks.stubs engine MODEL PATH   the real Engine around a stub core, at a Unix socket
python -m benchmarks.stubs bare FLAG …         vLLM's own server around the same stub core
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.servers import MODEL_NAME
from benchmarks.stubs.local import LocalCalls, router_outside_serve, serve_engine
from deployments.config import MAX_NUM_SEQS, FleetConfig, ModelConfig
from deployments.launch.processes import die_with_parent


def model_config(folder: str) -> ModelConfig:
    """Return the one model that all of these serve."""
    engine_args = {"model": folder, "dtype": "float32", "max_model_len": 2048, "max_num_seqs": MAX_NUM_SEQS}
    return ModelConfig(name=MODEL_NAME, engine_args=engine_args)


async def router(path: Path, model: ModelConfig, port: int) -> None:
    """Serve the Router's app as Serve does, over the engine at `path`."""
    import uvicorn

    def calls(handle: object, on_replicas: Any, *, join_timeout_s: float) -> LocalCalls:
        return LocalCalls(path, on_replicas, join_timeout_s=join_timeout_s)

    _, app = await router_outside_serve(model, calls)
    gc.collect()
    gc.freeze()  # as Serve does in `make serve`
    config = uvicorn.Config(app, port=port, log_level="warning", access_log=False, lifespan="off", loop="none")
    await uvicorn.Server(config).serve()


async def channel(path: Path, model: ModelConfig, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Run `rounds` times `streams` requests of `tokens` each through a Fleet; return what that took."""
    import random

    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from deployments.fleet.client import Exchange, Fleet
    from deployments.fleet.placement import Ledger
    from deployments.metrics import NoMetrics
    from deployments.seam.wire import Codec

    codec, calls = Codec(), LocalCalls(path)
    exchange = Exchange(FleetConfig(), "127.0.0.1", codec.decode_deltas, metrics=NoMetrics())
    fleet = Fleet(
        model.name,
        calls.open,
        exchange,
        Ledger(rng=random.Random()),
        FleetConfig(),
        max_queued=512,
        metrics=NoMetrics(),
    )
    fleet.set_replicas(frozenset({"stub"}))
    for description in await calls.join(exchange.channel.address):
        fleet.joined(description)

    class StubSubmission:
        """Counts what arrives where vLLM would make text of it."""

        sequences, order, prompt_tokens, progress = 1, (0, 0.0), 16, 0

        def __init__(self, name: str) -> None:
            self.request_id = name
            self.deltas = 0

        @property
        def finished(self) -> bool:
            return self.deltas == tokens

        def encode(self) -> list[bytes]:
            params = SamplingParams(max_tokens=tokens, ignore_eos=True)
            return codec.encode_requests(
                [
                    EngineCoreRequest(
                        request_id=self.request_id,
                        prompt_token_ids=[1000] * 16,
                        mm_features=None,
                        sampling_params=params,
                        pooling_params=None,
                        arrival_time=time.time(),
                        lora_request=None,
                        cache_salt=None,
                        data_parallel_rank=None,
                    )
                ]
            )

        def deliver(self, output: Any, weight_version: str | None) -> list[int]:
            self.deltas += 1
            return []

        def recover(self) -> str:
            raise AssertionError("the stub engine failed")

        def fail(self, error: Exception) -> None:
            raise error

    async def client(index: int, repeats: int) -> None:
        for i in range(repeats):
            await fleet.start(StubSubmission(f"{index}-{i}"), fleet.admit(1)).task  # type: ignore[arg-type]

    await asyncio.gather(*(client(i, 2) for i in range(streams)))  # warms both ends
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client(i, rounds) for i in range(streams)))
    return {
        "deltas": streams * rounds * tokens,
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
    }


@contextmanager
def engine(folder: str) -> Iterator[Path]:
    """Run the engine's process while the block does; yield its socket, which is there once it is ready."""
    with tempfile.TemporaryDirectory(prefix="groundswell-stub-") as place:
        path = Path(place) / "engine"
        command = [sys.executable, "-m", "benchmarks.stubs", "engine", folder, str(path)]
        process = subprocess.Popen(command, preexec_fn=die_with_parent, stdout=sys.stderr)
        try:
            yield path
        finally:
            process.kill()
            process.wait()


def main(arguments: list[str]) -> None:
    """Run the program that the command line names."""
    what, *rest = arguments
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    if what == "bare":
        from benchmarks.stubs.core import install

        install()
        sys.argv = ["api_server", *rest, "--disable-uvicorn-access-log"]  # the Router above has none either
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
        return
    folder, *rest = rest
    model = model_config(folder)
    if what == "engine":
        uvloop.run(serve_engine(Path(rest[0]), model))
        return
    with engine(folder) as path:
        if what == "router":
            uvloop.run(router(path, model, int(rest[0])))
        elif what == "channel":
            print(json.dumps(uvloop.run(channel(path, model, *map(int, rest)))), flush=True)
        else:
            raise SystemExit(f"no such stub: {what}")


if __name__ == "__main__":
    main(sys.argv[1:])
