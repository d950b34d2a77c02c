"""A judged collection in Cranfield's own format, and the measures by which rankings of it are compared.

The Cranfield collection (Cleverdon 1967): 1400 abstracts on aerodynamics, 225 questions by the authors of papers, who
judged what answers them, from 1 (completely) to 4 (hardly); other codes mean "not at all". It is not ours to pass on:
the files `cran.all.1400`, `cran.qry` and `cranqrel` are found with many courses on information retrieval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Collection:
    """Documents by id, questions, and for each question the gain of each document that was judged."""

    documents: Mapping[str, str]
    questions: Sequence[str]
    gains: Sequence[Mapping[str, int]]


def cranfield(folder: Path) -> Collection:
    """Read the collection. A document is its title and its abstract; gains are 4 for code 1 down to 1 for code 4.

    Documents without either are left out: there is nothing to index of them.
    """
    fields: dict[str, dict[str, list[str]]] = {}
    number = field = ""
    for line in (folder / "cran.all.1400").read_text("latin-1").splitlines():
        if match := re.match(r"\.I (\d+)", line):
            number, field = match[1], ""
            fields[number] = {"T": [], "W": []}
        elif match := re.fullmatch(r"\.([A-Z])\s*", line):
            field = match[1]
        elif field in ("T", "W"):
            fields[number][field].append(line)
    texts = {n: "\n".join(f["T"]).strip() + "\n\n" + "\n".join(f["W"]).strip() for n, f in fields.items()}
    documents = {number: text for number, text in texts.items() if text.strip()}
    parts = re.split(r"^\.I \d+\s*^\.W\s*", (folder / "cran.qry").read_text("latin-1"), flags=re.M)
    questions = [" ".join(part.split()) for part in parts if part.strip()]
    gains: list[dict[str, int]] = [{} for _ in questions]
    for line in (folder / "cranqrel").read_text().splitlines():
        question, document, code = (int(word) for word in line.split()[:3])
        gains[question - 1][str(document)] = 5 - code if 1 <= code <= 4 else 0
    return Collection(documents, questions, gains)


def ndcg(ranking: Sequence[str], gains: Mapping[str, int], k: int = 10) -> float:
    """Return the normalized discounted cumulative gain at `k`, with gains 2^g - 1."""
    ideal = _dcg(sorted(gains.values(), reverse=True)[:k])
    return _dcg([gains.get(document, 0) for document in ranking[:k]]) / ideal if ideal else 0.0


def recall(ranking: Sequence[str], gains: Mapping[str, int], k: int = 10) -> float:
    """Return the share of all relevant documents that are among the first `k`."""
    relevant = {document for document, gain in gains.items() if gain > 0}
    return len(relevant & set(ranking[:k])) / len(relevant) if relevant else 0.0


def _dcg(gains: Sequence[int]) -> float:
    return sum((2**gain - 1) / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
