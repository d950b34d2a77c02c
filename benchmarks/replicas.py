"""The processes of a running app, by its run id: replicas, and what vLLM has started from them."""

from __future__ import annotations

import contextlib

import psutil

from deployments.launch.processes import is_alive, members


def replicas(run_id: str, deployment: str, *, app: str = "groundswell") -> list[psutil.Process]:
    """Return the replicas of the deployments whose names begin like that."""
    found = []
    for process in members(run_id):
        with contextlib.suppress(psutil.Error):
            if f"ServeReplica:{app}:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def engines(run_id: str) -> list[psutil.Process]:
    """Return the Engine replicas."""
    return replicas(run_id, "Engine")


def cores(run_id: str) -> list[psutil.Process]:
    """Return the EngineCores."""
    return [core for engine in engines(run_id) for core in _spawned(engine)]


def workers(run_id: str) -> list[psutil.Process]:
    """Return the Workers."""
    return [worker for core in cores(run_id) for worker in _spawned(core)]


def routers(run_id: str) -> list[psutil.Process]:
    """Return the Router replicas."""
    return replicas(run_id, "Router")


def _spawned(process: psutil.Process) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in process.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "resource_tracker" not in " ".join(child.cmdline()) and is_alive(child):
                    found.append(child)
    return found
