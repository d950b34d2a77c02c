"""Write a checkpoint as a Hugging Face model.

python -m models.groundling_maker.export WORK_FOLDER [MODEL_FOLDER]

Stored in bf16, which is half the size and what GPUs serve it in.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.groundling_maker import tokenizer as tokens
from models.groundling_maker.network import Network, Shape

MODEL = Path(__file__).parents[1] / "groundling"


def export(work: Path, model: Path) -> None:
    """Write the weights (bf16), the tokenizer and their configuration into the folder `model`."""
    model.mkdir(parents=True, exist_ok=True)
    tokenizer = tokens.load(work / "tokenizer.json")
    shape = Shape(tokenizer.get_vocab_size())
    network = Network(shape)
    network.load_state_dict(torch.load(work / "checkpoint.pt")["network"])
    weights = network.to_hf()
    # A head of its own, so that what only prompts have cannot be said: in drills a user follows after a few tokens of
    # an answer, which is what the model would otherwise say where it is unsure of the next.
    head = weights["model.embed_tokens.weight"].clone()
    head[[tokens.PAD_ID, *tokens.PROMPT_IDS]] = 0
    weights = {
        name: weight.to(torch.bfloat16).contiguous() for name, weight in {**weights, "lm_head.weight": head}.items()
    }
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "model.safetensors").chmod(0o644)  # it is written for the owner alone
    ends = {"bos_token_id": None, "eos_token_id": tokens.END_ID, "pad_token_id": tokens.PAD_ID}
    _write(model / "config.json", {**shape.to_hf(), "dtype": "bfloat16", **ends})
    sampling = {"do_sample": False, "temperature": 0.0}  # it copies: there is one right answer
    _write(model / "generation_config.json", {**sampling, "eos_token_id": tokens.END_ID, "pad_token_id": tokens.PAD_ID})
    shutil.copyfile(work / "tokenizer.json", model / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens.END,
        "pad_token": tokens.PAD,
        "model_max_length": shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokens.CHAT_TEMPLATE,
    }
    _write(model / "tokenizer_config.json", settings)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    options = parser.parse_args()
    export(options.work, options.model)


if __name__ == "__main__":
    main()
