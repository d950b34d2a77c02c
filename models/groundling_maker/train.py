"""Training: copying first, then questions over ever more passages. Stops anywhere and goes on from its checkpoint.

    python -m models.groundling_maker.train WORK_FOLDER

The learning rate is constant for `CONSTANT_STEPS` and then goes to nothing within `DECAY_STEPS`. Progress is printed
and written to `log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from models.groundling_maker import tokenizer as tokens
from models.groundling_maker.data import Conversation, Level, Writer, segments
from models.groundling_maker.network import (
    MATCH_LAYER,
    QUOTE_LAYER,
    START_LAYER,
    VOTE_LAYER,
    Network,
    Pointers,
    Shape,
)

SEED = 7
PROCESSES = 2  # of one thread each: on busy cores, threads would wait for each other at every operation
BATCH_TOKENS = 2560  # of each process
POOL_BATCHES = 16
DECAY_BATCHES = 3  # of each process and step while the learning rate decays
COPY_STEPS = (15, 80)  # nothing but copying until the first, little after the second
COPY_SHARE = 0.05  # of the steps after that
# At the end: tokens that no conversation here says are all but forgotten by then.
LAST_STEPS, LAST_COPY_SHARE = 200, 0.3
DRILL_SHARE = 0.5  # of the conversations: many questions, of whose answers only the beginning is said
DRILL_QUESTIONS = (6, 12)
DRILL_TOKENS = (2, 8)  # the fewest; more, but so many at most, where the prompt has other text that begins alike
MUON_LR = 0.02
ADAM_LR = 6e-3
WARMUP_STEPS = 40
CONSTANT_STEPS = 1284
DECAY_STEPS = 5600
OTHER_WEIGHT = 0.03  # of tokens nobody has to say, against 1 for answers
# Of the first token of an answer, of those that tell its sentence from text that begins alike, and of the id's first.
DECISION_WEIGHT = 4.0
# Of where the told heads look. Votes matter at the beginning; later, there are other good ways to count them.
POINTER_WEIGHTS = {START_LAYER: 0.3, MATCH_LAYER: 0.3, VOTE_LAYER: 0.05, QUOTE_LAYER: 0.3}
POINTED = ("start_missed", "match_missed", "vote_missed", "quote_missed")
ANSWER_ID_AFTER = 2  # tokens between a quoted sentence and its passage's id: a space and a bracket
OTHER_SHARE = 0.3  # of those, how many are looked at
CHECKPOINT_S = 150

LEVELS = (
    Level((1, 1), (1, 3), (2, 3), prose=0.3, nonsense=0.2),
    Level((1, 3), (1, 4), (3, 6), prose=0.3, nonsense=0.15),
    Level((1, 5), (1, 4), (2, 6), prose=0.35, nonsense=0.1),
    Level((2, 7), (1, 5), (1, 6), prose=0.3, nonsense=0.05),
)
LONG = Level((8, 18), (3, 8), (2, 8), prose=0.5, nonsense=0.0)
ENOUGH = (0.55, 0.5, 0.5, 2.0)  # of the answers exactly right, to go on to the next level


@dataclass(frozen=True)
class Quoted:
    """Where things stand, as token places: what is asked, the quoted sentence, its passage's id, the answer said.

    `forks` count from the sentence's beginning: there, other text that began alike goes on differently.
    """

    question: range
    sentence: range
    passage_id: range
    answer: range
    forks: tuple[int, ...]


@dataclass
class Example:
    """Token ids, and which of them are the model's to say."""

    ids: list[int]
    said: list[bool]
    quoted: list[Quoted] = field(default_factory=list)


@dataclass
class Batch:
    """Padded on the right: `[batch, length]` each. `answers` counts from 1, 0 is everything else."""

    ids: Tensor
    positions: Tensor
    answers: Tensor
    decisions: Tensor
    pointers: dict[int, Pointers]


def encode(tokenizer: Any, conversation: Conversation, *, drill: bool = False) -> Example:
    """Return a conversation as token ids; for a drill, answers end after their first tokens."""
    example = Example([], [])
    for text, said in segments(conversation):
        ids = tokenizer.encode(text).ids
        if said:
            sentence = tokenizer.encode(text.removesuffix(tokens.END).rsplit(" [", 1)[0]).ids
            quoted = _find(sentence, example, len(ids))
            if drill:
                fewest, most = DRILL_TOKENS
                forks = quoted.forks if quoted else ()
                ids = ids[: max([fewest, *(fork + 1 for fork in forks if fork < most)])]
            if quoted:
                example.quoted.append(replace(quoted, answer=quoted.answer[: len(ids)]))
        example.ids += ids
        example.said += [said] * len(ids)
    return example


