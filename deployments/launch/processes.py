"""Which processes belong to a run, and how they end. Knows no Ray.

A run is known by an id in the environment of all its processes, which every child inherits, through `setsid`, `exec`
and the death of its parents. Only processes that carry the id are ever signalled.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import psutil

from deployments.launch.environment import RUN_ID

POLL_S: Final = 0.05
PR_SET_PDEATHSIG: Final = 1
FOLDER_PREFIX: Final = "groundswell-"


@dataclass(frozen=True)
class Run:
    """One start, as written down for the next one.

    Attributes:
        run_id: Marks its processes.
        pid: Of the command line that owns it.
        started: When that process was created, as the kernel has it: a pid alone may be somebody else's by now.
        folder: Its token, sockets and logs.
    """

    run_id: str
    pid: int
    started: float
    folder: str

    @property
    def is_alive(self) -> bool:
        """Whether the command line that owns it still runs."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False


def new_run(run_id: str) -> Run:
    """Return a run of this process, with a folder of its own.

    The folder lies in /tmp whatever TMPDIR says: HAProxy's sockets, which Serve puts into a folder named by 56
    characters, may have paths of 97 characters, and Ray's of 107.
    """
    folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp")
    return Run(run_id, os.getpid(), psutil.Process().create_time(), folder)


def members(run_id: str) -> list[psutil.Process]:
    """Return the living processes of a run, without the caller.

    Not by `psutil.process_iter`, which remembers processes and leaves out, twice, one that has the pid of another it
    has seen before: pids come round soon where there are 32,768 of them, and each thread takes one.
    """
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if pid != os.getpid() and _is_member(process, run_id):
                found.append(process)
    return found


def stop(
    run_id: str, *, grace_s: float = 2.0, limit_s: float = 10.0, hurry: Callable[[], bool] = lambda: False
) -> bool:
    """End all processes of a run.

    Args:
        run_id: Of the run.
        grace_s: Time between asking and killing.
        limit_s: Time after which to give up, in which case something cannot be killed.
        hurry: Cuts the grace short once it returns true.

    Returns:
        Whether none is left.
    """
    begin = time.monotonic()
    asked: set[psutil.Process] = set()
    # A process that is dying has lost its environment already, but not yet its ports: hence also those we have asked.
    while processes := {*members(run_id), *filter(is_alive, asked)}:
        waited_s = time.monotonic() - begin
        if waited_s > limit_s:
            return False
        kill = waited_s > grace_s or hurry()
        for process in processes if kill else processes - asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        asked |= processes
        time.sleep(POLL_S)
    return True


def die_with_parent() -> None:
    """Make the kernel kill this process when the thread that started it ends. Runs between fork and exec."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Registry:
    """The runs of this user on this machine, one file each, so that a start can clean up after one that was killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def holding(self, run: Run) -> Iterator[None]:
        """Keep `run` written down for the duration of the block."""
        path = self._folder / f"{run.run_id}.json"
        path.write_text(json.dumps(asdict(run)))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def clean_up(self) -> int:
        """End what runs without an owner have left behind, and return how many such runs there were."""
        dead = 0
        for path in self._folder.glob("*.json"):
            run = _read(path)
            if run is not None and run.is_alive:
                continue
            if run is not None:
                stop(run.run_id)
                remove_folder(run)
                dead += 1
            path.unlink(missing_ok=True)
        return dead


def remove_folder(run: Run) -> None:
    """Delete a run's folder, if it is one that `new_run` made."""
    folder = Path(run.folder)
    if folder.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def state_folder() -> Path:
    """Return where runs are written down."""
    home = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(home) / "groundswell" / "runs"


def _is_member(process: psutil.Process, run_id: str) -> bool:
    try:
        return process.environ().get(RUN_ID) == run_id and is_alive(process)
    except (psutil.Error, OSError):  # gone, or somebody else's
        return False


def is_alive(process: psutil.Process) -> bool:
    """Return whether it runs: a zombie has let go of everything, and waits for whoever adopted it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read(path: Path) -> Run | None:
    try:
        return Run(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
