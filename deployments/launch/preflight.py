"""Why a start cannot work, found before anything starts. Knows no Ray; facts about the machine are arguments.

Every check raises `CannotStart` with one sentence that says what is wrong and what to do about it.
"""

from __future__ import annotations

import ctypes
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deployments.access.keys import VARIABLE, key_ring
from deployments.config import AppConfig
from deployments.errors import ConfigError
from deployments.fleet.channel import is_loopback

OUR_APP: Final = "deployments.app:build"
DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8000

GB: Final = 10**9
BASE_BYTES: Final = 2 * GB
"""Ray, Serve, HAProxy and the Router."""
CPU_ENGINE_BYTES: Final = 5 * GB // 2
"""One engine on CPU before its weights: two processes that import vLLM, and a small KV cache."""

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of a container: its limit, what it uses, and what of that is page cache that the kernel takes back first."""
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class CannotStart(Exception):
    """The start cannot work. Its text is one sentence for the person at the terminal."""


@dataclass(frozen=True)
class ServedModel:
    """What the preflight needs to know of one model.

    Attributes:
        name: What clients call it.
        reference: A folder, a file or a hub id, as written in the configuration.
        replicas: Engines at the start.
    """

    name: str
    reference: str
    replicas: int


@dataclass(frozen=True)
class ServeConfig:
    """A Serve config file, read and understood as far as a start needs it.

    Attributes:
        path: The file. Relative paths in it, and imports, start from its folder.
        content: The whole file, with host and port filled in. Serve's own schema judges the rest.
    """

    path: Path
    content: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def host(self) -> str:
        return str(self.content["http_options"]["host"])

    @property
    def port(self) -> int:
        return int(self.content["http_options"]["port"])

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the first application that serves models."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "localhost") else self.host
        host = f"[{host}]" if ":" in host else host
        prefix = next((a.get("route_prefix") or "/" for a in self._applications() if _models(a)), "/")
        return f"http://{host}:{self.port}{prefix.rstrip('/')}"

    @property
    def models(self) -> tuple[ServedModel, ...]:
        return tuple(_served(model) for application in self._applications() for model in _models(application))

    @property
    def ours(self) -> tuple[AppConfig, ...]:
        """What stands under `args` of our applications."""
        ours = (a for a in self._applications() if a["import_path"] == OUR_APP)
        return tuple(AppConfig.parse(application.get("args") or {}) for application in ours)

    def _applications(self) -> Iterator[dict[str, Any]]:
        yield from self.content["applications"]


def read_config(path: Path, *, port: int | None = None) -> ServeConfig:
    """Read a Serve config file.

    Args:
        path: The file.
        port: Overrides the file's HTTP port. 0 takes a free one.

    Raises:
        CannotStart: It is not there, not YAML, or not a Serve config.
    """
    content = _parse(path)
    applications = content.get("applications") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(applications, list) or not applications:
        raise CannotStart(f"{path} is not a Serve config: it needs a list `applications`.")
    for i, application in enumerate(applications):
        if not isinstance(application, dict) or not isinstance(application.get("import_path"), str):
            raise CannotStart(f"{path} is not a Serve config: applications[{i}] needs an `import_path`.")
        _check_arguments(path, i, application)
    http = content.get("http_options") or {}
    if not isinstance(http, dict):
        raise CannotStart(f"{path} is not a Serve config: `http_options` must be a mapping.")
    # Serve's own default is every address: here that is something to ask for.
    http = {"host": DEFAULT_HOST, "port": DEFAULT_PORT} | http
    if port is not None:
        http["port"] = port
    if not isinstance(http["port"], int) or not 0 <= http["port"] < 2**16:
        raise CannotStart(f"{path} is not a Serve config: http_options.port must be a number from 0 to 65535.")
    if http["port"] == 0:
        http["port"] = free_port(str(http["host"]))
    return ServeConfig(path.resolve(), {**content, "http_options": http})


def check_ray_address(environ: Mapping[str, str]) -> None:
    """Refuse to start beside a cluster that the environment points at: it is somebody's, and meant to be used."""
    if address := environ.get("RAY_ADDRESS"):
        raise CannotStart(
            f"RAY_ADDRESS is set ({address}): deploy there with `serve deploy`, or unset it to serve on this machine."
        )


