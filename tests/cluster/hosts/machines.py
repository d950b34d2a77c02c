"""Hosts on one machine: each has its own network, processes, hostname and folder, and they share disks and memory.

A host is a network namespace on a bridge, and a process namespace in it, whose first process is the host: kill that,
and all that runs there is gone at once, as when the power fails. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

PREFIX: Final = "gwhost"
"""Begins the name of each namespace, link and folder: what an earlier run left behind is found by it."""
BRIDGE: Final = f"{PREFIX}-bridge"
NETWORK: Final = "198.18.77"  # of those set aside for tests (RFC 2544)
GATEWAY: Final = f"{NETWORK}.1"
"""This machine's own address on the bridge."""

_FOLDERS: Final = Path("/tmp")  # whatever TMPDIR says: paths of sockets have 107 characters at most
_LOCK: Final = _FOLDERS / f"{PREFIX}.lock"
_TOOLS: Final = ("ip", "ss", "unshare", "nsenter", "mount", "bash")
_FIRST_PROCESS: Final = """
hostname "$0" && mount --bind "$1" /etc/hosts && echo up
while :; do sleep 3600 & wait $!; done  # bash reaps whatever it inherits
"""


def missing() -> str | None:
    """Return why there can be no hosts here, if so."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    probe = subprocess.run(["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True)
    return None if probe.returncode == 0 else f"no namespaces: {probe.stderr.decode().strip()}"


def run(*command: str, check: bool = True) -> str:
    """Run a command on this machine, outside all hosts; return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Host:
    """One host.

    Attributes:
        name: Its hostname.
        address: Its IP address.
        folder: Its own, and short enough for sockets.
        environment: What its commands find in theirs.
    """

    name: str
    address: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    _first: psutil.Process | None = None
    _outside: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def _namespace(self) -> str:
        return f"{PREFIX}-{self.name}"

    @property
    def _link(self) -> str:
        """The end of its cable that is on the bridge."""
        return f"{PREFIX}-{self.name}"

    def boot(self) -> None:
        """Start it, or start it again after `kill`: with its folder as it was, as from its disk."""
        if not any(line.split()[0] == self._namespace for line in run("ip", "netns", "list").splitlines()):
            self._plug_in()
        namespaces = ["unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
        first = ["bash", "-c", _FIRST_PROCESS, self.name, str(self.folder.parent / "hosts")]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace, *namespaces, *first],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._outside.append(process)
        assert process.stdout is not None and process.stdout.readline() == "up\n", f"{self.name} did not start"
        (self._first,) = psutil.Process(process.pid).children()

    def _plug_in(self) -> None:
        run("ip", "netns", "add", self._namespace)
        inside = ("ip", "-n", self._namespace)
        run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._namespace)
        run("ip", "link", "set", self._link, "master", BRIDGE, "up")
        run(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "route", "add", "default", "via", GATEWAY)

    def start(self, *command: str, environment: Mapping[str, str] = {}, **options: Any) -> subprocess.Popen[str]:
        """Start a command on this host. The process returned stands for it, outside."""
        assert self._first is not None, f"{self.name} is down"
        entered = ["nsenter", "--target", str(self._first.pid), "--net", "--pid", "--mount", "--uts", "--"]
        entered += ["bash", "-c", 'cd "$0" && exec "$@"', str(self.folder), *command]
        process = subprocess.Popen(
            entered, env={**self.environment, "TMPDIR": str(self.folder), **environment}, text=True, **options
        )
        self._outside.append(process)
        return process

    def run(
        self,
        *command: str,
        environment: Mapping[str, str] = {},
        limit_s: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end; what it prints is in `stdout`, errors too."""
        process = self.start(*command, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, output)

    def processes(self) -> list[psutil.Process]:
        """Return what runs on it."""
        found = []
        for pid in run("ip", "netns", "pids", self._namespace).split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def connections(self) -> list[tuple[str, str]]:
        """Return local and remote `address:port` of the established TCP connections in its network."""
        lines = run("ip", "netns", "exec", self._namespace, "ss", "-Htn", "state", "established").splitlines()
        return [(line.split()[2], line.split()[3]) for line in lines]

    def cut_off(self) -> None:
        """Pull its cable: nothing is refused, nothing arrives."""
        run("ip", "link", "set", self._link, "down")

    def plug_in_again(self) -> None:
        run("ip", "link", "set", self._link, "up")

    def kill(self) -> None:
        """End all that runs on it, at once."""
        if self._first is not None:
            self._first.send_signal(signal.SIGKILL)
        for process in self._outside:
            process.wait(30)
        self._first, self._outside = None, []


@dataclass
class Hosts:
    """A network of hosts, by name. Made by `hosts`.

    Attributes:
        folder: Shared by all, as a file server's would be.
    """

    folder: Path
    by_name: dict[str, Host] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Host:
        return self.by_name[name]

    def boot(self, name: str, environment: Mapping[str, str] = {}) -> Host:
        """Start a host: a new one, or one that is down."""
        host = self.by_name.get(name)
        if host is None:
            number = len(self.by_name) + 11
            host = self.by_name[name] = Host(name, f"{NETWORK}.{number}", self.folder / name)
            host.folder.mkdir()
            with (self.folder / "hosts").open("a") as file:
                file.write(f"{host.address} {name}\n")
        host.environment = dict(environment)
        host.boot()
        return host


@contextlib.contextmanager
def hosts() -> Iterator[Hosts]:
    """Have a network for hosts until the block is left; one at a time on a machine. Nothing is left of it then."""
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_all()
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-", dir=_FOLDERS))
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        try:
            run("ip", "link", "add", BRIDGE, "type", "bridge")
            run("ip", "address", "add", f"{GATEWAY}/24", "dev", BRIDGE)
            run("ip", "link", "set", BRIDGE, "up")
            yield Hosts(folder)
        finally:
            remove_all()


def remove_all() -> None:
    """Remove every host there is, with its processes, and the bridge; those of a run that was killed too."""
    names = [line.split()[0] for line in run("ip", "netns", "list").splitlines()]
    for name in filter(_is_ours, names):
        _end_processes(name)
        run("ip", "netns", "delete", name)
    links = [line.split(":")[1].split("@")[0].strip() for line in run("ip", "-o", "link").splitlines()]
    for link in filter(_is_ours, links):
        run("ip", "link", "delete", link, check=False)  # a veth goes with its namespace, a moment later
    for folder in _FOLDERS.glob(f"{PREFIX}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _is_ours(name: str) -> bool:
    return name.startswith(f"{PREFIX}-")


def _end_processes(namespace: str, limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while pids := run("ip", "netns", "pids", namespace).split():
        assert time.monotonic() < deadline, f"processes in {namespace} cannot be killed: {pids}"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)
