"""A running `groundswell serve`, as the end-to-end tests use it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from deployments.launch.environment import RUN_ID
from deployments.launch.processes import PR_SET_PDEATHSIG, Registry, members

ROOT = Path(__file__).parents[2]
CONFIG = Path(os.environ.get("GROUNDSWELL_TEST_CONFIG", ROOT / "serve_config.yaml"))
START_LIMIT_S = 300
STOP_LIMIT_S = 30
"""Three seconds are usual."""


@dataclass
class Served:
    """A running `groundswell serve`.

    Attributes:
        process: The command line.
        port: Its HTTP port.
        lines: What it has printed so far.
        run_id: Marks its processes.
        ready: Set once it has said that it is ready, or has ended.
    """

    process: subprocess.Popen[str]
    port: int
    lines: list[str] = field(default_factory=list)
    run_id: str = ""
    ready: threading.Event = field(default_factory=threading.Event)

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def members(self) -> list[psutil.Process]:
        return members(self.run_id)

    def read(self) -> None:
        """Collect what is printed until the end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("Ctrl-C"):
                self.ready.set()
        self.ready.set()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "deployments.cli", "serve", *arguments]


def offline_environment(state: Path) -> dict[str, str]:
    without = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", RUN_ID)}
    return {**without, "HF_HUB_OFFLINE": "1", "XDG_STATE_HOME": str(state)}


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextmanager
def serving(config: Path, state: Path) -> Iterator[Served]:
    """Serve `config` on a free port until the block is left."""
    port = free_port()
    process = subprocess.Popen(
        command(str(config), "--port", str(port)),
        cwd=ROOT,
        env=offline_environment(state),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_end_with_parent,
    )
    served = Served(process, port)
    threading.Thread(target=served.read, daemon=True).start()
    try:
        assert served.ready.wait(START_LIMIT_S), f"not ready in {START_LIMIT_S} s:\n{served.output}"
        assert "is ready" in served.output, served.output
        driver = psutil.Process(process.pid).children()[0]
        served.run_id = driver.environ()[RUN_ID]
        yield served
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_LIMIT_S)
        finally:
            process.kill()
            process.wait()
            # It has ended its run, unless it was killed. The next start would, and it looks at another state's runs.
            Registry(state / "groundswell" / "runs").clean_up()


def _end_with_parent() -> None:
    """Have the kernel ask it to stop when these tests end without doing so. Runs between fork and exec."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_for(condition: Callable[[], object], what: str, limit_s: float = 90) -> None:
    """Return once the condition holds; `what` is said if it does not in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.2)
