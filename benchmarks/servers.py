"""The servers that are compared: how each is started, asked whether it is ready, and ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deployments.config import MAX_NUM_SEQS
from deployments.outline import has_cuda_build

ROOT = Path(__file__).parents[1]
MODEL_NAME = "tiny"
START_LIMIT_S = 600.0
STOP_LIMIT_S = 20.0
_PR_SET_PDEATHSIG = 1


class ServerError(Exception):
    """A server did not start."""


@dataclass(frozen=True)
class EngineSettings:
    """What all servers' engines have in common.

    Attributes:
        engine_args: vLLM's, by name.
        environment: Of the engine's process.
    """

    engine_args: Mapping[str, Any]
    environment: Mapping[str, str]


def settings(model: Path, *, gpu: bool, max_model_len: int = 2048) -> EngineSettings:
    """Return settings with which two engines can stand beside each other on this machine.

    Args:
        model: The model's folder.
        gpu: Whether engines run on a GPU.
        max_model_len: Tokens of a prompt and its answer.
    """
    # Left to each, the batch would be 256 in ours, and in vLLM's own server what it finds fit for the device.
    sizes = {"max_model_len": max_model_len, "max_num_seqs": MAX_NUM_SEQS}
    shared = {"model": str(model), "served_model_name": MODEL_NAME, **sizes}
    if gpu:
        return EngineSettings({**shared, "gpu_memory_utilization": 0.4}, {})
    return EngineSettings(
        {**shared, "dtype": "float32", "enforce_eager": True},
        {
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "OMP_WAIT_POLICY": "PASSIVE",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
    )


class Server(ABC):
    """A server in a process of its own, with a log in `folder`.

    Args:
        settings: Of its engine.
        folder: For its log, and its configuration if it needs one.
    """

    name: str

    def __init__(self, settings: EngineSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.url = ""
        self.startup_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self, port: int) -> list[str]:
        """Return what to run."""

    def environment(self) -> dict[str, str]:
        """Return what it needs in its environment beside what its engine does."""
        return {}

    def is_ready(self) -> bool:
        """Return whether requests would be answered now."""
        return is_ready(self.url)

    def processes(self) -> list[psutil.Process]:
        """Return all of its living processes."""
        if self._process is None:
            return []
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def start(self) -> None:
        """Start it, unless it runs, and return once it is ready.

        Raises:
            ServerError: It ended, or was not ready in time; with the last lines of its log.
        """
        if self._process is not None:
            return
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        log = self.folder / f"{self.name}.log"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        # This tree, whatever is installed.
        environment = {**os.environ, **self.settings.environment, **self.environment(), "PYTHONPATH": path}
        begin = time.monotonic()
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                self.command(port),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours alone
                preexec_fn=_end_with_parent,
            )
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() - begin > START_LIMIT_S:
                self.stop()
                raise ServerError(f"{self.name} did not start:\n{_tail(log)}")
            time.sleep(0.25)
        self.startup_s = time.monotonic() - begin

    def stop(self) -> None:
        """End it and everything it started."""
        if self._process is None:
            return
        family = self.processes()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process = None


class Groundswell(Server):
    """`groundswell serve` with one Router, and one engine replica unless more are asked for.

    Args:
        settings: Of its engine.
        folder: For its log and configuration.
        further_models: Models beside the first, which start no engine unless they are asked.
        engines: Replicas of the first, at most if it scales; on a GPU they share it.
        fleet: Bounds and timeouts other than the defaults.
        router: More of the Router's configuration.
        autoscaling: Has the first model scale, with these of Serve's options.
        scaling: The first model's `scaling`.
    """

    name = "groundswell"

    def __init__(
        self,
        settings: EngineSettings,
        folder: Path,
        *,
        further_models: int = 0,
        engines: int = 1,
        fleet: Mapping[str, float] | None = None,
        router: Mapping[str, Any] | None = None,
        autoscaling: Mapping[str, Any] | None = None,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(settings, folder)
        self._further_models, self._engines = further_models, engines
        self._autoscaling, self._scaling = autoscaling, scaling
        self._router = {"fleet": dict(fleet or {}), **(router or {})}

    def config(self, port: int) -> dict[str, Any]:
        """Return the Serve config."""
        model = {
            "name": MODEL_NAME,
            "engine_args": dict(self.settings.engine_args),
            "env": dict(self.settings.environment),
            "deployment": {**self._how_many(), **self._share_of_gpu()},
            "scaling": self._scaling,
        }
        asleep = {"scaling": None, "deployment": {"autoscaling_config": {"min_replicas": 0, "max_replicas": 1}}}
        others = [
            {**model, **asleep, "name": name, "engine_args": {**self.settings.engine_args, "served_model_name": name}}
            for name in (f"{MODEL_NAME}-{i}" for i in range(self._further_models))
        ]
        app = {
            "name": "groundswell",
            "route_prefix": "/",
            "import_path": "deployments.app:build",
            "args": {"models": [model, *others], "router": {"deployment": {"num_replicas": 1}, **self._router}},
        }
        return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}

    def command(self, port: int) -> list[str]:
        path = self.folder / f"{self.name}.yaml"
        path.write_text(json.dumps(self.config(port), indent=2))  # JSON is YAML
        return [sys.executable, "-m", "deployments.cli", "serve", str(path), "--port", str(port)]

    @property
    def log(self) -> Path:
        """Return the file with what it prints: among it, the replicas that run and should, whenever that changes."""
        return self.folder / f"{self.name}.log"

    def _how_many(self) -> dict[str, Any]:
        if self._autoscaling is None:
            return {"num_replicas": self._engines}
        return {"autoscaling_config": {"max_replicas": self._engines, **self._autoscaling}}

    def _share_of_gpu(self) -> dict[str, Any]:
        if self._engines == 1 or not has_cuda_build():
            return {}
        return {"ray_actor_options": {"num_gpus": 1 / self._engines}}


class BareVllm(Server):
    """vLLM's own OpenAI server: one API process, one engine."""

    name = "bare vLLM"

    def command(self, port: int) -> list[str]:
        flags = []
        for key, value in self.settings.engine_args.items():
            name = key.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{name}" if value else f"--no-{name}")
            elif value is not None:
                flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict | list) else value}")
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), *flags]


def while_served(
    program: str,
    server: Server,
    work: Callable[[], None],
    report: Callable[[], None],
    failures: tuple[type[Exception], ...] = (ServerError,),
) -> int:
    """Start a server, do work with it, and stop it. Report before that, whatever ends the work: stopping takes time.

    Args:
        program: Named before what went wrong.
        server: Stopped even if it did not start, or the report fails.
        work: Called when it is ready.
        report: Prints what has been seen until then, which may be nothing.
        failures: What ends the work with a sentence, in place of a traceback.

    Returns:
        The exit code: 0 after all of the work, 1 after a failure, 130 after Ctrl-C.
    """
    try:
        server.start()
        work()
    except failures as problem:
        print(f"{program}: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        return 130
    finally:
        try:
            report()
        finally:
            server.stop()
    return 0


def is_ready(url: str) -> bool:
    """Return whether `/health` answers 200."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def make_model() -> Path:
    """Write the model that the benchmarks use, unless it is there; return its folder."""
    path = ROOT / "models" / "tiny-random"
    script = ROOT / "models" / "tiny_random.py"
    subprocess.run([sys.executable, str(script), str(path)], check=True, stdout=subprocess.DEVNULL)
    return path


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