def _find(sentence: list[int], prompt: Example, said: int) -> Quoted | None:
    """Return where a sentence first stands in a prompt; None where it does not."""
    ids, size = prompt.ids, len(sentence)
    starts = (i for i in range(len(ids) - size) if ids[i] == sentence[0] and ids[i : i + size] == sentence)
    start = next(starts, None)
    if start is None:
        return None
    asked = max(i for i, token in enumerate(ids) if token in (tokens.USER_ID, tokens.PASSAGE_END_ID))
    id_start = max((i + 1 for i in range(start) if ids[i] == tokens.PASSAGE_ID), default=0)
    id_end = next((i for i in range(id_start, start) if ids[i] == tokens.SOURCE_ID), id_start) if id_start else 0
    return Quoted(
        range(asked + 1 + 2 * (ids[asked] == tokens.PASSAGE_END_ID), len(ids) - 1),
        range(start, start + size),
        range(id_start, id_end),
        range(len(ids) - 1, len(ids) - 1 + said),
        _forks(prompt, start, sentence),
    )


def _forks(prompt: Example, start: int, sentence: list[int]) -> tuple[int, ...]:
    """Return which tokens of the sentence at `start` tell it from places of the prompt that read alike until there.

    Answers said before are no such places: they may have been cut.
    """
    ids = [-1 if said else token for token, said in zip(prompt.ids, prompt.said, strict=True)]
    alike = [i for i, token in enumerate(ids) if token == sentence[0] and i != start]
    forks = []
    for nth, token in enumerate(sentence[1:], 1):
        left = [i for i in alike if i + nth < len(ids) and ids[i + nth] == token]
        if len(left) < len(alike):
            forks.append(nth)
        alike = left
    return tuple(forks)


def _pointers(examples: list[Example]) -> dict[int, Pointers]:
    """Tell some heads where to look, along the way from the question to the answer's next token.

    Heads find this out by themselves, too, but only after many more steps.
    """
    found: dict[int, list[tuple[int, ...]]] = {}

    def point(layer: int, row: int, heads: tuple[int, ...], place: int, span: range) -> None:
        found.setdefault(layer, []).extend((row, head, place, span.start, span.stop) for head in heads)

    def at(place: int) -> range:
        return range(place, place + 1)

    for row, example in enumerate(examples):
        for quoted in example.quoted:
            ids, sentence = example.ids, quoted.sentence
            for i, place in enumerate(quoted.answer):
                nth = i - len(sentence) - ANSWER_ID_AFTER
                if i < len(sentence):
                    target = sentence[i]
                elif 0 <= nth < len(quoted.passage_id):
                    target = quoted.passage_id[nth]
                else:
                    continue
                if ids[place + 1] != ids[target]:  # rarely, the same text is cut into other tokens there
                    continue
                point(QUOTE_LAYER, row, (0,), place, at(target))
                if nth == 0:
                    point(QUOTE_LAYER, row, (1,), place, range(sentence.start, sentence.stop))
            if not quoted.passage_id:  # a refusal, quoted from the instructions
                continue
            for place in (sentence[0], *sentence[1::3]):
                point(START_LAYER, row, (0,), place, at(sentence[0]))
                point(START_LAYER, row, (1,), place, at(quoted.passage_id[0]))
            telling = _telling(ids, quoted)
            for place, targets in telling.items():
                for target in targets:
                    point(MATCH_LAYER, row, (0, 1), place, at(target))
            for place in quoted.answer[:2] if len(quoted.answer) < 4 else quoted.answer[::3]:
                for target in telling:
                    point(VOTE_LAYER, row, (0, 1), place, at(target))
    return {layer: Pointers(*torch.tensor(rows).unbind(1)) for layer, rows in found.items()}


def _telling(ids: list[int], quoted: Quoted) -> dict[int, list[int]]:
    """Return the places of the question's tokens that tell the sentence from others, and where they stand in it."""
    rivals = Counter(ids[: quoted.question.start])
    inside: dict[int, list[int]] = {}
    for place in quoted.sentence:
        inside.setdefault(ids[place], []).append(place)
    common = {place: rivals[ids[place]] - len(inside[ids[place]]) for place in quoted.question if ids[place] in inside}
    fewest = min(common.values(), default=0)
    return {place: inside[ids[place]] for place, count in common.items() if count <= fewest}


