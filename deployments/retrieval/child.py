"""The process in which files are parsed and cut: `python -m deployments.retrieval.child SETTINGS`.

It holds itself to a memory limit; its parent holds it to a time limit, and kills it. It dies with its parent.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from deployments.retrieval.chunking import chunks
from deployments.retrieval.frames import LENGTH, Chunks, Done, Failed, Job, Settings, framed
from deployments.retrieval.parsing import Unreadable, text_of
from deployments.retrieval.records import Chunk, Chunking
from deployments.retrieval.tokens import CountTokens, counter

_CHUNKS_A_FRAME: Final = 64
_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Answer jobs from stdin on stdout until stdin ends."""
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings.parent:
        return
    resource.setrlimit(resource.RLIMIT_AS, (settings.memory_bytes, settings.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.WARNING)  # pypdf has a word on every oddity
    count = counter(Path(settings.tokenizer) if settings.tokenizer else None)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the frames
    decoder = msgspec.msgpack.Decoder(Job)
    while (head := sys.stdin.buffer.read(LENGTH.size)) and len(head) == LENGTH.size:
        job = decoder.decode(sys.stdin.buffer.read(LENGTH.unpack(head)[0]))
        try:
            _work(job, settings, count, out)
        except Unreadable as error:
            _send(out, Failed(error.code, error.message))
        except (MemoryError, RecursionError) as error:
            what = "nested too deeply" if isinstance(error, RecursionError) else "too large when unpacked"
            _send(out, Failed("invalid_file", f"The file is {what} to be read.", last=True))
            return
        except OSError as error:  # of this machine or its storage: parsers turn those of the file into Unreadable
            _send(out, Failed("server_error", f"The file could not be read ({type(error).__name__}).", last=True))
            return
        except Exception as error:  # whatever a file makes of its parser
            _send(out, Failed("invalid_file", f"The file cannot be read ({type(error).__name__}).", last=True))
            return


def _work(job: Job, settings: Settings, count: CountTokens, out: BinaryIO) -> None:
    started = time.monotonic()
    text = text_of(Path(job.path), job.filename, max_chars=settings.max_chars)
    parsed = time.monotonic()
    batch: list[Chunk] = []
    for chunk in chunks(text, Chunking(job.max_tokens, job.overlap_tokens), count):
        batch.append(chunk)
        if len(batch) >= _CHUNKS_A_FRAME:
            _send(out, Chunks(batch))
            batch = []
    if batch:
        _send(out, Chunks(batch))
    _send(out, Done(parsed - started, time.monotonic() - parsed))


def _send(out: BinaryIO, message: msgspec.Struct) -> None:
    out.write(framed(message))
    out.flush()


if __name__ == "__main__":
    main()
