"""What Serve knows of a model before vLLM is loaded, against what vLLM's own parser makes of the same options."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from deployments.config import MAX_NUM_SEQS, ModelConfig
from deployments.errors import ConfigError
from deployments.outline import Outline, _parsed, _read, outline


def model(**options: Any) -> ModelConfig:
    return ModelConfig(name="tiny", engine_args={"model": "m", **options})


def test_a_plain_model_has_one_name_one_gpu_and_our_default_of_sequences() -> None:
    assert outline(model()) == Outline(("tiny",), MAX_NUM_SEQS)


def test_building_the_app_loads_no_vllm() -> None:
    code = (
        "import sys; from deployments.app import build; "
        "build({'models': [{'name': 'tiny', 'engine_args': {'model': 'm', 'max-num-seqs': 8}}]}); "
        "print(*sorted({'vllm', 'torch'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (answer.returncode, answer.stdout.split()) == (0, []), answer.stderr


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max-num-seqs": 8, "tensor-parallel-size": 2, "pipeline_parallel_size": 3},
        {"served_model_name": ["a", "b"]},
        {"served-model-name": "a"},
        {"enable_lora": True, "lora_modules": [{"name": "l", "path": "p"}]},
        {"enable_lora": True, "lora_modules": ["l=p", "m=q=r"]},
    ],
)
def test_plain_options_are_read_as_vllms_parser_reads_them(options: dict[str, Any]) -> None:
    pytest.importorskip("vllm")
    read = _read("tiny", {key.replace("-", "_"): value for key, value in options.items()})
    assert read is not None
    assert read == _parsed(model(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": "8"},
        {"max_num_seqs": None},
        {"tensor_parallel_size": 2.0},
        {"max_num_seqs": True},
        {"served_model_name": []},
        {"lora_modules": ["l"]},
        {"lora_modules": ['{"name": "l", "path": "a=b"}']},
        {"lora_modules": ["l=p,q"]},
        {"lora_modules": '{"name": "l", "path": "p"}'},
    ],
)
def test_what_is_not_plain_is_left_to_vllms_parser(options: dict[str, Any]) -> None:
    assert _read("tiny", options) is None


def test_on_a_node_without_a_device_the_cuda_build_parses_too() -> None:
    pytest.importorskip("vllm")
    code = (
        "import os; os.environ.pop('VLLM_TARGET_DEVICE', None); "
        "import vllm.platforms as p; from vllm.platforms.interface import UnspecifiedPlatform; "
        "find = p.resolve_current_platform_cls_qualname; "
        "p.resolve_current_platform_cls_qualname = lambda: find() if os.environ.get('VLLM_TARGET_DEVICE') == 'cpu' "
        "else 'vllm.platforms.interface.UnspecifiedPlatform'; "
        "from deployments.config import ModelConfig; from deployments.outline import outline; "
        "print(outline(ModelConfig(name='tiny', engine_args={'model': 'm', 'max_num_seqs': '8'})).max_num_seqs, "
        "os.environ.get('VLLM_TARGET_DEVICE'))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (answer.returncode, answer.stdout.split()) == (0, ["8", "None"]), answer.stderr


def test_vllms_parser_is_asked_for_what_is_not_plain() -> None:
    pytest.importorskip("vllm")
    assert outline(model(max_num_seqs="8")).max_num_seqs == 8
    with pytest.raises(ConfigError, match="max_num_seqs"):
        outline(model(max_num_seqs="eight", max_num_sequences=1))
