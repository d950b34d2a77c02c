"""One start of the shipped configuration for all tests of this folder. It ends with them: others need the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.serving import CONFIG, Served, serving


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(CONFIG, tmp_path_factory.mktemp("state")) as app:
        yield app