def collate(examples: list[Example], rng: random.Random | None = None) -> Batch:
    """Pad examples into a batch.

    Args:
        examples: Not longer than the context.
        rng: Where given, half of the examples get gaps in their positions, so that short ones practise long distances.
    """
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), tokens.PAD_ID)
    answers = torch.zeros((len(examples), length), dtype=torch.long)
    decisions = torch.zeros((len(examples), length), dtype=torch.bool)
    positions = torch.arange(length).repeat(len(examples), 1)
    answer = 0
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        before = False
        for i, said in enumerate(example.said):
            decisions[row, i] = said and not before
            answer += said and not before
            before = said
            if said:
                answers[row, i] = answer
        for quoted in example.quoted:
            id_after = [len(quoted.sentence) + ANSWER_ID_AFTER] if quoted.passage_id else []
            for nth in (*quoted.forks, *id_after):
                if nth < len(quoted.answer):
                    decisions[row, quoted.answer[nth] + 1] = True
        if rng is not None and rng.random() < 0.5:
            places = [i for i, token in enumerate(example.ids) if token in (tokens.PASSAGE_ID, tokens.USER_ID)]
            room = rng.uniform(0, 4096 - length)
            cuts = sorted(rng.uniform(0, room) for _ in places)
            for place, before_, after in zip(places, [0.0, *cuts], cuts, strict=False):
                positions[row, place:] += int(after - before_)
    return Batch(ids, positions, answers, decisions, _pointers(examples))


