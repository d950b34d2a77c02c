"""What runs between nodes, on hosts with addresses of their own and without Ray: the token channel, and HAProxy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import requests

from deployments import messages as m
from deployments.launch.environment import write_haproxy
from deployments.launch.haproxy import DEAD_PEER_S
from tests.cluster.hosts import machines
from tests.cluster.hosts.machines import Host, Hosts
from tests.cluster.hosts.peers import HTTP_PORT
from tests.e2e.serving import ROOT, wait_for

why_not = machines.missing()
pytestmark = pytest.mark.skipif(why_not is not None, reason=f"no hosts on this machine: {why_not}")

HAPROXY_PORT = 8000


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with machines.hosts() as made:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for name in ("a", "b"):
            made.boot(name, environment)
        yield made


@dataclass
class Peer:
    """A program of `peers` on a host, and what it has said so far."""

    host: Host
    arguments: tuple[str, str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "tests.cluster.hosts.peers", *self.arguments]
        self.process = self.host.start(*command, stdout=subprocess.PIPE)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip() for line in iter(self.process.stdout.readline, ""))

    def first(self) -> str:
        wait_for(lambda: bool(self.lines), "it says something", 30)
        return self.lines[0]

    def deltas(self) -> int:
        return max((int(line.split()[1]) for line in list(self.lines) if line.startswith("deltas")), default=0)


def test_tokens_cross_hosts_encrypted_and_a_cut_is_noticed_by_both_ends_and_mended(hosts: Hosts) -> None:
    router = Peer(hosts["a"], ("router", hosts["a"].address))
    channel = router.first()
    address = msgspec.json.decode(channel, type=m.ChannelAddress)
    assert address.endpoint.startswith(f"tcp://{hosts['a'].address}:") and address.server_key is not None

    engine = Peer(hosts["b"], ("engine", channel))
    wait_for(lambda: router.deltas() > 10, "deltas come", 30)
    assert any(remote == address.endpoint.removeprefix("tcp://") for _, remote in hosts["b"].connections())

    hosts["b"].cut_off()
    wait_for(lambda: "gone e" in router.lines, "the Router knows", 10)
    wait_for(lambda: "lost" in engine.lines, "the engine knows", 10)
    hosts["b"].plug_in_again()
    before = router.deltas()
    wait_for(lambda: router.deltas() > before + 10, "deltas come again", 30)


def test_who_lacks_the_channels_keys_is_not_heard(hosts: Hosts) -> None:
    router = Peer(hosts["a"], ("router", hosts["a"].address))
    address = msgspec.json.decode(router.first(), type=m.ChannelAddress)
    plain = msgspec.structs.replace(address, server_key=None)
    guess = msgspec.structs.replace(address, secret=bytes(16))
    for stranger in (plain, guess):
        engine = Peer(hosts["b"], ("engine", msgspec.json.encode(stranger).decode()))
        assert engine.first() == "unreachable"
    assert router.deltas() == 0


def test_haproxy_asks_its_own_nodes_router_first_and_others_when_it_is_gone(hosts: Hosts) -> None:
    routers = {name: Peer(hosts[name], ("http", name)) for name in ("a", "b")}
    url = haproxy(hosts, own_node_first=True)
    with ThreadPoolExecutor(8) as pool:

        def who() -> set[str]:
            return set(pool.map(lambda _: answer(url), range(32)))

        # While HAProxy's checks of a are late, as on a busy machine, b answers.
        wait_for(lambda: who() == {"a"}, "its own node's Router answers all", 60)
    end_all(hosts["a"], routers["a"])
    wait_for(lambda: answer(url) == "b", "the other node's Router answers", 30)


def test_a_stream_from_a_node_that_was_cut_off_ends_rather_than_hang(hosts: Hosts) -> None:
    Peer(hosts["b"], ("http", "b"))
    url = haproxy(hosts)
    with requests.get(f"{url}/stream", stream=True, timeout=10 * DEAD_PEER_S) as stream:
        chunks = stream.iter_content(1)
        assert next(chunks) == b"b"
        hosts["b"].cut_off()
        begin = time.monotonic()
        with pytest.raises(requests.RequestException):
            for _ in chunks:
                pass
        assert DEAD_PEER_S / 2 < time.monotonic() - begin < 5 * DEAD_PEER_S


def answer(url: str) -> str:
    try:
        return requests.get(url, timeout=10).text
    except requests.RequestException:
        return ""


def end_all(host: Host, peer: Peer) -> None:
    """End a program on a host: what stands for it outside is not the program itself."""
    for process in host.processes():
        if "tests.cluster.hosts.peers" in process.cmdline():
            process.kill()
    peer.process.wait(10)


def haproxy(hosts: Hosts, *, own_node_first: bool = False) -> str:
    """Start HAProxy on host a, over the Routers' HTTP sides on both, configured by Serve's own code; return its URL."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    a = hosts["a"]
    addresses = {"a": "127.0.0.1", "b": hosts["b"].address}  # Serve, too, writes loopback for a Router of its own node
    servers = [ServerConfig(name=name, host=address, port=HTTP_PORT) for name, address in addresses.items()]
    backend = BackendConfig(name="http-app", path_prefix="/", servers=servers, app_name="app")
    options: dict[str, Any] = {
        "socket_path": str(a.folder / "admin.sock"),
        "server_state_base": str(a.folder),
        "server_state_file": str(a.folder / "server-state"),
        "metrics_socket_path": str(a.folder / "metrics.sock"),
        "http_options": HTTPOptions(host="0.0.0.0", port=HAPROXY_PORT),
    }
    file, binary = a.folder / "haproxy.cfg", hosts.folder / "haproxy"
    api = HAProxyApi(HAProxyConfig(**options), {"http-app": backend}, config_file_path=str(file))
    api._generate_config_file_internal()
    write_haproxy(binary)
    chosen = {"GROUNDSWELL_OWN_NODE_FIRST": "1"} if own_node_first else {}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    a.start(str(binary), "-db", "-f", str(file), environment=chosen, **quiet)
    url = f"http://{a.address}:{HAPROXY_PORT}"
    wait_for(lambda: answer(url) in ("a", "b"), "HAProxy answers", 30)
    return url
