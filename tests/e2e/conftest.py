"""One start of the shipped configuration for all end-to-end tests that need no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.serving import CONFIG, Served, serving


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(CONFIG, tmp_path_factory.mktemp("state")) as app:
        yield app