def check_keys(config: ServeConfig, environ: Mapping[str, str]) -> bool:
    """Refuse to let strangers in; return whether clients need an API key.

    Raises:
        CannotStart: The keys cannot be read, or there are none and the HTTP port is not on loopback.
    """
    try:
        rings = [key_ring(app.router, environ, config.folder) for app in config.ours]
    except ConfigError as error:
        raise CannotStart(f"The API keys cannot be used: {error}.") from None
    if None in rings and not is_loopback(config.host):
        raise CannotStart(
            f"Whoever reaches {config.host}:{config.port} could use the models: make a key (`groundswell key new`) "
            f"and name it in `args.router.keys.file` or {VARIABLE}, or keep `http_options.host` at {DEFAULT_HOST}."
        )
    return bool(rings) and None not in rings


def check_vllm(installed: bool) -> None:
    """Refuse to start without an inference engine."""
    if not installed:
        raise CannotStart("vLLM is not installed: run `make install`, or `uv pip install -e '.[cpu]'` (or `[gpu]`).")


def check_libraries(found: Callable[[str], bool], *, gpu_build: bool) -> None:
    """Refuse to start where vLLM's own libraries could not be loaded.

    Args:
        found: Whether a shared library is on this machine.
        gpu_build: Whether the vLLM installed here runs on GPUs.
    """
    if not gpu_build and not found("libnuma.so.1"):
        raise CannotStart("vLLM on a CPU needs libnuma.so.1: `apt-get install libnuma1`, or what your Linux calls it.")


def check_port(host: str, port: int) -> None:
    """Refuse an HTTP port that cannot be bound."""
    try:
        _bind(host, port).close()
    except OSError as error:
        raise CannotStart(
            f"Cannot listen on {host}:{port} ({error.strerror or error}): stop what uses it, or choose another port "
            "with `--port` or `http_options.port`."
        ) from None


def check_memory(models: tuple[ServedModel, ...], folder: Path, *, available_bytes: int, gpu: bool) -> None:
    """Refuse a start that would end in the kernel's out-of-memory killer.

    Args:
        models: What will be loaded.
        folder: Where relative model paths start.
        available_bytes: Memory that new processes can have.
        gpu: Whether engines keep weights and KV cache on a GPU; they still need memory to load.
    """
    engines = sum(model.replicas for model in models)
    if gpu:
        need = BASE_BYTES + engines * CPU_ENGINE_BYTES
    else:
        weights = sum(model.replicas * _weights_bytes(model.reference, folder) for model in models)
        need = BASE_BYTES + engines * CPU_ENGINE_BYTES + weights
    if need > available_bytes:
        raise CannotStart(
            f"Not enough memory: {engines} engine{'s'[: engines != 1]} and Ray need about {need / GB:.1f} GB and "
            f"{available_bytes / GB:.1f} GB are free; stop something, or have fewer replicas."
        )


def check_model(model: ServedModel, folder: Path, *, environ: Mapping[str, str]) -> None:
    """Refuse a model that is neither on this machine nor something the hub could have."""
    where = local_path(model.reference, folder)
    if where is not None:
        if not where.exists():
            raise CannotStart(f"Model {model.name!r} is not there: {where} does not exist.")
        if where.is_dir() and not any((where / name).is_file() for name in ("config.json", "params.json")):
            raise CannotStart(f"Model {model.name!r} is not a model: {where} has no config.json.")
    elif _offline(environ) and _HUB_ID.fullmatch(model.reference) and not _is_cached(model.reference, environ):
        raise CannotStart(
            f"Model {model.name!r} ({model.reference}) is not in the Hugging Face cache and HF_HUB_OFFLINE is set: "
            "download it first, or name a folder."
        )


