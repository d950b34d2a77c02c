"""Write a tiny model with random weights, in Hugging Face format, to try the whole stack without a download.

**It answers gibberish.** Its weights are drawn at random and never trained: good for tests, benchmarks of everything
around the engine and a first `make serve`, useless for anything a model is for. About 3.7 million parameters, made in
a second, and the same for everybody: one seed, one text.

    python models/tiny_random.py [FOLDER] [--seed N] [--lora]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

DEFAULT_PATH = Path(__file__).parent / "tiny-random"
LORA_FOLDER = "lora"

HIDDEN = 256
LAYERS = 4
HEADS = 4
KV_HEADS = 2
INTERMEDIATE = 768
VOCABULARY = 2048
MAX_POSITIONS = 4096
LORA_RANK = 8
WEIGHT_SCALE = 0.08
PROJECTIONS = {"q_proj": HIDDEN, "k_proj": HIDDEN * KV_HEADS // HEADS, "v_proj": HIDDEN * KV_HEADS // HEADS}

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # what reasoning and tool parsers look for

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": MAX_POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

# What the tokenizer learns its merges from. Any text will do, as long as it never changes.
TEXT = """
A groundswell is a broad deep wave of the open sea, raised by a storm that may be a thousand miles away. It arrives
long after the wind has died, and it lifts every boat in the harbour at once. Sailors learned to read such waves: their
length, their height and their rhythm tell how strong the storm was, how far away it is and which way it moves.

A library keeps books, and a catalogue keeps the knowledge of where each book stands. Whoever asks a good question is
led to a shelf; whoever reads the page finds an answer, or at least a better question. A careful writer names the
source of every statement, so that a reader can check it: the title, the author, the year, the chapter and the page.

Water boils at one hundred degrees at sea level and at a lower temperature on a mountain, because the air presses less
on it there. Ice floats because it is lighter than the water it came from. Salt lowers the freezing point, which is why
roads are salted in winter. Steam takes up far more room than water, and that is what drove the first engines.

To make bread, mix five hundred grams of flour with three hundred and fifty grams of water, ten grams of salt and a
little yeast. Knead the dough until it is smooth, let it rise for an hour in a warm place, shape it, let it rise again
and bake it in a hot oven for about forty minutes. Let it cool before you cut it, however hard that may be.

The train leaves at seven in the morning and arrives at noon. There are two changes, one in the valley and one by the
lake. If the first train is late, the second one waits for five minutes and no longer. Tickets are sold at the station,
on the platform and in the train; a return ticket is cheaper than two single ones, and children travel for half price.

A computer program is a list of instructions, and a queue is a list of people or programs that wait. The shortest
queue is not always the fastest one: it depends on what those in front of you want to buy. A good dispatcher looks at
the work that is left rather than at the number of heads, and sends each customer where the wait will be the shortest.

When the user asks a question, the assistant answers it in plain words. The system tells the assistant how to behave:
be brief, be correct, say when you do not know, and never invent a source. Then the user thanks the assistant, or asks
the next question, and the conversation goes on until one of them has nothing more to say.

Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday are the seven days of the week. January, February,
March, April, May, June, July, August, September, October, November and December are the twelve months of the year.
Zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, twenty, thirty, hundred, thousand.
Red, orange, yellow, green, blue, indigo and violet are the colours of the rainbow; black and white are not among them.

def add(first: int, second: int) -> int:
    return first + second

