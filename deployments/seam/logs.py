"""vLLM's log lines, where Serve's go, under the same request id.

vLLM configures logging with `logging.config.dictConfig`, which closes every handler of the process: in a replica those
are Serve's. EngineCore and its workers are processes of their own, and log as vLLM likes.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs

_SWITCH = "VLLM_CONFIGURE_LOGGING"


def join_serves() -> None:
    """Send this process's vLLM records to Serve's handlers. Must run before anything else imports vLLM."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "0"
    try:
        import vllm.logger  # noqa: F401  (configures logging as it is imported)
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
    vllm_logger = logging.getLogger("vllm")
    vllm_logger.setLevel(logging.INFO)
    vllm_logger.handlers = logging.getLogger("ray.serve").handlers
    vllm_logger.propagate = False


def leave_as_is(args: AsyncEngineArgs) -> None:
    """Have vLLM believe it has configured this process's logging; its child processes still will."""
    import vllm.logger

    vllm.logger._last_configured_logging_config = args.create_logging_config()
