"""Ordinary English sentences from what is installed anyway: documentation strings, under permissive licences.

The Python language reference and the standard library's docstrings (PSF licence), and those of vLLM, Ray Serve and
transformers (Apache-2.0). The project's own documents are left out: the model is measured on them.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("vllm", "ray.serve", "ray.data", "transformers")
MAX_FILES = 1500

_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z\"'`])")
_WORD = re.compile(r"[A-Za-z]{2,}")


def documents() -> list[list[str]]:
    """Return documents as lists of sentences in their order. The same for everybody with the same packages."""
    return [sentences for text in _texts() if len(sentences := _sentences(text)) >= 3]


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]))
    for root in roots:
        files = sorted(path for path in root.rglob("*.py") if "test" not in str(path.relative_to(root)))
        files = [path for path in files if "site-packages" not in path.relative_to(root).parts]
        for path in files[:MAX_FILES]:
            yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    whole = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                whole.append(text)
    yield "\n\n".join(whole)


def _sentences(text: str) -> list[str]:
    found: dict[str, None] = {}
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if _is_english(sentence):
                found[sentence] = None
    return list(found)


def _is_english(sentence: str) -> bool:
    if not (25 <= len(sentence) <= 240 and sentence.isascii() and sentence[-1] in ".!?"):
        return False
    if not (sentence[0].isalnum() or sentence[0] == "`"):
        return False
    letters = sum(character.isalpha() or character == " " for character in sentence)
    symbols = ("<", "|", ">>>", "::", "**", "->", "==", "{", "--")
    return (
        letters > 0.82 * len(sentence)
        and len(_WORD.findall(sentence)) >= 5
        and not any(symbol in sentence for symbol in symbols)
    )