{"name": "search", "arguments": {"query": "the height of the tide", "limit": 3}}
"""


def is_complete(path: Path) -> bool:
    """Return whether a finished model lies in `path`: it gets its name only once it is whole."""
    return (path / "config.json").is_file() and (path / "model.safetensors").is_file()


def write(path: Path, *, seed: int = 0, lora: bool = False) -> Path:
    """Write the model into the folder `path`, unless it is there already.

    Args:
        path: The model's folder. Written beside its place and renamed, so nobody ever sees half a model.
        seed: Of the weights.
        lora: Also write an adapter with random weights into `path/lora`. Added to a model that lacks one.

    Returns:
        `path`.
    """
    if not is_complete(path):
        _atomically(path, lambda folder: _write_model(folder, seed))
    if lora and not (path / LORA_FOLDER / "adapter_model.safetensors").is_file():
        _atomically(path / LORA_FOLDER, lambda folder: _write_lora(folder, seed))
    return path


def _atomically(path: Path, fill: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        fill(folder)
        folder.chmod(0o755)  # mkdtemp and safetensors write for the owner alone
        for file in folder.iterdir():
            file.chmod(0o644)
        if path.exists():  # half a model, written by hand or by something else
            shutil.rmtree(path)
        os.rename(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_model(folder: Path, seed: int) -> None:
    """Write every file by hand: no torch, no transformers, so it takes a second and no release of theirs changes it."""
    from safetensors.numpy import save_file

    _write_tokenizer(folder)
    ids = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    ends = {"eos_token_id": ids[END_OF_TURN], "pad_token_id": ids[END_OF_TEXT]}
    _write_json(folder / "config.json", {**CONFIG, **ends})
    _write_json(folder / "generation_config.json", {**ends, "eos_token_id": [ids[END_OF_TURN], ids[END_OF_TEXT]]})
    save_file(_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})


def _weights(seed: int) -> dict[str, numpy.ndarray]:
    """Draw the weights, wide enough that what comes out depends on what went in."""
    import numpy

    rng = numpy.random.default_rng(seed)

    def normal(out: int, into: int) -> numpy.ndarray:
        return (rng.standard_normal((out, into)) * WEIGHT_SCALE).astype(numpy.float32)

    def ones() -> numpy.ndarray:
        return numpy.ones(HIDDEN, numpy.float32)

    weights = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "model.norm.weight": ones()}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, out in PROJECTIONS.items():
            weights[f"{prefix}.self_attn.{name}.weight"] = normal(out, HIDDEN)
        weights[f"{prefix}.self_attn.o_proj.weight"] = normal(HIDDEN, HIDDEN)
        weights[f"{prefix}.mlp.gate_proj.weight"] = normal(INTERMEDIATE, HIDDEN)
        weights[f"{prefix}.mlp.up_proj.weight"] = normal(INTERMEDIATE, HIDDEN)
        weights[f"{prefix}.mlp.down_proj.weight"] = normal(HIDDEN, INTERMEDIATE)
        weights[f"{prefix}.input_layernorm.weight"] = ones()
        weights[f"{prefix}.post_attention_layernorm.weight"] = ones()
    return weights


def _write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE: any text can be encoded and comes back the same."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[
            *(AddedToken(token, special=True) for token in SPECIAL_TOKENS),
            *(AddedToken(token, special=False) for token in MARKUP_TOKENS),
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT, _invented_words()], trainer)
    if bpe.get_vocab_size() != VOCABULARY:  # an id without a token would be a hole that decoding falls into
        raise RuntimeError(f"the tokenizer learned {bpe.get_vocab_size()} tokens instead of {VOCABULARY}")
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _invented_words() -> str:
    """Return words of one and two syllables: `TEXT` alone runs out of merges before the vocabulary is full."""
    syllables = ["".join(letters) for letters in itertools.product("bdfghklmnprstvwz", "aeiou", "lmnrst")]
    return " ".join(syllables + [first + second for first, second in itertools.pairwise(syllables)])


def _write_lora(folder: Path, seed: int) -> None:
    """Write an adapter for the attention's projections, strong enough to change what comes out."""
    import numpy
    from safetensors.numpy import save_file

    rng = numpy.random.default_rng(seed + 1)

    def normal(out: int, into: int) -> numpy.ndarray:
        return (rng.standard_normal((out, into)) * WEIGHT_SCALE).astype(numpy.float32)

    weights = {}
    for layer in range(LAYERS):
        for name, out in PROJECTIONS.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = normal(LORA_RANK, HIDDEN)
            weights[f"{prefix}.lora_B.weight"] = normal(out, LORA_RANK)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": LORA_RANK,
        "lora_alpha": 2 * LORA_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(PROJECTIONS),
    }
    _write_json(folder / "adapter_config.json", adapter)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Write the model from the command line."""
    parser = argparse.ArgumentParser(description="Write a tiny model with random weights. It answers gibberish.")
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_PATH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true", help="also write a random LoRA adapter into FOLDER/lora")
    options = parser.parse_args(arguments)
    print(write(options.folder, seed=options.seed, lora=options.lora))
    return 0


if __name__ == "__main__":
    sys.exit(main())