def local_path(reference: str, folder: Path) -> Path | None:
    """Return the path that `reference` means, or None where it means a hub id or a URL.

    `org/name` is a path where it exists, and where `org` is a folder here: nobody calls a hub model `models/…`.
    """
    if "://" in reference:
        return None
    path = Path(reference).expanduser()
    here = folder / path
    is_path = (
        path.is_absolute()
        or reference.startswith(("./", "../", "~"))
        or _HUB_ID.fullmatch(reference) is None
        or here.exists()
        or ("/" in reference and (folder / path.parts[0]).is_dir())
    )
    return here if is_path else None


def replicas_at_start(deployment: Mapping[str, Any]) -> int:
    """Return how many engines a model starts with, by what stands under `deployment`."""
    autoscaling = deployment.get("autoscaling_config") or {}
    replicas = autoscaling.get("initial_replicas") or autoscaling.get("min_replicas")
    if replicas is None:
        replicas = deployment.get("num_replicas", 1)
    return replicas if isinstance(replicas, int) else 1


def free_port(host: str = DEFAULT_HOST, preferred: int = 0) -> int:
    """Return `preferred` if nobody listens there, any free port otherwise."""
    for port in (preferred, 0):
        try:
            with _bind(host, port) as bound:
                return int(bound.getsockname()[1])
        except OSError:
            continue
    raise CannotStart(f"No port is free on {host}.")


def available_bytes() -> int:
    """Return the memory that new processes can have: the machine's, or the container's where that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for names in _CGROUP_FILES:
        limit, usage, statistics = (_CGROUP / name for name in names[:3])
        try:
            used = int(usage.read_text()) - _statistic(statistics, names[3])
            free = min(free, int(limit.read_text()) - used)
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return free


def _statistic(file: Path, name: str) -> int:
    if not file.exists():
        return 0
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(value) for key, value in lines if key == name), 0)


def has_library(name: str) -> bool:
    """Return whether a shared library can be loaded."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def has_gpu() -> bool:
    """Return whether an NVIDIA GPU can be seen."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _parse(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CannotStart(f"There is no config file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"Cannot read {path}: {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise CannotStart(f"{path} is not valid YAML{line}: {getattr(error, 'problem', None) or error}.") from None


def _check_arguments(path: Path, i: int, application: dict[str, Any]) -> None:
    if application["import_path"] != OUR_APP:
        return
    try:
        AppConfig.parse(application.get("args") or {})
    except ConfigError as error:
        raise CannotStart(f"{path}, applications[{i}].args: {error}.") from None


def _models(application: dict[str, Any]) -> list[dict[str, Any]]:
    models = (application.get("args") or {}).get("models") or []
    return [model for model in models if isinstance(model, dict) and isinstance(model.get("engine_args"), dict)]


def _served(model: dict[str, Any]) -> ServedModel:
    reference = str(model["engine_args"].get("model", ""))
    return ServedModel(
        name=str(model.get("name") or reference),
        reference=reference,
        replicas=replicas_at_start(model.get("deployment") or {}),
    )


def _bind(host: str, port: int) -> socket.socket:
    """Bind as HAProxy would: a connection that lingers from the last run is no obstacle."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(1)
    except OSError:
        bound.close()
        raise
    return bound


def _weights_bytes(reference: str, folder: Path) -> int:
    where = local_path(reference, folder)
    if where is None or not where.exists():
        return 0
    files = [where] if where.is_file() else [*where.glob("*.safetensors"), *where.glob("*.bin"), *where.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def _offline(environ: Mapping[str, str]) -> bool:
    return any(environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _OFFLINE_VARIABLES)


def _is_cached(hub_id: str, environ: Mapping[str, str]) -> bool:
    home = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return any(cache.glob(f"models--{hub_id.replace('/', '--')}/snapshots/*/config.json"))
