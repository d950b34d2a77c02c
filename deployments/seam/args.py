"""vLLM's options, parsed by vLLM's own parser, shared by Router and Engine.

Source: `vllm/entrypoints/launchers/cli_args.py` (`make_arg_parser`) and
`vllm/entrypoints/launchers/render/entry.py` (a `VllmConfig` for a front end without an engine).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from argparse import ArgumentParser, Namespace, _AppendAction
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn

from deployments.config import MAX_NUM_SEQS
from deployments.errors import ConfigError

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

_SERVES_OWN: Final = "Serve owns it: set `http_options` at the top of the Serve config"
REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("host", "port", "uds", "root_path", "grpc", "grpc_port"), _SERVES_OWN),
    **dict.fromkeys(
        ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers", "enable_ssl_refresh"),
        "Serve owns the listening socket: end TLS in front of it",
    ),
    **dict.fromkeys(
        ("h11_max_incomplete_event_size", "h11_max_header_count", "uvicorn_log_level", "disable_uvicorn_access_log"),
        _SERVES_OWN,
    ),
    **dict.fromkeys(
        ("headless", "api_server_count", "data_parallel_supervisor_port"), "replicas are set in `deployment`"
    ),
    "api_key": "vLLM's key check leaves paths open: set `router.keys`",
    **dict.fromkeys(
        (
            "data_parallel_size",
            "data_parallel_size_local",
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_backend",
            "data_parallel_hybrid_lb",
            "data_parallel_external_lb",
        ),
        "the fleet's replicas are its data parallelism: set them in `deployment`",
    ),
    **dict.fromkeys(
        ("max_num_queued_reqs", "max_num_queued_tokens"),
        "the Router admits, before engines are asked: set `router.max_queued_requests` and `router.max_queue_wait_s`",
    ),
    "mm_processor_cache_gb": "what one Router has cached, another engine would miss",
    "config": "write its keys here instead",
    "model_tag": "use `model`",
    "tokens_only": "engines speak token ids already; clients speak the OpenAI API",
    "enable_per_request_metrics": "its timings are an engine's own, and a stream may see several",
    "enable_flash_late_interaction": "it would move an engine's work into the Router",
}
"""Options of vLLM's server that mean nothing in a fleet, with the reason a user reads."""

DEFAULTS: Final[Mapping[str, Any]] = {
    "enable_prompt_tokens_details": True,
    "enable_flash_late_interaction": False,
    "mm_processor_cache_gb": 0,
    "max_num_seqs": MAX_NUM_SEQS,
}
"""What a fleet needs other than vLLM's defaults: nothing may live in one Router or one engine alone."""

_IN_ENGINE_CORE: Final = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The model runs in EngineCore, as on one GPU.

On a CPU vLLM starts a Worker even for a single one, to bind its threads to cores, and does so for "uni", too. Where
nothing is bound, the Worker is one more import of vLLM, its memory, and one more process that every step goes through.
"""


def parse_args(name: str, engine_args: Mapping[str, Any], frontend_args: Mapping[str, Any]) -> Namespace:
    """Parse one model's options as vLLM's API server would from its command line.

    Args:
        name: The model's public name; becomes `served_model_name` unless that is given.
        engine_args: `AsyncEngineArgs` by name.
        frontend_args: `FrontendArgs` by name. A key is accepted in either mapping, but not in both.

    Raises:
        ConfigError: An option is unknown (named, with its nearest match), refused, given twice, or has a bad value.
    """
    if os.environ.get("VLLM_API_KEY"):
        raise ConfigError("VLLM_API_KEY is set, and would guard nothing here: set `router.keys`, and unset it")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"model {name!r}: {message}")

    parser = make_arg_parser(Parser(add_help=False))
    options = _collect(name, parser, {"engine_args": engine_args, "frontend_args": frontend_args})
    options.setdefault("served_model_name", [name])
    try:
        args = parser.parse_args(_argv(parser, {**DEFAULTS, **options}))
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model {name!r}: {error}") from None
    if "gpu_memory_utilization" not in options:
        args.gpu_memory_utilization = None  # settled by `engine_args`, from the share of a GPU the engine holds
    return args


def _collect(name: str, parser: ArgumentParser, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    known = {action.dest: action for action in parser._actions}
    options: dict[str, Any] = {}
    for section, given in sections.items():
        for raw, value in given.items():
            key = raw.replace("-", "_")
            where = f"model {name!r}: {section}.{raw}"
            if key in REFUSED:
                raise ConfigError(f"{where} is not set per model: {REFUSED[key]}")
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{where} is not an option of vLLM{hint}")
            if key in options:
                raise ConfigError(f"{where} is given twice")
            options[key] = value
    return options


def _argv(parser: ArgumentParser, options: Mapping[str, Any]) -> list[str]:
    actions = {action.dest: action for action in parser._actions}
    argv: list[str] = []
    for key, value in options.items():
        action = actions[key]
        flag = next(s for s in action.option_strings if s.startswith("--") and not s.startswith("--no-"))
        if value is None:
            continue
        if isinstance(value, bool):
            if value:
                argv.append(flag)
            elif (off := flag.replace("--", "--no-", 1)) in action.option_strings:
                argv.append(off)
        elif isinstance(value, list | tuple) and action.nargs in ("+", "*"):
            argv += [flag, *(_text(item) for item in value)] if value else []
        elif isinstance(value, list | tuple) and isinstance(action, _AppendAction):
            argv += [f"{flag}={_text(item)}" for item in value]
        else:
            argv.append(f"{flag}={_text(value)}")
    return argv


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)


def import_parsers(args: Namespace) -> None:
    """Import the tool and reasoning parsers that users bring, as vLLM's server does before it makes an engine's config.

    Raises:
        ConfigError: A parser that was chosen is not there. Why a file could not be imported is in vLLM's log.
    """
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    try:
        validate_api_server_args(args)
        if args.reasoning_parser:  # which vLLM would look up later
            ReasoningParserManager.get_reasoning_parser(args.reasoning_parser)
    except KeyError as error:
        raise ConfigError(f"model {args.served_model_name[0]!r}: {error.args[0]}") from None


def lora_requests(args: Namespace) -> list[LoRARequest]:
    """Return the adapters that the model is configured with, as every engine knows them."""
    from vllm.lora.request import LoRARequest

    return [
        LoRARequest(lora_name=module.name, lora_int_id=lora_int_id(module.name), lora_path=module.path)
        for module in args.lora_modules or ()
    ]


def lora_int_id(name: str) -> int:
    """Return the same adapter id in every Router and engine: vLLM counts them per process otherwise."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % (2**31 - 1) + 1


