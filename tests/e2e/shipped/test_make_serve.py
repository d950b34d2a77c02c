"""`make serve`, for real: one start of the default config, then everything it promises.

The order of the tests is the order of a visit: it comes up, it answers, it is closed to strangers, it leaves nothing.
Set GROUNDSWELL_TEST_CONFIG to serve another config file.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
import psutil
import pytest

from deployments.launch.processes import is_alive
from tests.e2e.serving import CONFIG, ROOT, STOP_LIMIT_S, Served, command, offline_environment

T = TypeVar("T")
VLLMS_SOCKET = re.compile(r"/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")


def of_each(served: Served, look: Callable[[psutil.Process], T]) -> Iterator[T]:
    """Yield what is seen of each process of the run, but for those that end meanwhile: Ray ends idle ones."""
    for process in served.members():
        with contextlib.suppress(psutil.NoSuchProcess):
            yield look(process)


def test_says_where_it_is_and_the_request_it_prints_works(served: Served) -> None:
    assert f"Groundswell is ready at http://127.0.0.1:{served.port}/v1" in served.output
    curl = next(line for line in served.lines if line.strip().startswith("curl"))
    answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=60, check=True).stdout
    assert answer.startswith("data: {")
    assert answer.rstrip().endswith("data: [DONE]")


def test_tells_how_loading_goes(served: Served) -> None:
    assert [line for line in served.lines if re.match(r" *\d+ s  deploying", line)], served.output
    assert re.search(r"running .*\b2/2\b", served.output)


def test_metrics_can_be_scraped(served: Served) -> None:
    import requests

    url = re.search(r"http://\S+/metrics", served.output)
    assert url is not None
    for address in (url[0], f"http://127.0.0.1:{served.port}/metrics"):
        assert "ray_" in requests.get(address, timeout=30).text


def test_routers_and_engines_are_not_put_behind_everything_else_on_the_machine(served: Served) -> None:
    names = ("ray::ServeReplica:", "VLLM::")
    niceness = {nice for name, nice in of_each(served, lambda p: (title(p), p.nice())) if name.startswith(names)}
    assert niceness, "no replica was found"
    assert niceness == {psutil.Process().nice()}


def run_folder(served: Served) -> Path:
    return token_path(served).parent


def token_path(served: Served) -> Path:
    return Path(served.members()[0].environ()["RAY_AUTH_TOKEN_PATH"])


def title(process: psutil.Process) -> str:
    return " ".join(process.cmdline()[:1]) or process.name()


@dataclass(frozen=True)
class Listener:
    """A TCP socket that accepts connections."""

    process: str
    address: str
    port: int

    @property
    def is_on_loopback(self) -> bool:
        ip = ipaddress.ip_address(self.address)
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        return (mapped or ip).is_loopback


@dataclass(frozen=True)
class OpenSocket:
    """A socket that may be reached from other machines.

    Attributes:
        reason: Why, and what guards it.
        matches: Whether a listener is this one.
        needs_token: Whether Ray's token guards it.
    """

    reason: str
    matches: Callable[[Listener], bool]
    needs_token: bool


OPEN_SOCKETS = (
    OpenSocket(
        "A replica's gRPC port. Serve binds it to every address and has no option for it. Calls between deployments "
        "are unpickled there, so it must ask for Ray's token, which only this run's processes know.",
        lambda listener: listener.process.startswith("ray::ServeReplica:") and listener.address == "::",
        needs_token=True,
    ),
)


def listeners(served: Served) -> list[Listener]:
    def of(process: psutil.Process) -> list[Listener]:
        listening = [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        return [Listener(title(process), address.ip, address.port) for address in listening]

    own = of(psutil.Process(served.process.pid))
    return [*own, *(listener for each in of_each(served, of) for listener in each)]


def test_every_socket_listens_on_loopback_or_is_excepted_by_name(served: Served) -> None:
    everything = listeners(served)
    assert any(listener.port == served.port for listener in everything), "HAProxy's own socket was not found"
    assert any(listener.process.startswith("ray::ServeReplica:") for listener in everything)
    open_ = [listener for listener in everything if not listener.is_on_loopback]
    unknown = [listener for listener in open_ if not any(known.matches(listener) for known in OPEN_SOCKETS)]
    assert unknown == [], "reachable from other machines, and nobody has said why"
    for known in OPEN_SOCKETS:
        assert any(map(known.matches, open_)), f"no longer true, delete it: {known.reason}"


def test_what_is_open_refuses_whoever_lacks_the_token(served: Served) -> None:
    token = token_path(served).read_text()
    known = [opened for opened in OPEN_SOCKETS if opened.needs_token]
    guarded = [listener for listener in listeners(served) if any(k.matches(listener) for k in known)]
    assert guarded
    for listener in guarded:
        assert call(listener.port, None) is grpc.StatusCode.UNAUTHENTICATED
        assert call(listener.port, "0" * 64) is grpc.StatusCode.UNAUTHENTICATED
        assert call(listener.port, token) is not grpc.StatusCode.UNAUTHENTICATED  # or this test would prove nothing


def call(port: int, token: str | None) -> grpc.StatusCode:
    """Call a replica as another deployment would, with an empty message; return how it ended."""
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        try:
            method(b"", metadata=metadata, timeout=20)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def test_the_token_is_neither_printed_nor_passed_as_an_argument(served: Served) -> None:
    path = token_path(served)
    token = path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    assert token not in served.output
    for arguments, environment in of_each(served, lambda p: (p.cmdline(), p.environ())):
        assert token not in " ".join(arguments)
        assert token not in environment.values()


@pytest.mark.parametrize(
    ("arguments", "text", "problem"),
    [
        pytest.param(["--port", "{port}"], None, "Cannot listen on 127.0.0.1:{port}", id="port in use"),
        pytest.param([], "applications: [", "is not valid YAML", id="bad YAML"),
        pytest.param([], "models: []", "is not a Serve config", id="not a Serve config"),
        pytest.param(
            ["--port", "0"],
            "applications: [{import_path: 'deployments.app:build', "
            "args: {models: [{name: a, engine_args: {model: ./nowhere}}]}}]",
            "does not exist",
            id="missing model",
        ),
    ],
)
def test_says_in_one_sentence_why_it_cannot_start(
    served: Served, tmp_path: Path, arguments: list[str], text: str | None, problem: str
) -> None:
    config = CONFIG
    if text is not None:
        config = tmp_path / "config.yaml"
        config.write_text(text)
    given = [argument.format(port=served.port) for argument in arguments]
    result = subprocess.run(
        command(str(config), *given),
        cwd=ROOT,
        env=offline_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert problem.format(port=served.port) in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


def test_sockets_between_an_engines_processes_go_with_the_runs_folder(served: Served) -> None:
    """A process that is killed leaves its own behind, and Ctrl-C kills."""
    sockets = {c.laddr for each in of_each(served, lambda p: p.net_connections("unix")) for c in each}
    assert {Path(path).parent for path in sockets if VLLMS_SOCKET.search(path)} == {run_folder(served)}


def test_ctrl_c_leaves_nothing_behind(served: Served) -> None:
    folder = run_folder(served)
    everybody = served.members()
    assert len(everybody) > 5
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(STOP_LIMIT_S) == 0
    assert served.members() == []
    assert [process for process in everybody if is_alive(process)] == []
    assert not folder.exists()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", served.port))
