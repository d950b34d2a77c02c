"""What processes use, by name: CPU seconds and resident memory."""

from __future__ import annotations

import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import psutil

CpuByName = dict[str, float]

_TITLES: Final = (
    (re.compile(r"ServeReplica:[^:]*:(Router|Engine)\b"), r"\1 replica"),
    (re.compile(r"^VLLM::(\w+)"), r"\1"),
    (re.compile(r"^ray::([\w:]+)"), r"ray \1"),
    (re.compile(r"multiprocessing\.(\w+)"), r"\1"),
    (re.compile(r"\bvllm\.entrypoints\.openai\.(\w+)"), r"\1"),
    (re.compile(r"-m benchmarks\.stubs (\w+)"), r"stub \1"),
    (re.compile(r"-m deployments\.(\S+)"), r"\1"),
)


def name(process: psutil.Process) -> str:
    """Return what people call a process."""
    command = process.cmdline()
    title = " ".join(command)
    for pattern, replacement in _TITLES:
        if found := pattern.search(title):
            return found.expand(replacement)
    script = next((part for part in command[1:] if part.endswith(".py")), command[0] if command else process.name())
    return Path(script).name


def cpu_seconds(processes: Iterable[psutil.Process]) -> dict[psutil.Process, float]:
    """Return user and system time of each process so far, the time of its reaped children included."""
    result = {}
    for process in processes:
        try:
            result[process] = sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return result


def by_name(spent: Mapping[psutil.Process, float]) -> CpuByName:
    """Add up what processes of one name have spent."""
    result: CpuByName = defaultdict(float)
    for process, seconds in spent.items():
        try:
            result[name(process)] += seconds
        except psutil.Error:
            result["ended"] += seconds
    return dict(result)


class Meter:
    """Measures processes while the block runs.

    Args:
        processes: Returns the processes to measure; asked again at each sample, for new ones.
        interval_s: Between two samples of resident memory; the first is taken as the block begins, the last as it ends.

    Attributes:
        cpu_s: CPU seconds by name, within the block.
        peak_rss_bytes: By name; of all processes of one name together, at one moment. Shared pages count in each.
    """

    def __init__(self, processes: Callable[[], list[psutil.Process]], interval_s: float = 0.5) -> None:
        self._processes = processes
        self._interval_s = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.cpu_s: CpuByName = {}
        self.peak_rss_bytes: dict[str, int] = {}

    def __enter__(self) -> Meter:
        self._look()
        self._before = cpu_seconds(self._processes())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        after = cpu_seconds(self._processes())
        self._look()
        self.cpu_s = by_name({process: spent - self._before.get(process, 0.0) for process, spent in after.items()})

    def _sample(self) -> None:
        while not self._done.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        rss: Counter[str] = Counter()
        for process in self._processes():
            try:
                rss[name(process)] += process.memory_info().rss
            except psutil.Error:  # it has ended
                continue
        for title, together in rss.items():
            self.peak_rss_bytes[title] = max(together, self.peak_rss_bytes.get(title, 0))
