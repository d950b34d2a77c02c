"""A comparison as pictures: one PNG for each measure, workloads beside each other. Needs matplotlib (`dev`)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

MEASURES: Final = {
    "tokens_per_s": "output tokens per second",
    "ttft_p50_s": "time to the first token, median, s",
    "ttft_p99_s": "time to the first token, p99, s",
    "tpot_p50_s": "time per further token, median, s",
    "goodput": "good requests per second",
}


def draw(numbers: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the pictures of what `compare.as_json` returned; return their files."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    systems, workloads, files = numbers["systems"], numbers["workloads"], []
    width = 0.8 / len(systems)
    for measure, title in MEASURES.items():
        figure, axes = pyplot.subplots(figsize=(2 + 2 * len(workloads), 4), layout="constrained")
        for i, (name, system) in enumerate(systems.items()):
            values = [_middle(system["workloads"][workload][measure]) for workload in workloads]
            axes.bar([x + i * width for x in range(len(workloads))], values, width, label=name)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(workloads))], workloads)
        axes.set_title(f"{title} ({numbers['replicas']} engine{'s' * (numbers['replicas'] > 1)})")
        axes.legend()
        files.append(folder / f"{measure}.png")
        figure.savefig(files[-1], dpi=120)
        pyplot.close(figure)
    return files


def _middle(value: float | list[float]) -> float:
    return statistics.median(value) if isinstance(value, list) else value
