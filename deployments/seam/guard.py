"""vLLM's processes never outlive the replica that started them.

vLLM starts EngineCore and its workers as child processes, which survive a parent that is killed. This module is a
`vllm.general_plugins` entry point, so vLLM calls `install` in each of them as it starts: they ask the kernel to be
killed with the thread that forked them (`PR_SET_PDEATHSIG`, prctl(2)).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from typing import Final

REPLICA_PID: Final = "GROUNDSWELL_REPLICA_PID"
"""Set by a replica for its children: outside Groundswell this plugin does nothing."""
_PR_SET_PDEATHSIG: Final = 1


def install() -> None:
    """Tie this process's life to its parent's, when it is a child of an Engine replica."""
    parent = multiprocessing.parent_process()
    if REPLICA_PID not in os.environ or parent is None or os.name != "posix":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl"):
        return
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)