def engine_args(args: Namespace, *, num_gpus: float = 1.0) -> AsyncEngineArgs:
    """Return the engine's arguments.

    Args:
        args: From `parse_args`.
        num_gpus: What Ray gives the engine's actor. Below 1, the engine takes that share of the GPU's memory unless
            `gpu_memory_utilization` says otherwise.
    """
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
    from vllm.platforms import current_platform

    args = Namespace(**vars(args))
    if args.gpu_memory_utilization is None:
        share = num_gpus if 0 < num_gpus < 1 else 1.0
        args.gpu_memory_utilization = round(AsyncEngineArgs.gpu_memory_utilization * share, 4)
    result: AsyncEngineArgs = AsyncEngineArgs.from_cli_args(args)
    if result.runner == "pooling":
        propagate_flash_late_interaction(args, result)
    if result.distributed_executor_backend is None:
        if result.tensor_parallel_size * result.pipeline_parallel_size > 1:
            # Left alone, vLLM inside a Ray actor may choose Ray workers, which would want GPUs of their own.
            result.distributed_executor_backend = "mp"
        elif current_platform.is_cpu() and os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind":
            result.distributed_executor_backend = _IN_ENGINE_CORE
    return result


def resolve_speculators(args: Namespace) -> Namespace:
    """Return the options of the model that a drafter's checkpoint was made for, as its engine starts with.

    A checkpoint in the format of the speculators library holds a drafter alone, and names the model it drafts for; vLLM
    serves that one. What it is can only be read from its files, so call it where they are needed anyway.

    Source: `EngineArgs.create_engine_config`.
    """
    from vllm.transformers_utils.config import maybe_override_with_speculators
    from vllm.transformers_utils.utils import is_cloud_storage

    parsed = engine_args(args)
    if is_cloud_storage(parsed.model):
        return args
    model, tokenizer, speculative_config = maybe_override_with_speculators(
        parsed.model,
        parsed.tokenizer,
        parsed.trust_remote_code,
        revision=parsed.revision,
        vllm_speculative_config=parsed.speculative_config,
        hf_token=parsed.hf_token,
    )
    if model == parsed.model:
        return args
    resolved = {"model": model, "tokenizer": tokenizer, "speculative_config": speculative_config}
    return Namespace(**{**vars(args), **resolved})


def frontend_config(args: Namespace) -> VllmConfig:
    """Return a `VllmConfig` for rendering, validation and detokenization: no device, no KV cache, no quantization.

    Mutates process-wide vLLM settings that only matter to engines, so call it in a Router, never in an Engine.

    Args:
        args: From `parse_args`, and for checkpoints of drafters from `resolve_speculators`.

    Raises:
        ConfigError: A tool or reasoning parser that was chosen is not there.
    """
    from vllm import envs
    from vllm.config import LoRAConfig, VllmConfig

    import_parsers(args)
    parsed = engine_args(args)
    model_config = parsed.create_model_config()
    model_config.quantization = None
    envs.VLLM_CPU_KVCACHE_SPACE = 0
    parsed._set_default_reasoning_config_args()
    lora_config = None
    if parsed.enable_lora:
        lora_config = LoRAConfig(
            max_lora_rank=parsed.max_lora_rank,
            max_loras=parsed.max_loras,
            default_mm_loras=parsed.default_mm_loras,
            enable_tower_connector_lora=parsed.enable_tower_connector_lora,
        )
    config = VllmConfig(
        model_config=model_config,
        lora_config=lora_config,
        logging_config=parsed.create_logging_config(),
        observability_config=parsed.create_observability_config(),
        structured_outputs_config=parsed.create_structured_outputs_config(),
        reasoning_config=parsed.reasoning_config,
    )
    # Afterwards: vLLM would look whether an engine here can.
    config.aux_output_config = parsed.aux_output_config
    config.cache_config.kv_sharing_fast_prefill = parsed.kv_sharing_fast_prefill
    config.diffusion_config = parsed.create_diffusion_config()
    config.scheduler_config.stream_interval = parsed.stream_interval
    config.watermark_config = parsed.create_watermark_config()
    return config


def speculates(args: Namespace) -> bool:
    """Return whether engines draft tokens. A config of it would load the drafter's, and a Router asks for no more."""
    return any(
        given is not None for given in (args.speculative_config, args.spec_method, args.spec_model, args.spec_tokens)
    )


def model_names(args: Namespace) -> list[str]:
    """Return every name that selects this model: its own, its aliases, its LoRA adapters."""
    return [*args.served_model_name, *(module.name for module in args.lora_modules or ())]
