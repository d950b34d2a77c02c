"""One start of the app for all end-to-end tests."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator

import psutil
import pytest

from deployments.launch.environment import RUN_ID
from tests.e2e.serving import CONFIG, ROOT, START_LIMIT_S, STOP_LIMIT_S, Served, command, free_port, offline_environment


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port = free_port()
    process = subprocess.Popen(
        command(str(CONFIG), "--port", str(port)),
        cwd=ROOT,
        env=offline_environment(tmp_path_factory.mktemp("state")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    served = Served(process, port)
    threading.Thread(target=served.read, daemon=True).start()
    try:
        assert served.ready.wait(START_LIMIT_S), f"not ready in {START_LIMIT_S} s:\n{served.output}"
        assert process.poll() is None, served.output
        driver = psutil.Process(process.pid).children()[0]
        served.run_id = driver.environ()[RUN_ID]
        yield served
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(2 * STOP_LIMIT_S)
        finally:
            process.kill()
