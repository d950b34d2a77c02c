"""Run `ray.serve.llm`'s OpenAI app on this machine until a signal comes.

python -m benchmarks.ray_llm PORT '{an LLMConfig}' FOLDER
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from typing import Any

from benchmarks import console
from benchmarks.peers import LOGICAL_CPUS
from deployments.launch.driver import OBJECT_STORE_BYTES


def main(port: int, config: dict[str, Any], folder: str) -> None:
    """Start Ray and the app; stop both in order when SIGINT or SIGTERM comes."""
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    ray.init(
        address="local",
        num_cpus=LOGICAL_CPUS,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
        _temp_dir=folder,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_openai_app({"llm_configs": [LLMConfig(**config)]}), name="peer", route_prefix="/")
        signal.pause()
    except KeyboardInterrupt:
        return
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    console.stop_in_order()
    main(int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
