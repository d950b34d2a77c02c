"""The same file without any of our flags: plain `serve run`, plain proxy, Ray's own transport."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import requests
import yaml

from deployments.launch import processes
from deployments.launch.environment import RUN_ID
from tests.e2e.serving import CONFIG, ROOT, START_LIMIT_S, free_port

SHUTDOWN_LIMIT_S = 120


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = free_port()
    config["applications"][0]["args"]["models"][0]["deployment"] = {"num_replicas": 1}
    config["applications"][0]["deployments"] = [{"name": "Engine-groundling", "max_ongoing_requests": 7}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # By these its processes are found again. Ray starts some in sessions of their own.
    environment |= {RUN_ID: secrets.token_hex(8), "SPT_NOENV": "1"}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("serve")), "run", str(path)],
        cwd=ROOT,
        env={**environment, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        yield config["http_options"]["port"]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SHUTDOWN_LIMIT_S)
        finally:
            processes.stop(environment[RUN_ID])
            process.wait()
            print((tmp_path / "log").read_text()[-4000:])


def test_serve_run_answers_through_the_plain_proxy(port: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        assert time.monotonic() < deadline, f"not ready in {START_LIMIT_S} s"
        try:
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                break
        except requests.RequestException:  # nobody listens yet, or the proxy holds the request
            pass
        time.sleep(1)
    body = {"model": "groundling", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64, "stream": True}
    body["ignore_eos"] = True  # whatever it says, it is long enough to come in pieces
    answer = requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=120, stream=True)
    lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == b"data: [DONE]"
    assert len(lines) > 4
