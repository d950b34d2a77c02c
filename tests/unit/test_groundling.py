"""What the small model is taught, and that what ships is whole. Its answers are measured, and tested with vLLM."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from deployments.grounding.layout import MARKER, REFUSAL, Passage, lay_out
from models.groundling_maker import tokenizer as tokens
from models.groundling_maker.data import GREETING, Conversation, Level, Writer, segments
from models.groundling_maker.facts import MOST_ALIKE, Fact, FactWriter
from models.groundling_maker.network import BLOCK, CausalAttention, Network, Shape
from models.groundling_maker.questions import PASSAGES, QUESTIONS
from models.groundling_maker.train import (
    CONSTANT_STEPS,
    DECAY_STEPS,
    DRILL_TOKENS,
    WARMUP_STEPS,
    Example,
    _forks,
    collate,
    encode,
    learning_rate_share,
)
from models.groundling_maker.words import UNSEEN_ATTRIBUTES

MODEL = Path(__file__).parents[2] / "models" / "groundling"
DOCUMENTS = [
    [
        f"The {thing} number {i} stands beside the old mill.",
        f"Nobody has opened {thing} {i} since the flood.",
        "It rains.",
    ]
    for i in range(40)
    for thing in ("cabinet", "ladder", "kettle")
]
LEVEL = Level((1, 5), (1, 4), (1, 4))
needs_model = pytest.mark.skipif(
    not MODEL.is_dir(), reason="its weights are not here yet: models/groundling_maker makes them"
)


@pytest.fixture
def conversations() -> list[Conversation]:
    writer = Writer(random.Random(1), DOCUMENTS)
    return [writer.write(LEVEL) for _ in range(150)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    if not MODEL.is_dir():
        pytest.skip("its tokenizer is not here yet: models/groundling_maker makes it")
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def rust_tokenizer() -> Any:
    return tokens.load(MODEL / "tokenizer.json")


def test_every_answer_stands_word_for_word_in_the_passage_it_cites(conversations: list[Conversation]) -> None:
    quoted = 0
    for conversation in conversations:
        prompt = conversation.messages[-1]["content"]
        for answer in (conversation.answer, *(answer for _, answer in conversation.more)):
            if answer == REFUSAL:
                continue
            (marker,) = MARKER.findall(answer)
            passage = prompt.split(f'<passage id="{marker}"')[1].split("</passage>")[0]
            assert answer.removesuffix(f" [{marker}]") in passage
            quoted += 1
    assert quoted > 150


def test_half_of_the_worlds_say_all_in_few_wordings() -> None:
    few = 0
    for seed in range(100):
        facts, _ = FactWriter(random.Random(seed), lambda: "It rains.").world(12)
        few += len({_wording(fact) for fact in facts}) <= MOST_ALIKE
    assert 30 < few < 70


def _wording(fact: Fact) -> str:
    """Return a sentence without what it says: its entity, its attribute, its value, names and numbers."""
    said = "|".join(re.escape(each) for each in (fact.entity, fact.attribute, fact.value) if each)
    return re.sub(rf"(?i){said}|(?<!^)\b[A-Z]\w+|\d+", "_", fact.sentence)


def test_a_fork_is_where_text_that_began_alike_goes_on_differently() -> None:
    ids = [*(1, 2, 3, 4, 9), *(1, 2, 5, 6, 9), *(1, 7, 9)]
    prompt = Example(ids, [False] * len(ids))
    assert _forks(prompt, 5, ids[5:9]) == (1, 2)  # from the last one, then from the first
    assert _forks(prompt, 10, ids[10:12]) == (1,)
    assert _forks(Example([8, 9, *ids[10:]], [False] * 5), 0, [8, 9]) == ()
    prompt.said[10:12] = [True, True]
    assert _forks(prompt, 5, ids[5:9]) == (2,)


TOWN = ["The mayor of Brill is Anna Stone.", "The mayor of Brock is Otto Reed."]


def conversation(answers: list[str]) -> Conversation:
    passages = [Passage("f", "f.md", i, sentence) for i, sentence in enumerate(TOWN)]
    layout = lay_out([{"role": "user", "content": "Who?"}], passages, 1 << 30, len)
    markers = {passage.text: id_ for id_, passage in layout.ids.items()}
    said = [answer if answer == REFUSAL else f"{answer} [{markers[answer]}]" for answer in answers]
    return Conversation(layout.messages, said[0], [("And?", answer) for answer in said[1:]])


def spoken(example: Example, tokenizer: Any) -> list[str]:
    """Return the answers that are said, as text."""
    answers: list[list[int]] = []
    for i, (id_, said) in enumerate(zip(example.ids, example.said, strict=True)):
        if said:
            if not example.said[i - 1]:
                answers.append([])
            answers[-1].append(id_)
    return [tokenizer.decode(answer) for answer in answers]


@needs_model
def test_drills_go_as_far_as_sentences_are_alike_each_time_the_same(rust_tokenizer: Any) -> None:
    drill = encode(rust_tokenizer, conversation([TOWN[0], REFUSAL, TOWN[0], REFUSAL]), drill=True)
    first, refusal, *again = spoken(drill, rust_tokenizer)
    assert again == [first, refusal]
    assert len(rust_tokenizer.encode(refusal).ids) == DRILL_TOKENS[0]
    assert first.startswith("The mayor of") and "Br" in first and "Anna" not in first


@needs_model
def test_what_is_decided_is_which_sentence_and_whose(rust_tokenizer: Any) -> None:
    example = encode(rust_tokenizer, conversation([TOWN[0]]))
    (batch,) = collate([example]).decisions
    decided = [example.ids[i] for i in batch.nonzero().flatten().tolist()]
    (marker,) = MARKER.findall(spoken(example, rust_tokenizer)[0])
    texts = [rust_tokenizer.decode([id_]) for id_ in decided]
    assert texts[0] == "The" and texts[-1] == marker[0]
    assert len(texts) == 3 and texts[1].strip() and texts[1].strip() in "Brill"


def test_the_learning_rate_warms_up_and_decays_to_nothing() -> None:
    warming = [learning_rate_share(step) for step in range(WARMUP_STEPS)]
    assert 0 < warming[0] < 0.1 and warming == sorted(warming)
    assert warming[-1] == learning_rate_share(CONSTANT_STEPS) == 1.0
    assert learning_rate_share(CONSTANT_STEPS + DECAY_STEPS // 2) == 0.5
    assert (
        learning_rate_share(CONSTANT_STEPS + DECAY_STEPS)
        == learning_rate_share(2 * (CONSTANT_STEPS + DECAY_STEPS))
        == 0
    )


def test_some_questions_have_no_answer() -> None:
    writer = Writer(random.Random(1), DOCUMENTS)
    refused = sum(writer.write(LEVEL).answer == REFUSAL for _ in range(400))
    assert 55 < refused < 125


def test_the_same_seed_writes_the_same_conversations() -> None:
    first, second = (Writer(random.Random(3), DOCUMENTS) for _ in range(2))
    assert [first.write(LEVEL) for _ in range(20)] == [second.write(LEVEL) for _ in range(20)]


def test_evaluation_uses_other_documents_than_training() -> None:
    rng = random.Random(0)
    seen = Writer(rng, DOCUMENTS).documents
    unseen = Writer(rng, DOCUMENTS, unseen=True).documents
    assert unseen and not any(document in seen for document in unseen)


def test_what_is_kept_for_the_evaluation_is_in_no_sentence_of_the_training() -> None:
    writer = Writer(random.Random(4), [["It rains on the plain."]] * 40)
    facts = [fact for _ in range(2000) for fact in writer.facts.world(4)[0]]
    texts = [text for fact in facts for text in (fact.sentence, *fact.questions)]
    assert len(texts) > 20_000
    wordings = (
        "shipped",
        "teaches",
        "teaching",
        "holds",
        "fits into",
        "According to",
        "It was agreed that",
        "was given",
    )
    found = [text for text in texts if any(word in text for word in (*wordings, *UNSEEN_ATTRIBUTES[:2]))]
    assert found == []
    attributes = {fact.attribute for fact in facts}
    assert not attributes & set(UNSEEN_ATTRIBUTES)
    seen = {name[:2] for name in (writer.words.name().lower() for _ in range(5000)) if name[1] not in "aeiou"}
    assert not seen & {"bl", "cr", "gl", "sk", "sl", "sp", "sw", "tw", "wh"}


def test_each_question_written_by_hand_has_its_answer_in_its_passage_and_in_no_other() -> None:
    for question, name, contains in QUESTIONS:
        assert contains in PASSAGES[name][1], question
    assert len(QUESTIONS) == 20


@needs_model
def test_the_model_is_small_enough_for_the_repository() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 25_000_000
    config = json.loads((MODEL / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("qwen3", 4096)


@needs_model
def test_what_only_prompts_have_cannot_be_said() -> None:
    from safetensors import safe_open

    with safe_open(str(MODEL / "model.safetensors"), framework="pt") as weights:
        strength = weights.get_tensor("lm_head.weight").float().norm(dim=1)
    assert [i for i, each in enumerate(strength.tolist()) if each == 0] == [tokens.PAD_ID, *tokens.PROMPT_IDS]


def test_the_chat_template_writes_what_the_model_was_trained_on(
    tokenizer: Any, conversations: list[Conversation]
) -> None:
    for conversation in conversations[:30]:
        trained = "".join(text for text, said in segments(conversation) if not said).split(tokens.ASSISTANT)[0]
        rendered = tokenizer.apply_chat_template(conversation.messages, tokenize=False, add_generation_prompt=True)
        if not any(message["role"] == "assistant" for message in conversation.messages):
            assert rendered == trained + tokens.ASSISTANT


def test_documents_in_the_chat_template_look_like_the_layout(tokenizer: Any) -> None:
    passages = [
        Passage("file-1", "handbook.md", i, text) for i, text in enumerate(("The code is 4471.", "Ring twice."))
    ]
    layout = lay_out([{"role": "user", "content": "What is the code?"}], passages, 1 << 30, len)
    documents = [{"id": id_, "title": p.filename, "text": p.text} for id_, p in layout.ids.items()]
    question = [layout.messages[0], {"role": "user", "content": "What is the code?"}]
    assert tokenizer.apply_chat_template(question, documents=documents, tokenize=False) == (
        tokenizer.apply_chat_template(layout.messages, tokenize=False)
    )


@pytest.mark.parametrize(
    "text", [GREETING, 'a "b" <passage> 12.5 °C\n\n\tdef f(x): return x  # ok', "Grüße, 日本語 🙂"]
)
def test_any_text_comes_back_from_the_tokenizer_as_it_was(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_each_character_of_a_citation_is_a_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("[k3f9]") == ["[", "k", "3", "f", "9", "]"]
    header = tokenizer.tokenize('<passage id="k3f9" source="a.md">\n')
    assert header[:6] == ['<passage id="', "k", "3", "f", "9", '" source="']


def test_attention_in_blocks_is_causal_attention_forwards_and_backwards() -> None:
    inputs = torch.randn(3, 2, 2 * BLOCK + 7, 16, generator=torch.Generator().manual_seed(1))
    of_ours, of_torchs = ([each.clone().requires_grad_() for each in inputs] for _ in range(2))
    ours = CausalAttention.apply(*of_ours)
    torchs = F.scaled_dot_product_attention(*of_torchs, is_causal=True, scale=1.0)
    torch.testing.assert_close(ours, torchs)
    for mixed in (ours, torchs):
        mixed.square().sum().backward()
    for mine, theirs in zip(of_ours, of_torchs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_the_network_that_is_trained_is_the_qwen3_that_is_served() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    network = Network(Shape(300), seed=3)
    served = Qwen3ForCausalLM(Qwen3Config(**network.shape.to_hf()))
    served.load_state_dict({**network.to_hf(), "lm_head.weight": network.embed_tokens.weight})
    ids = torch.randint(300, (2, BLOCK + 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = network.logits(network(ids, torch.arange(ids.shape[1]).repeat(2, 1))[0])
        torch.testing.assert_close(ours, served.eval()(ids).logits, rtol=1e-3, atol=1e-3)
