"""A byte-level BPE: any text can be encoded and comes back the same; a digit or a sign is always a token of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deployments.grounding.layout import NO_PASSAGES

VOCABULARY = 3072

PAD, SYSTEM, USER, ASSISTANT, END = "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, SYSTEM, USER, ASSISTANT, END)
# Ordinary text that is one token each, since every prompt is full of it.
LAYOUT_TOKENS = ('<passage id="', '" source="', '">\n', "\n</passage>")
PAD_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID, END_ID, PASSAGE_ID, SOURCE_ID, _HEAD_END_ID, PASSAGE_END_ID = range(9)
PROMPT_IDS = (SYSTEM_ID, USER_ID, ASSISTANT_ID, PASSAGE_ID, SOURCE_ID, _HEAD_END_ID, PASSAGE_END_ID)
"""Tokens that prompts are made of, and no answer."""

# A space is part of the lower-case word behind it and of nothing else: so a sentence, a name or a sign is the same
# tokens at the beginning of an answer as in the middle of a line.
_WORDS = r" ?\p{Ll}+|\p{L}\p{Ll}*|\p{N}|[^\s\p{L}\p{N}]|\n| +(?= \p{Ll})| +|\s"

# `documents` are laid out as `deployments/grounding/layout.py` does it; their ids are the caller's.
CHAT_TEMPLATE = """
{%- set ns = namespace(question=-1) -%}
{%- for message in messages if message['role'] == 'user' -%}{%- set ns.question = ns.question + 1 -%}{%- endfor -%}
{%- set ns.last = ns.question -%}{%- set ns.question = -1 -%}
{%- for message in messages -%}
{{- '<|system|>' if message['role'] in ('system', 'developer') else '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'user' -%}
{%- set ns.question = ns.question + 1 -%}
{%- if documents is defined and documents is not none and ns.question == ns.last -%}
{%- for document in documents -%}
{{- '<passage id="' + document['id'] + '" source="' + (document['title'] or '') + '">\\n' -}}
{{- document['text'] + '\\n</passage>' + ('\\n\\n' if loop.last else '\\n') -}}
{%- else -%}{{- 'NO_PASSAGES\\n\\n' -}}
{%- endfor -%}
{%- endif -%}
{%- endif -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- elif message['content'] -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] + ('' if loop.last else '\\n') -}}
{%- endfor -%}
{%- endif -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
""".replace("NO_PASSAGES", NO_PASSAGES).strip()


def train(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Any:
    """Return a `tokenizers.Tokenizer` trained on `texts`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[
            *(AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS),
            *(AddedToken(token, special=False, normalized=False) for token in LAYOUT_TOKENS),
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocabulary:  # an id without a token would be a hole that decoding falls into
        raise RuntimeError(f"the tokenizer learned {bpe.get_vocab_size()} tokens instead of {vocabulary}")
    return bpe


def load(path: Path) -> Any:
    """Return the tokenizer saved in a file."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))
