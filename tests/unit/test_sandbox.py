"""Parsing in children: what a file does to one of them, the next file does not notice."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from deployments.metrics import NoMetrics
from deployments.retrieval.parsing import Unreadable
from deployments.retrieval.records import Chunk, Chunking
from deployments.retrieval.sandbox import Interrupted, Sandbox
from tests.unit.recording import Leaps

pytestmark = pytest.mark.asyncio


def make(memory_bytes: int = 2**30, timeout_s: float = 30, max_chars: int = 10**6) -> Sandbox:
    return Sandbox(
        workers=1,
        memory_bytes=memory_bytes,
        timeout_s=timeout_s,
        max_chars=max_chars,
        tokenizer=None,
        metrics=NoMetrics(),
    )


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    made = make()
    yield made
    await made.close()


async def collect(sandbox: Sandbox, path: Path, text: bytes | str, name: str = "a.txt") -> list[Chunk]:
    file = path / "upload"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return [c async for batch in sandbox.chunks(file, name, Chunking(100, 0)) for c in batch]


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "deployments.retrieval.child" in " ".join(p.cmdline())]


async def test_chunks_come_through_and_the_child_is_used_again(sandbox: Sandbox, tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {i} has a few words." for i in range(2000))
    found = await collect(sandbox, tmp_path, text)
    assert len(found) > 100
    assert all(text[c.start : c.end] == c.text for c in found)
    (child,) = children()
    await collect(sandbox, tmp_path, "again")
    assert children() == [child]


async def test_a_refusal_costs_no_child(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="empty"):
        await collect(sandbox, tmp_path, "")
    assert len(children()) == 1
    assert [c.text for c in await collect(sandbox, tmp_path, "fine")] == ["fine"]


async def test_too_much_memory_fails_the_file_alone(tmp_path: Path) -> None:
    sandbox = make(memory_bytes=200 * 2**20, max_chars=10**9)
    with pytest.raises(Unreadable, match=r"memory|large") as refused:
        await collect(sandbox, tmp_path, "<p>x" * 10**6, "many.html")
    assert refused.value.code == "invalid_file"
    assert [c.text for c in await collect(sandbox, tmp_path, "fine")] == ["fine"]
    await sandbox.close()


async def test_what_breaks_a_parser_is_the_files_fault_and_said_by_its_kind(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"cannot be read \(ValueError\)") as refused:
        await collect(sandbox, tmp_path, '<table><tr><td colspan="²">x</td></tr></table>', "a.html")
    assert refused.value.code == "invalid_file"
    assert [c.text for c in await collect(sandbox, tmp_path, "fine")] == ["fine"]


async def test_a_file_that_cannot_be_got_at_is_worth_another_try(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as interrupted:
        await anext(sandbox.chunks(tmp_path / "away", "a.txt", Chunking(100, 0)))
    assert interrupted.value.refusal.code == "server_error"
    assert [c.text for c in await collect(sandbox, tmp_path, "fine")] == ["fine"]


@pytest.mark.parametrize(("sent", "said"), [(signal.SIGKILL, "memory"), (signal.SIGSEGV, "SIGSEGV")])
async def test_a_child_that_dies_is_worth_another_try_and_only_a_kill_speaks_of_memory(
    sandbox: Sandbox, tmp_path: Path, sent: signal.Signals, said: str
) -> None:
    await collect(sandbox, tmp_path, "fine")
    (child,) = children()
    child.send_signal(sent)
    with pytest.raises(Interrupted, match=said) as interrupted:
        await sandbox._answer(sandbox._idle[0], 30)
    assert interrupted.value.refusal.code == "invalid_file"


async def test_too_much_time_fails_the_file_alone(tmp_path: Path) -> None:
    sandbox = make(timeout_s=1.0, max_chars=10**9)
    with pytest.raises(Unreadable, match="longer than 1 s"):
        await collect(sandbox, tmp_path, "a. b! c? " * 10**7)
    sandbox._timeout_s = 30
    assert [c.text for c in await collect(sandbox, tmp_path, "fine")] == ["fine"]
    await sandbox.close()


async def test_a_reader_that_stops_early_leaves_no_child_busy(sandbox: Sandbox, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("Some words in a line.\n" * 30_000)
    stream = sandbox.chunks(file, "a.txt", Chunking(100, 50))
    await anext(stream)
    await stream.aclose()
    assert [c.text for c in await collect(sandbox, tmp_path, "fine")] == ["fine"]


async def test_a_slow_reader_does_not_count_as_a_slow_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox, leaps = make(timeout_s=60), Leaps(monkeypatch)
    file = tmp_path / "long.txt"
    file.write_text("Some words in a line.\n" * 30_000)
    n = 0
    async for batch in sandbox.chunks(file, "a.txt", Chunking(100, 50)):
        n += len(batch)
        if n < 200:
            await leaps.over(50)  # twice: longer than the limit, and no part of it
    assert n > 1000
    await sandbox.close()


async def test_children_see_no_secrets_of_their_parent(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    await collect(sandbox, tmp_path, "text")
    (child,) = children()
    assert "hush" not in child.environ().values()
