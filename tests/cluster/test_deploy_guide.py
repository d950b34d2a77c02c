"""docs/deploy.md: its arithmetic adds up, and its commands are ones that their programs take. Nothing is run."""

from __future__ import annotations

import importlib
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from ray.scripts.scripts import cli as ray
from ray.serve.scripts import cli as serve

from deployments import cli as groundswell
from deployments.outline import MAX_NUM_SEQS
from tests.cluster.manifests import CLUSTER, ROOT, documents

GUIDE = (ROOT / "docs" / "deploy.md").read_text()
GIB, KIB = 2**30, 2**10
TOKENS = 3000
SHARE = 0.92
ALLOWANCE_GIB = 3


def commands() -> list[list[str]]:
    """Return the guide's commands that are ours or Ray's, those it has Ray run elsewhere included."""
    lines = [line.strip() for line in re.findall(r"^    (.*)$", GUIDE, re.MULTILINE)]
    lines += re.findall(r"ray exec \S+ '(?:\w+=\S+ )*([^']+)'", GUIDE)
    lines = [part for line in lines for part in line.split(" && ")]
    ours = re.compile(r"(ray|serve|groundswell|python -m) ")
    return [shlex.split(re.sub(r"\$\([^)]*\)", "x", line), comments=True) for line in lines if ours.match(line)]


def click_takes(program: click.Group, words: list[str]) -> None:
    command = program.commands[words[0]]
    command.make_context(words[0], words[1:], resilient_parsing=False)


def module_takes(words: list[str]) -> None:
    importlib.import_module(words[0])._parser().parse_args(words[1:])


TAKES: dict[str, Callable[[list[str]], Any]] = {
    "ray": lambda words: click_takes(ray, words),
    "serve": lambda words: click_takes(serve, words),
    "groundswell": lambda words: groundswell._parser().parse_args(words),
    "python": lambda words: module_takes(words[1:]),
}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_is_one_that_its_program_takes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    TAKES[words[0]](words[1:])


def test_a_file_goes_to_a_path_with_a_folder() -> None:
    """Ray makes the target's folder inside the container, and fails where there is none."""
    targets = [words[-1] for words in commands() if words[:2] == ["ray", "rsync-up"]]
    assert len(targets) == 2
    assert all(Path(target).is_absolute() for target in targets)


def test_a_mistake_would_be_found() -> None:
    assert {words[0] for words in commands()} == TAKES.keys()
    with pytest.raises(click.UsageError):
        click_takes(ray, ["drain-node", "--node", "abc"])
    with pytest.raises(SystemExit):
        groundswell._parser().parse_args(["backup", "s3://one"])


def test_a_pod_that_leaves_drains_its_node_by_a_command_that_ray_takes() -> None:
    ((service,),) = [documents(CLUSTER / "kuberay" / "rayservice.yaml")]
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        script = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        drain, _ = script.split(" && ")
        click_takes(ray, shlex.split(drain)[1:])


def rows() -> list[tuple[str, int, float, list[str]]]:
    """Return each model of the sizing table: its name, KiB a token, GiB of weights, and requests at once by GPU."""
    found = re.findall(r"^\| (\d+B, [^|]*) \| (\d+) KiB \| ([\d.]+) GiB \|(.*)\|$", GUIDE, re.MULTILINE)
    return [
        (name, int(kv), float(weights), [c.strip() for c in cells.split("|")]) for name, kv, weights, cells in found
    ]


def test_the_sizing_table_is_its_formula() -> None:
    (header,) = re.findall(r"^\| model \| KV a token \|.*$", GUIDE, re.MULTILINE)
    memories = [float(memory) for memory in re.findall(r", ([\d.]+) GiB", header)]
    assert len(rows()) == len(memories) == 4
    for name, kv, weights, cells in rows():
        at_once = [
            math.floor((SHARE * memory - weights - ALLOWANCE_GIB) * GIB / (kv * KIB) / TOKENS) for memory in memories
        ]
        assert cells == [str(min(number, MAX_NUM_SEQS)) if number > 0 else "" for number in at_once], name


def test_bytes_a_token_are_what_the_shapes_of_the_models_make_them() -> None:
    shapes = {"8B": (32, 8, 128), "32B": (64, 8, 128), "70B": (80, 8, 128)}
    for name, kv, _, _ in rows():
        layers, heads, dimension = shapes[name.split(",")[0]]
        assert kv * KIB == 2 * layers * heads * dimension * 2