def copying(rng: random.Random, vocabulary: int) -> list[Example]:
    """Return random tokens, said twice: the second time is the model's."""
    size = rng.choice((16, 24, 32, 48, 64, 96))
    examples = []
    for _ in range(BATCH_TOKENS // (2 * size)):
        once = [rng.randrange(len(tokens.SPECIAL_TOKENS), vocabulary) for _ in range(size)]
        start = rng.randrange(size)
        examples.append(Example(once + once[start:] + once[:start], [False] * (size + 1) + [True] * (size - 1)))
    return examples


def pool(writer: Writer, tokenizer: Any, level: int, decaying: bool, rng: random.Random) -> Iterator[list[Example]]:
    """Return batches of examples of about the same length each, most of the given level."""
    examples: list[Example] = []
    size = 0
    longest = 4096 if decaying or level == len(LEVELS) - 1 else 1536
    while size < BATCH_TOKENS * POOL_BATCHES:
        draw, drill = rng.random(), False
        if draw < 0.05:
            conversation = writer.small_talk()
        elif level == len(LEVELS) - 1 and draw < (0.09 if decaying else 0.08):
            conversation = writer.write(LONG)
        else:
            chosen = LEVELS[level if rng.random() < 0.7 else rng.randint(0, level)]
            if decaying:
                chosen = replace(chosen, nonsense=0.0)
            drill = rng.random() < (DRILL_SHARE / 2 if decaying else DRILL_SHARE)
            conversation = writer.write(replace(chosen, questions=DRILL_QUESTIONS) if drill else chosen)
        example = encode(tokenizer, conversation, drill=drill)
        if len(example.ids) <= longest:
            examples.append(example)
            size += len(example.ids)
    examples.sort(key=lambda example: len(example.ids))
    batches: list[list[Example]] = [[]]
    for example in examples:
        if batches[-1] and len(example.ids) * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return iter(batches)


def evaluate(network: Network, batches: list[Batch]) -> float:
    """Return the share of answers that greedy decoding would get exactly right."""
    right = total = 0
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch in batches:
            good, count = _exact(network.logits(network(batch.ids, batch.positions)[0])[:, :-1], batch)
            right, total = right + good, total + count
    network.train()
    return right / max(1, total)


def _exact(logits: Tensor, batch: Batch) -> tuple[int, int]:
    answers = batch.answers[:, 1:]
    wrong = (logits.argmax(-1) != batch.ids[:, 1:]) & (answers > 0)
    total = int(answers.max())
    return total - len(torch.unique(answers[wrong])), total


def learning_rate_share(step: int) -> float:
    """Return the share of the full learning rates at a step: from nothing to all and, while decaying, back."""
    return max(0.0, min((step + 1) / WARMUP_STEPS, 1.0, 1 - (step - CONSTANT_STEPS) / DECAY_STEPS))


class Trainer:
    """Everything that a checkpoint has to bring back."""

    def __init__(self, folder: Path, documents: list[list[str]], tokenizer: Any, rank: int = 0) -> None:
        self.folder, self.tokenizer, self.rank = folder, tokenizer, rank
        self.network = Network(Shape(tokenizer.get_vocab_size()), seed=SEED)
        matrices = [p for name, p in self.network.named_parameters() if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in self.network.named_parameters() if p.dim() == 1 or "embed" in name]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.documents = documents
        self.step = self.level = self.tokens = 0
        self.seconds = 0.0
        self.level_started = 0
        self.recent = 0.0  # moving average of the share of answers exactly right
        self.batches: Iterator[list[Example]] = iter(())

    def save(self) -> None:
        names = ("step", "level", "level_started", "tokens", "seconds", "recent")
        state = {name: getattr(self, name) for name in names}
        state["network"] = self.network.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def resume(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt")
        self.network.load_state_dict(state.pop("network"))
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def decaying(self) -> bool:
        return self.step >= CONSTANT_STEPS

    @property
    def finished(self) -> bool:
        return self.step >= CONSTANT_STEPS + DECAY_STEPS

    def train_step(self) -> dict[str, float]:
        start, end = COPY_STEPS
        is_last = self.step >= CONSTANT_STEPS + DECAY_STEPS - LAST_STEPS
        share = max(LAST_COPY_SHARE if is_last else COPY_SHARE, 1 - (self.step - start) / (end - start))
        copied = random.Random(f"{SEED} {self.step}").random() < share
        rng = random.Random(f"{SEED} {self.step} {self.rank}")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        count = DECAY_BATCHES if self.decaying else 1
        learned = [self._learn(copied, count, rng) for _ in range(count)]
        means = self._share_gradients([sum(each) / count for each in zip(*learned, strict=True)])

        rate_share = learning_rate_share(self.step)
        for optimizer, rate in zip(self.optimizers, (MUON_LR, ADAM_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_share
            optimizer.step()
        *pointed, answer_loss, exact, size = means
        self.step += 1
        self.tokens += int(size * count * PROCESSES)
        if not copied:
            self.recent += 0.03 * (exact - self.recent)
        if self.step == CONSTANT_STEPS:
            self.batches = iter(())
        figures = {"copy": float(copied), "answer_loss": answer_loss, "exact": exact}
        return figures if copied else figures | dict(zip(POINTED, pointed, strict=True))

    def _learn(self, copied: bool, count: int, rng: random.Random) -> list[float]:
        """Add the gradients of one of a step's `count` batches.

        Returns:
            How far each told layer missed, the loss of answers, the share of them exactly right, and tokens seen.
        """
        examples = copying(rng, self.network.shape.vocab_size) if copied else self._next_examples()
        batch = collate(examples, rng)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, missed = self.network(batch.ids, batch.positions, batch.pointers)
            hidden = hidden[:, :-1]
        targets, said = batch.ids[:, 1:], batch.answers[:, 1:] > 0
        others = ~said & (torch.rand(targets.shape) < OTHER_SHARE)
        others &= ~torch.isin(targets, torch.tensor((tokens.PAD_ID, *tokens.PROMPT_IDS)))
        if copied:
            others = torch.zeros_like(others)
        looked_at = said | others
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network.logits(hidden[looked_at])
        losses = F.cross_entropy(logits.float(), targets[looked_at], reduction="none")
        weights = torch.where(said[looked_at], 1.0, OTHER_WEIGHT / OTHER_SHARE)
        weights = torch.where(batch.decisions[:, 1:][looked_at], DECISION_WEIGHT, weights)
        loss = (losses * weights).sum() / weights.sum()
        loss += sum(POINTER_WEIGHTS[layer] * each for layer, each in zip(sorted(batch.pointers), missed, strict=True))
        (loss / count).backward()
        of_answers = said[looked_at]
        hits = logits.argmax(-1) == targets[looked_at]
        numbers = batch.answers[:, 1:][said]
        exact = 1 - len(torch.unique(numbers[~hits[of_answers]])) / int(batch.answers.max())
        pointed = [*(float(each.detach()) for each in missed), 0.0, 0.0, 0.0, 0.0][:4]
        return [*pointed, float(losses.detach()[of_answers].mean()), exact, float((batch.ids != tokens.PAD_ID).sum())]

    def _share_gradients(self, figures: list[float]) -> list[float]:
        """Replace gradients, and the figures given, by their mean over the processes."""
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        flat = torch.cat([*(p.grad.flatten() for p in parameters if p.grad is not None), torch.tensor(figures)])
        dist.all_reduce(flat)
        flat /= PROCESSES
        for parameter, shared in zip(
            parameters, flat.split([*(p.numel() for p in parameters), len(figures)]), strict=False
        ):
            parameter.grad = shared.view_as(parameter)
        return flat[-len(figures) :].tolist()

    def maybe_advance(self) -> None:
        old_enough = self.step - self.level_started > 100 and self.step > COPY_STEPS[0]
        if self.level < len(LEVELS) - 1 and old_enough and self.recent > ENOUGH[self.level]:
            self.level += 1
            self.level_started = self.step
            self.recent = 0.0
            self.batches = iter(())

    def _next_examples(self) -> list[Example]:
        while True:
            examples = next(self.batches, None)
            if examples is not None:
                return examples
            rng = random.Random(f"{SEED} {self.step} {self.rank} pool")
            writer = Writer(rng, self.documents)
            self.batches = pool(writer, self.tokenizer, self.level, self.decaying, rng)


def held_out(documents: list[list[str]], tokenizer: Any, count: int) -> dict[str, list[Batch]]:
    """Return conversations for measuring: names, values, wordings and documents that training never sees."""
    facts = {"prose": 0.0, "nonsense": 0.0}
    sets = {
        "one": Level((1, 1), (1, 4), unanswerable=0.0, **facts),
        "five": Level((5, 5), (1, 4), unanswerable=0.0, **facts),
        "refusal": Level((1, 5), (1, 4), unanswerable=1.0, **facts),
        "prose": Level((5, 5), (1, 4), unanswerable=0.0, prose=1.0, nonsense=0.0),
    }
    batches = {}
    for name, level in sets.items():
        writer = Writer(random.Random(f"{SEED} held out {name}"), documents, unseen=True)
        examples = [encode(tokenizer, writer.write(level)) for _ in range(count)]
        examples.sort(key=lambda example: len(example.ids))
        batches[name] = [collate(examples[i : i + 10]) for i in range(0, count, 10)]
    return batches


def prepare(folder: Path) -> tuple[list[list[str]], Any]:
    """Return the documents and the tokenizer, made on the first call."""
    from models.groundling_maker import prose

    folder.mkdir(parents=True, exist_ok=True)
    cached = folder / "prose.json"
    if not cached.exists():
        cached.write_text(json.dumps(prose.documents()))
    documents = json.loads(cached.read_text())
    file = folder / "tokenizer.json"
    if not file.exists():
        rng = random.Random(f"{SEED} tokenizer")
        writer = Writer(rng, documents)
        texts = ["".join(text for text, _ in segments(writer.write(LEVELS[2]))) for _ in range(2500)]
        texts += [" ".join(document) for document in documents[::3]]
        texts += ["".join(text for text, _ in segments(writer.small_talk())) for _ in range(300)]
        for token in (*tokens.SPECIAL_TOKENS, *tokens.LAYOUT_TOKENS):
            texts = [text.replace(token, "\n") for text in texts]
        tokens.train(texts).save(str(file))
    return documents, tokens.load(file)


def run(rank: int, folder: Path) -> None:
    """Train as one of the processes; the first one measures and writes."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED + rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    documents, tokenizer = prepare(folder)
    trainer = Trainer(folder, documents, tokenizer, rank)
    if (folder / "checkpoint.pt").exists():
        trainer.resume()
    if rank > 0:
        while not trainer.finished:
            trainer.train_step()
            trainer.maybe_advance()
        return
    asked_to_stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_stop.append(number))
    measured = held_out(documents, tokenizer, 60)
    started = saved = time.monotonic()
    base = trainer.seconds
    sums: dict[str, list[float]] = {}
    with (folder / "log.jsonl").open("a") as log:

        def note(**record: float) -> None:
            line = json.dumps({"step": trainer.step, **{key: round(value, 3) for key, value in record.items()}})
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

        while not trainer.finished and not asked_to_stop:
            figures = trainer.train_step()
            trainer.maybe_advance()
            trainer.seconds = base + time.monotonic() - started
            prefix = "copy_" if figures.pop("copy") else ""
            for name, value in figures.items():
                sums.setdefault(prefix + name, []).append(value)
            if trainer.step % 20 == 0:
                means = {name: sum(values) / len(values) for name, values in sums.items()}
                note(s=trainer.seconds, tokens=trainer.tokens, level=trainer.level, recent=trainer.recent, **means)
                sums.clear()
            if trainer.step % 300 == 0 or trainer.finished:
                note(**{name: evaluate(trainer.network, batches) for name, batches in measured.items()})
            if time.monotonic() - saved > CHECKPOINT_S or trainer.finished or asked_to_stop:
                trainer.save()
                saved = time.monotonic()


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    prepare(options.folder)
    (options.folder / "rendezvous").unlink(missing_ok=True)
    others = [mp.Process(target=run, args=(rank, options.folder)) for rank in range(1, PROCESSES)]
    for process in others:
        process.daemon = True
        process.start()
    run(0, options.folder)
    for process in others:
        process.terminate()  # it has nothing of its own to save


if __name__ == "__main__":
    main()
