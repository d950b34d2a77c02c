"""The shipped model answers from documents, and only from them: what it says here is nowhere in its weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import openai
import pytest

from deployments import cli
from deployments.grounding.layout import REFUSAL
from tests.e2e.serving import Served

MODEL = "groundling"
PLACES = ("north harbour", "old library", "grey lighthouse", "market hall", "river mill")


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def codes() -> dict[str, int]:
    rng = random.Random(1)  # of different digits: the model is a small one, and loses count of the same ones in a row
    return {place: int("".join(map(str, rng.sample(range(1, 10), 4)))) for place in PLACES}


@pytest.fixture(scope="module")
def store(client: openai.OpenAI, codes: dict[str, int]) -> str:
    made = client.vector_stores.create(name="codes")
    for place, code in codes.items():
        text = f"The gate code of the {place} is {code}."
        file = client.files.create(file=(f"{place.replace(' ', '-')}.md", text.encode()), purpose="assistants")
        attached = client.vector_stores.files.create_and_poll(file.id, vector_store_id=made.id)
        assert attached.status == "completed"
    return made.id


def tool(store: str) -> Any:
    return {"type": "file_search", "vector_store_ids": [store], "max_num_results": 1}


@pytest.mark.parametrize("place", PLACES)
def test_an_answer_is_found_in_the_documents_and_cited(
    client: openai.OpenAI, store: str, codes: dict[str, int], place: str
) -> None:
    question = f"What is the gate code of the {place}?"
    answer: Any = client.responses.create(model=MODEL, input=question, tools=[tool(store)], temperature=0)
    assert answer.output_text == f"The gate code of the {place} is {codes[place]}."
    (cited,) = answer.output[1].content[0].annotations
    assert (cited.type, cited.filename) == ("file_citation", f"{place.replace(' ', '-')}.md")


def test_a_chat_streams_the_same_answer_and_its_source(
    client: openai.OpenAI, store: str, codes: dict[str, int]
) -> None:
    question: Any = [{"role": "user", "content": f"What is the gate code of the {PLACES[0]}?"}]
    asked: dict[str, Any] = {"model": MODEL, "messages": question, "tools": [tool(store)], "temperature": 0}
    choices = [c for chunk in client.chat.completions.create(**asked, stream=True) for c in chunk.choices]
    assert "".join(c.delta.content or "" for c in choices) == f"The gate code of the {PLACES[0]} is {codes[PLACES[0]]}."
    (cited,) = choices[-1].delta.annotations  # type: ignore[attr-defined]
    assert cited["filename"] == f"{PLACES[0].replace(' ', '-')}.md"


def test_what_the_documents_do_not_say_is_not_made_up(client: openai.OpenAI, store: str) -> None:
    question = "Who painted the ceiling of the town hall?"
    answer = client.responses.create(model=MODEL, input=question, tools=[tool(store)], temperature=0)
    assert answer.output_text == REFUSAL


def test_the_command_line_brings_documents_finds_them_and_asks(
    served: Served, codes: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        where = ["--store", "by the command line", "--url", f"http://127.0.0.1:{served.port}"]
        assert cli.main([*arguments, *where]) == 0
        return capsys.readouterr().out

    place, text = PLACES[0], f"The gate code of the {PLACES[0]} is {codes[PLACES[0]]}."
    folder, name = tmp_path / "notes", f"{place.replace(' ', '-')}.md"
    folder.mkdir()
    (folder / name).write_text(text)
    assert run("ingest", str(folder)).startswith("1 files in by the command line (vs_")
    assert "1 of them were there before" in run("ingest", str(folder))
    found, passage = run("search", place).splitlines()
    assert found.endswith(f"  notes/{name}")
    assert passage.strip() == text
    answer, *_, source = run("ask", f"What is the gate code of the {place}?").splitlines()
    assert answer.replace(" [1]", "") == text
    assert source.startswith(f"  [1] {name}  (file-")
