"""What the document store needs of others, as protocols: it knows nobody who fulfils them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

Embed = Callable[[Sequence[str]], Awaitable[Vectors]]
"""Returns one vector a row, in order. Batches by itself, or is given batches."""

Score = Callable[[str, Sequence[str]], Awaitable[list[float]]]
"""Returns how well each text answers a query, between 0 and 1."""


class Metrics(Protocol):
    """Where numbers go; the names are those of `deployments.metrics.METRICS`."""

    def inc(self, name: str, value: float = 1, **tags: str) -> None: ...

    def set(self, name: str, value: float, **tags: str) -> None: ...

    def observe(self, name: str, value: float, **tags: str) -> None: ...
