"""The process in the foreground: starts the driver, is what Ctrl-C reaches, and leaves no process behind.

It imports neither Ray nor vLLM, so it answers a signal at once, whatever they do.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final

from deployments.launch import environment, processes
from deployments.launch.driver import FAILURE_FILE, Settings
from deployments.launch.preflight import CannotStart, ServeConfig, free_port

POLL_S: Final = 0.2
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DRIVER: Final = (sys.executable, "-m", "deployments.launch.driver")


def clean_up() -> None:
    """End what earlier runs of this user left behind because they were killed: it may hold ports and memory."""
    processes.Registry(processes.state_folder()).clean_up()


def serve(config: ServeConfig, *, needs_key: bool = False, dashboard: bool = False, verbose: bool = False) -> None:
    """Serve `config` until a signal comes.

    Args:
        config: Checked by the preflight.
        needs_key: Whether clients need an API key, for what is printed.
        dashboard: Start Ray's dashboard too.
        verbose: Bring the logs of all processes to the terminal.

    Raises:
        CannotStart: It never became ready, or stopped by itself. Everything else has ended by then.
    """
    registry = processes.Registry(processes.state_folder())
    run = processes.new_run(secrets.token_hex(8))
    with registry.holding(run), _signals() as signals:
        try:
            driver = _start_driver(config, run, needs_key=needs_key, dashboard=dashboard, verbose=verbose)
            while driver.poll() is None and not signals:
                _wait(driver)
            if signals:
                _print("\nStopping …")
            # It has nothing to finish, and Ray's orderly end would only wait for what we end faster.
            driver.kill()
            driver.wait()
        finally:
            asked = len(signals)
            gone = processes.stop(run.run_id, hurry=lambda: len(signals) > asked)
        failure = None if signals else _failure(run)
    if not gone:
        _print("Some processes could not be stopped; see `ps`.")
    if failure is not None:
        environment.token_path(Path(run.folder)).unlink(missing_ok=True)
        raise CannotStart(f"{failure} Logs: {run.folder}")
    processes.remove_folder(run)


def _start_driver(
    config: ServeConfig, run: processes.Run, *, needs_key: bool, dashboard: bool, verbose: bool
) -> subprocess.Popen[bytes]:
    folder = Path(run.folder)
    environment.write_files(folder)
    settings = Settings(
        config=config.content,
        url=config.url,
        models=tuple(model.name for model in config.models),
        folder=run.folder,
        dashboard=dashboard,
        dashboard_port=free_port(preferred=8265),
        metrics_port=free_port(preferred=8080),
        verbose=verbose,
        needs_key=needs_key,
        page=any(app.router.page for app in config.ours),
    )
    with open(folder / "driver.log", "wb") as log:
        # A session of its own: the terminal's Ctrl-C is for us alone.
        driver = subprocess.Popen(
            DRIVER,
            cwd=config.folder,
            env=environment.for_run(run.run_id, folder, config.folder, os.environ),
            stdin=subprocess.PIPE,
            stderr=None if verbose else log,
            start_new_session=True,
            preexec_fn=processes.die_with_parent,
        )
    assert driver.stdin is not None
    with suppress(BrokenPipeError), driver.stdin as pipe:  # where it has ended already, `serve` sees that
        pipe.write(settings.to_json().encode())  # not an argument: a config may hold secrets, and anybody can run `ps`
    return driver


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask us to end, in the order they come."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(driver: subprocess.Popen[bytes]) -> None:
    try:
        driver.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return


def _failure(run: processes.Run) -> str:
    try:
        return (Path(run.folder) / FAILURE_FILE).read_text()
    except FileNotFoundError:
        return "Ray stopped unexpectedly."


def _print(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError:  # the terminal is gone
        return
