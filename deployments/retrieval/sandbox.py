"""Parsing in child processes with a cap on memory and time: what a file does to its parser, it does to nobody else."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from deployments.retrieval.frames import LENGTH, MAX_FRAME_BYTES, Answer, Chunks, Done, Failed, Job, Settings, framed
from deployments.retrieval.parsing import Unreadable
from deployments.retrieval.ports import Metrics
from deployments.retrieval.records import Chunk, Chunking

logger = logging.getLogger("ray.serve.groundswell.indexer")

_JOBS_A_CHILD: Final = 200
_KEPT_ENVIRONMENT: Final = ("PATH", "HOME", "LANG", "LC_", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "GROUNDSWELL_")


class Interrupted(Exception):
    """Reading broke off, perhaps by no fault of the file: another try may succeed.

    Attributes:
        refusal: What to say of the file if none does.
    """

    def __init__(self, refusal: Unreadable) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Sandbox:
    """A bounded pool of parsing children, started as they are needed and used again until one fails.

    Args:
        workers: Files parsed at once.
        memory_bytes: Address space of each child.
        timeout_s: A child's time for one file; the time its reader takes is not counted.
        max_chars: Files with more text are refused.
        tokenizer: The `tokenizer.json` to count with; None estimates.
    """

    def __init__(
        self,
        *,
        workers: int,
        memory_bytes: int,
        timeout_s: float,
        max_chars: int,
        tokenizer: Path | None,
        metrics: Metrics,
    ) -> None:
        self._settings = Settings(memory_bytes, max_chars, os.getpid(), str(tokenizer) if tokenizer else None)
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._free = asyncio.Semaphore(workers)
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()

    async def chunks(
        self, path: Path, filename: str, chunking: Chunking, *, done: Callable[[Done], None] = lambda done: None
    ) -> AsyncGenerator[list[Chunk], None]:
        """Yield the chunks of a file, some at a time.

        Args:
            path: Where its bytes are.
            filename: As uploaded.
            chunking: How it is cut.
            done: Told after the last of them how long reading and cutting took.

        Raises:
            Unreadable: The file is at fault, or needs more memory or time than it may.
            Interrupted: The child died, or could not get at the file.
            OSError: There can be no child.
        """
        async with self._free:
            child = self._idle.pop() if self._idle else await self._start()
            clean = False
            try:
                await child.send(Job(str(path), filename, chunking.max_tokens, chunking.overlap_tokens))
                left_s = self._timeout_s
                while True:
                    asked = time.monotonic()
                    answer = await self._answer(child, left_s)
                    left_s -= time.monotonic() - asked
                    if isinstance(answer, Chunks):
                        yield answer.chunks
                        continue
                    clean = True
                    if isinstance(answer, Failed):
                        clean = not answer.last
                        refusal = Unreadable(answer.code, answer.message)
                        raise Interrupted(refusal) if answer.code == "server_error" else refusal
                    self._metrics.observe("indexer_stage_seconds", answer.parse_s, stage="parse")
                    self._metrics.observe("indexer_stage_seconds", answer.chunk_s, stage="chunk")
                    done(answer)
                    return
            finally:
                if clean and child.jobs < _JOBS_A_CHILD and child.process.returncode is None:
                    self._idle.append(child)
                else:
                    self._all.discard(child)
                    await child.end()

    async def _answer(self, child: _Child, limit_s: float) -> Answer:
        try:
            async with asyncio.timeout(max(0.0, limit_s)):
                return await child.receive()
        except TimeoutError:
            self._metrics.inc("indexer_killed_parsers", reason="time")
            raise Unreadable("invalid_file", f"The file took longer than {self._timeout_s:.0f} s to read.") from None
        except asyncio.IncompleteReadError:
            code = await child.process.wait()
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            logger.warning("A parsing child ended with %s", how)
            killed = code == -signal.SIGKILL
            self._metrics.inc("indexer_killed_parsers", reason="memory" if killed else "died")
            why = (
                "needs more memory to read than there is" if killed else f"cannot be read: its reader ended with {how}"
            )
            raise Interrupted(Unreadable("invalid_file", f"The file {why}.")) from None

    async def _start(self) -> _Child:
        kept = {k: v for k, v in os.environ.items() if k.startswith(_KEPT_ENVIRONMENT)}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "deployments.retrieval.child",
            msgspec.json.encode(self._settings).decode(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={
                **kept,
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p) or ".",
                "TOKENIZERS_PARALLELISM": "false",
                "MALLOC_ARENA_MAX": "2",
            },
        )
        child = _Child(process)
        self._all.add(child)
        return child

    async def close(self) -> None:
        """End all children."""
        for child in self._all:
            await child.end()
        self._all.clear()
        self._idle.clear()


class _Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.jobs = 0
        self._decoder = msgspec.msgpack.Decoder(Chunks | Done | Failed)

    async def send(self, job: Job) -> None:
        self.jobs += 1
        assert self.process.stdin is not None
        self.process.stdin.write(framed(job))
        with suppress(ConnectionError):  # it is dead, and reading from it will say so
            await self.process.stdin.drain()

    async def receive(self) -> Answer:
        assert self.process.stdout is not None
        size = LENGTH.unpack(await self.process.stdout.readexactly(LENGTH.size))[0]
        if size > MAX_FRAME_BYTES:
            raise asyncio.IncompleteReadError(b"", size)
        return self._decoder.decode(await self.process.stdout.readexactly(size))

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()
