"""Measure the model through vLLM, on what was held out from its training.

    python -m models.groundling_maker.evaluate WORK_FOLDER [--model FOLDER] [--count 200]

Greedy, float32, on CPU, in the prompts that `deployments/grounding/layout.py` lays out. Prints a table, then one line
of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deployments.grounding.layout import MARKER, REFUSAL, Passage, lay_out
from models.groundling_maker.data import GREETING, Conversation, Level, Writer
from models.groundling_maker.export import MODEL
from models.groundling_maker.questions import PASSAGES, QUESTIONS
from models.groundling_maker.train import SEED, prepare

ANSWERABLE = {"unanswerable": 0.0, "prose": 0.0, "nonsense": 0.0}
SETS = {
    "1 passage": Level((1, 1), (1, 4), **ANSWERABLE),
    "5 passages": Level((5, 5), (1, 4), **ANSWERABLE),
    "10 passages": Level((10, 10), (2, 5), **ANSWERABLE),
    "5 passages of prose": Level((5, 5), (1, 4), unanswerable=0.0, prose=1.0, nonsense=0.0),
}
UNANSWERABLE = Level((1, 5), (1, 4), unanswerable=1.0, prose=0.0, nonsense=0.0)

MAX_TOKENS = 120

Generate = Callable[[list[Conversation]], list[str]]


@dataclass(frozen=True)
class Figures:
    """Shares of the answers: the whole of it exact, the quote without the citation, the citation; mistaken refusals."""

    exact: float
    quote: float
    citation: float
    refused: float


def compare(expected: list[Conversation], answers: list[str]) -> Figures:
    """Compare what should have been said with what was."""
    count = len(expected)
    pairs = [(conversation.answer, answer.strip()) for conversation, answer in zip(expected, answers, strict=True)]
    return Figures(
        exact=sum(right == answer for right, answer in pairs) / count,
        quote=sum(MARKER.sub("", right) == MARKER.sub("", answer) for right, answer in pairs) / count,
        citation=sum(MARKER.findall(right) == MARKER.findall(answer) for right, answer in pairs) / count,
        refused=sum(answer == REFUSAL for _, answer in pairs) / count,
    )


def by_hand() -> tuple[list[Conversation], list[tuple[str, str]]]:
    """Return the questions about the project's documents, and for each the words and the marker that are right."""
    names = list(PASSAGES)
    conversations, right = [], []
    for i, (question, name, contains) in enumerate(QUESTIONS):
        others = [other for other in names if other != name]
        random.Random(f"{SEED} by hand {i}").shuffle(others)
        passages = [
            Passage(PASSAGES[each][0], PASSAGES[each][0], names.index(each), PASSAGES[each][1])
            for each in (name, *others[:4])
        ]
        layout = lay_out([{"role": "user", "content": question}], passages, 1 << 30, len)
        marker = next(id_ for id_, passage in layout.ids.items() if passage is passages[0])
        conversations.append(Conversation(layout.messages, ""))
        right.append((contains, marker))
    return conversations, right


def vllm_generator(model: Path) -> Generate:
    """Return a function that answers conversations with a vLLM engine in this process."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams

    engine = LLM(str(model), dtype="float32", max_model_len=4096, enforce_eager=True, max_num_seqs=32)
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)

    def generate(conversations: list[Conversation]) -> list[str]:
        outputs = engine.chat([c.messages for c in conversations], sampling, use_tqdm=False)  # type: ignore[arg-type]
        return [output.outputs[0].text for output in outputs]

    return generate


def transformers_generator(model: Path) -> Generate:
    """Return the same without vLLM, for machines that have no room for an engine."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")

    def generate(conversations: list[Conversation]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(conversations), 20):
            prompts = [
                tokenizer.apply_chat_template(c.messages, tokenize=False, add_generation_prompt=True)
                for c in conversations[start : start + 20]
            ]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
            outputs = network.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False, temperature=None)
            said = outputs[:, inputs["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(said, skip_special_tokens=True)
        return answers

    return generate


def measure(documents: list[list[str]], generate: Generate, count: int) -> dict[str, float]:
    """Return all figures by name, and print them with a few answers."""
    figures: dict[str, float] = {}
    for name, level in SETS.items():
        writer = Writer(random.Random(f"{SEED} evaluation {name}"), documents, unseen=True)
        conversations = [writer.write(level) for _ in range(count)]
        answers = generate(conversations)
        result = compare(conversations, answers)
        print(
            f"{name:22} exact {result.exact:6.1%}  quote {result.quote:6.1%}  citation {result.citation:6.1%}  "
            f"refused {result.refused:6.1%}"
        )
        figures |= {f"{name}, {key}": value for key, value in vars(result).items()}
        wrong = [(c, a) for c, a in zip(conversations, answers, strict=True) if a.strip() != c.answer]
        for conversation, answer in wrong[:3]:
            question = conversation.messages[-1]["content"].rsplit("\n\n", 1)[1]
            print(f"    {question}\n      right: {conversation.answer}\n      said:  {answer}")
    writer = Writer(random.Random(f"{SEED} evaluation refusal"), documents, unseen=True)
    conversations = [writer.write(UNANSWERABLE) for _ in range(count)]
    figures["refusal"] = compare(conversations, generate(conversations)).exact
    print(f"{'unanswerable':22} refused {figures['refusal']:6.1%}")

    conversations, right = by_hand()
    answers = generate(conversations)
    found = [
        contains in " ".join(answer.split()) and answer != REFUSAL
        for (contains, _), answer in zip(right, answers, strict=True)
    ]
    cited = [MARKER.findall(answer) == [marker] for (_, marker), answer in zip(right, answers, strict=True)]
    figures["by hand, found"], figures["by hand, cited"] = sum(found), sum(cited)
    print(f"{'by hand':22} found {sum(found)} and cited {sum(cited)} of {len(right)}")
    for (question, _, _), answer, good in zip(QUESTIONS, answers, found, strict=True):
        print(f"  {'+' if good else '-'} {question}\n      {answer}")
    hello = generate([Conversation([{"role": "user", "content": "Hello!"}], GREETING)])[0]
    figures["greeting"] = float(hello == GREETING)
    print(f"Hello!\n      {hello}")
    return figures


def main() -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--transformers", action="store_true", help="instead of vLLM")
    options = parser.parse_args()
    documents, _ = prepare(options.work)
    make = transformers_generator if options.transformers else vllm_generator
    print(json.dumps(measure(documents, make(options.model), options.count)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
