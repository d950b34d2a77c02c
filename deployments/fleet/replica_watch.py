"""The way back from Serve's request router to the Fleet: Serve makes the router itself and hands it nothing of ours.

A module of its own, because Serve pickles the router's class, and the globals of its module with it, by value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

Watcher = Callable[[frozenset[str]], object]
_watchers: Final[dict[str, Watcher]] = {}


def watch(deployment: str, on_replicas: Watcher) -> None:
    """Call `on_replicas` with the ids of a deployment's running replicas when they change, on Serve's own thread.

    One watcher per deployment and process: that of its Router.
    """
    _watchers[deployment] = on_replicas


def changed(deployment: str, replicas: frozenset[str]) -> None:
    """Tell a deployment's watcher, if it has one, which replicas run now."""
    watcher = _watchers.get(deployment)
    if watcher is not None:
        watcher(replicas)
