"""What stands in `cluster/` is what Kubernetes, KubeRay, Ray and our own configuration take. No Ray and no cluster."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._raylet import node_labels_match_selector as matches
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.sdk import get_docker_host_mount_location
from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema

from deployments.app import assemble
from deployments.config import LONGEST_STREAM_S, AppConfig
from deployments.launch import environment
from deployments.launch.haproxy import OWN_NODE_FIRST
from tests.cluster.manifests import CLUSTER, ROOT, crd, documents, mistakes, schema_mistakes
from tests.serve.stub_engine import StubEngine

KUBERAY = CLUSTER / "kuberay"
MANIFESTS = ["namespace", "secrets.example", "redis", "volumes", "fetch-model", "disruption", "rayservice"]
RAY_UP = ["aws", "on-premise"]
SCRIPTS = Path("/opt/groundswell/.venv/bin")


def rayservice() -> dict[str, Any]:
    (manifest,) = documents(KUBERAY / "rayservice.yaml")
    return manifest


def groups() -> dict[str, dict[str, Any]]:
    cluster = rayservice()["spec"]["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"], **{g["groupName"]: g for g in cluster["workerGroupSpecs"]}}


def pod(group: str) -> dict[str, Any]:
    spec: dict[str, Any] = groups()[group]["template"]["spec"]
    return spec


def container(group: str) -> dict[str, Any]:
    (only,) = pod(group)["containers"]
    return dict(only)


def serve_config() -> dict[str, Any]:
    return dict(yaml.safe_load(rayservice()["spec"]["serveConfigV2"]))


def ray_up(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "ray-up" / f"{name}.yaml").read_text()))


def containerfile() -> str:
    return (CLUSTER / "Containerfile").read_text()


def image_environment() -> dict[str, str]:
    text = containerfile().replace("\\\n", " ")
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.*)$", text, re.MULTILINE))))


class TestManifests:
    @pytest.mark.parametrize("name", MANIFESTS)
    def test_each_object_is_one_that_kubernetes_takes_whole(self, name: str) -> None:
        for manifest in documents(KUBERAY / f"{name}.yaml"):
            assert mistakes(manifest) == [], manifest["kind"]

    def test_every_file_is_checked(self) -> None:
        others = {"kustomization", "images"}
        assert {path.stem for path in KUBERAY.glob("*.yaml")} == {*MANIFESTS, *others}

    def test_kustomize_applies_what_is_there_but_secrets_and_jobs(self) -> None:
        resources = {Path(name).stem for name in documents(KUBERAY / "kustomization.yaml")[0]["resources"]}
        assert resources == set(MANIFESTS) - {"secrets.example", "fetch-model"}

    @pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
    def test_what_kustomize_makes_of_them_is_taken_whole_and_has_images_of_a_registry(self) -> None:
        made = subprocess.run(["kubectl", "kustomize", str(KUBERAY)], capture_output=True, text=True, timeout=60)
        assert made.returncode == 0, made.stderr
        objects = [document for document in yaml.safe_load_all(made.stdout) if document]
        assert [found for manifest in objects for found in mistakes(manifest)] == []
        assert {m["metadata"].get("namespace") for m in objects if m["kind"] != "Namespace"} == {"groundswell"}
        images = set(re.findall(r"image: (\S+)", made.stdout))
        assert images == {"redis:7.2", *(f"registry.example.com/groundswell:0.1.0-{kind}" for kind in ("cpu", "gpu"))}

    def test_the_ray_cluster_is_one_by_itself_as_well(self) -> None:
        assert schema_mistakes(rayservice()["spec"]["rayClusterConfig"], crd("RayCluster")["properties"]["spec"]) == []

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda s: s["rayClusterConfig"]["workerGroupSpecs"][0].update(minReplica=2),
            lambda s: s["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(volumes=[]),
            lambda s: s["rayClusterConfig"]["authOptions"].update(mode="tokens"),
            lambda s: s["rayClusterConfig"]["autoscalerOptions"].update(idleTimeoutSeconds="300"),
            lambda s: s["rayClusterConfig"]["gcsFaultToleranceOptions"].update(redis="redis:6379"),
            lambda s: s["rayClusterConfig"]["workerGroupSpecs"][1].pop("template"),
        ],
    )
    def test_a_mistake_would_be_found(self, spoil: Callable[[dict[str, Any]], object]) -> None:
        manifest = copy.deepcopy(rayservice())
        spoil(manifest["spec"])
        assert len(mistakes(manifest)) == 1

    def test_a_mistake_in_a_core_object_would_be_found(self) -> None:
        budget = copy.deepcopy(documents(KUBERAY / "disruption.yaml")[0])
        budget["spec"]["minimumAvailable"] = 1
        assert mistakes(budget)


class TestTheRayService:
    def test_kuberays_operator_accepts_it(self) -> None:
        """Rules of `ValidateRayServiceSpec` and `ValidateRayClusterSpec` that no schema states."""
        manifest = rayservice()
        cluster = manifest["spec"]["rayClusterConfig"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
        assert len(manifest["metadata"]["name"]) <= 47
        assert re.fullmatch(r"\d+[smh]", manifest["metadata"]["annotations"]["ray.io/initializing-timeout"])
        assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 53)  # tokens, and one path for health
        for group in groups().values():
            assert "labels" not in group["rayStartParams"]
            assert "restartPolicy" not in group["template"]["spec"]  # autoscaler v2 wants Never, and sets it
            assert "redis-password" not in group["rayStartParams"]
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]

    def test_ray_is_the_version_that_is_installed(self) -> None:
        assert (
            f'"ray[serve]=={rayservice()["spec"]["rayClusterConfig"]["rayVersion"]}"'
            in (ROOT / "pyproject.toml").read_text()
        )

    def test_neither_routers_nor_engines_run_on_the_head(self) -> None:
        assert groups()["head"]["rayStartParams"]["num-cpus"] == "0"
        assert rayservice()["spec"]["excludeHeadPodFromServeSvc"] is True
        for options in each_deployments_actor_options():
            assert options["num_cpus"] > 0

    def test_each_deployment_finds_a_group_that_has_what_it_asks_for(self) -> None:
        labels = [group.get("labels", {}) for group in groups().values()]
        for options in each_deployments_actor_options():
            assert any(options["label_selector"].items() <= given.items() for given in labels)

    def test_an_engine_fits_into_a_gpu_pod(self) -> None:
        requests = container("gpus")["resources"]["requests"]
        for model in serve_config()["applications"][0]["args"]["models"]:
            options = model["deployment"]["ray_actor_options"]
            parallel = model["engine_args"].get("tensor_parallel_size", 1)
            assert options["num_gpus"] == parallel == int(requests["nvidia.com/gpu"])
            assert options["num_cpus"] <= int(requests["cpu"])

    def test_there_are_as_many_pods_as_replicas_may_be(self) -> None:
        args = serve_config()["applications"][0]["args"]
        router = args["router"]["deployment"]["autoscaling_config"]
        assert router["min_replicas"] <= groups()["routers"]["minReplicas"]
        assert router["max_replicas"] <= groups()["routers"]["maxReplicas"]
        engines = args["models"][0]["deployment"]["autoscaling_config"]
        assert engines["max_replicas"] <= groups()["gpus"]["maxReplicas"]

    @pytest.mark.parametrize("group", ["head", "routers", "gpus"])
    def test_every_pod_has_probes_on_ports_that_it_opens(self, group: str) -> None:
        it = container(group)
        ports = {port["name"]: port["containerPort"] for port in it["ports"]}
        assert it["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        ready = it["readinessProbe"]["httpGet"]
        assert ready["path"] == ("/api/healthz" if group == "head" else "/-/healthz")
        assert ports["serve"] == serve_config()["http_options"]["port"]
        assert ports["metrics"] == 8080

    @pytest.mark.parametrize("group", ["routers", "gpus"])
    def test_a_pod_that_leaves_lets_its_streams_end(self, group: str) -> None:
        assert pod(group)["terminationGracePeriodSeconds"] > LONGEST_STREAM_S
        (_, _, script) = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert f"--deadline-remaining-seconds {LONGEST_STREAM_S:.0f}" in script
        assert int(re.findall(r"\{1\.\.(\d+)\}", script)[0]) < pod(group)["terminationGracePeriodSeconds"]
        assert rayservice()["spec"]["rayClusterDeletionDelaySeconds"] > LONGEST_STREAM_S

    def test_a_disruption_budget_covers_the_groups_it_names(self) -> None:
        for budget in documents(KUBERAY / "disruption.yaml"):
            wanted = dict(budget["spec"]["selector"]["matchLabels"])
            group = wanted.pop("ray.io/group")  # KubeRay's own label
            assert wanted.items() <= groups()[group]["template"]["metadata"]["labels"].items()
            assert budget["spec"]["minAvailable"] <= groups()[group]["minReplicas"]

    def test_secrets_and_volumes_that_pods_name_exist(self) -> None:
        made = {
            (m["kind"], m["metadata"]["name"])
            for name in ("secrets.example", "volumes")
            for m in documents(KUBERAY / f"{name}.yaml")
        }
        sources = [rayservice(), *documents(KUBERAY / "redis.yaml"), *documents(KUBERAY / "fetch-model.yaml")]
        named = {reference for source in sources for reference in references(source)}
        assert named == made

    @pytest.mark.parametrize("group", ["head", "routers", "gpus"])
    def test_what_is_mounted_is_a_volume(self, group: str) -> None:
        volumes = {volume["name"] for volume in pod(group)["volumes"]}
        assert {mount["name"] for mount in container(group)["volumeMounts"]} == volumes

    def test_keys_are_where_routers_look_for_them(self) -> None:
        path = Path(serve_config()["applications"][0]["args"]["router"]["keys"]["file"])
        mounts = {mount["mountPath"]: mount["name"] for mount in container("routers")["volumeMounts"]}
        (secret,) = [
            v["secret"]["secretName"] for v in pod("routers")["volumes"] if v["name"] == mounts[str(path.parent)]
        ]
        example = {m["metadata"]["name"]: m["stringData"] for m in documents(KUBERAY / "secrets.example.yaml")}
        assert path.name in example[secret]

    def test_no_pod_overrides_what_its_image_sets(self) -> None:
        for group in groups():
            names = {variable["name"] for variable in container(group).get("env", [])}
            assert not names & image_environment().keys()

    def test_behind_the_service_requests_stay_in_the_pod_they_come_in_at(self) -> None:
        for group in ("routers", "gpus"):
            assert container(group)["env"] == [{"name": OWN_NODE_FIRST, "value": "1"}]


class TestTheServeConfig:
    @pytest.fixture(params=["kuberay", "serve"])
    def config(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        if request.param == "kuberay":
            return serve_config()
        return dict(yaml.safe_load((CLUSTER / "serve.yaml").read_text()))

    def test_serve_takes_it_and_knows_every_key(self, config: dict[str, Any]) -> None:
        ServeDeploySchema.model_validate(config)
        assert config.keys() <= ServeDeploySchema.model_fields.keys()
        assert config["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
        assert config["logging_config"].keys() <= LoggingConfig.model_fields.keys()
        for application in config["applications"]:
            assert application.keys() <= ServeApplicationSchema.model_fields.keys()

    def test_it_asks_for_keys_wherever_it_listens_on_every_address(self, config: dict[str, Any]) -> None:
        assert config["http_options"]["host"] == "0.0.0.0"
        assert config["applications"][0]["args"]["router"]["keys"]["file"]

    def test_the_app_can_be_built_of_it(self, config: dict[str, Any]) -> None:
        app = assemble(AppConfig.parse(config["applications"][0]["args"]), StubEngine)
        assert app._bound_deployment.name == "Router"
        assert app._bound_deployment._deployment_config.autoscaling_config.min_replicas == 2

    def test_both_ways_serve_alike_but_for_where_things_are(self) -> None:
        """What KubeRay embeds and what `ray up` clusters are handed differ in label selectors and paths alone."""
        kuberay = serve_config()
        plain = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
        args = kuberay["applications"][0]["args"]
        for one in (args, plain["applications"][0]["args"]):
            for options in each_deployments_actor_options(one):
                options.pop("label_selector", None)
        del args["models"][0]["deployment"]["max_surge_percent"]
        args["router"]["keys"]["file"] = plain["applications"][0]["args"]["router"]["keys"]["file"]
        assert kuberay == plain


class TestRayUp:
    @pytest.mark.parametrize("name", RAY_UP)
    def test_ray_takes_the_file(self, name: str) -> None:
        validate_config(prepare_config(ray_up(name)))

    def test_every_file_is_checked(self) -> None:
        assert {path.stem for path in (CLUSTER / "ray-up").glob("*.yaml")} == set(RAY_UP)

    @pytest.mark.parametrize("name", RAY_UP)
    def test_a_mistake_would_be_found(self, name: str) -> None:
        with pytest.raises(Exception, match="head_start_commands"):
            validate_config(prepare_config({**ray_up(name), "head_start_commands": []}))

    @pytest.mark.parametrize("name", RAY_UP)
    def test_every_node_starts_ray_with_the_token(self, name: str) -> None:
        config = ray_up(name)
        for which in ("head", "worker"):
            (start,) = [command for command in config[f"{which}_start_ray_commands"] if "ray start" in command]
            (token,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", start)
            assert str(Path(token).parent) in config["file_mounts"]
            assert "--metrics-export-port=8080" in start

    @pytest.mark.parametrize("name", RAY_UP)
    def test_keys_are_where_routers_look_for_them(self, name: str) -> None:
        plain = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
        file = Path(plain["applications"][0]["args"]["router"]["keys"]["file"])
        assert str(file.parent) in ray_up(name)["file_mounts"]

    @pytest.mark.parametrize("name", RAY_UP)
    def test_secrets_are_kept_out_of_version_control(self, name: str) -> None:
        assert "/cluster/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
        assert set(ray_up(name)["file_mounts"].values()) == {"cluster/secrets"}

    @pytest.mark.parametrize("name", RAY_UP)
    def test_what_changes_is_mounted_by_its_folder(self, name: str) -> None:
        """A container goes on seeing the file that was mounted, when rsync puts another in its place."""
        assert set(ray_up(name)["file_mounts"]) == {"/etc/groundswell"}

    @pytest.mark.parametrize("name", RAY_UP)
    def test_bash_takes_each_command_in_the_brackets_that_ray_puts_around_it(self, name: str) -> None:
        commands = [c for key, value in ray_up(name).items() if key.endswith("_commands") for c in value]
        assert commands
        for command in commands:
            subprocess.run(["bash", "-n", "-c", f"({command})"], check=True, timeout=60)

    def test_credentials_of_the_bucket_are_read_where_ray_puts_them(self) -> None:
        config = ray_up("on-premise")
        (option,) = [option for option in config["docker"]["run_options"] if option.startswith("--env-file ")]
        folder = get_docker_host_mount_location(config["cluster_name"])
        assert [str(Path(option.split()[1]).parent)] == [f"{folder}{target}" for target in config["file_mounts"]]

    def test_each_instance_has_an_image_and_rights_of_its_own(self) -> None:
        """Where the file names none, Ray takes an image of Ubuntu 18.04, and a head that may hand on no profile."""
        for name, kind in ray_up("aws")["available_node_types"].items():
            assert kind["node_config"]["ImageId"].startswith("ami-"), name
            assert kind["node_config"]["IamInstanceProfile"]["Name"], name

    def test_routers_keep_off_the_nodes_of_engines_and_engines_do_not(self) -> None:
        kinds = ray_up("aws")["available_node_types"]
        args = yaml.safe_load((CLUSTER / "serve.yaml").read_text())["applications"][0]["args"]
        selectors = [options.get("label_selector", {}) for options in each_deployments_actor_options(args)]
        takes = {kind: [matches(node.get("labels", {}), s) for s in selectors] for kind, node in kinds.items()}
        assert takes["gpu"] == [True, False, False, False]
        assert takes["router"] == [True, True, True, True]
        (engine, *_) = each_deployments_actor_options(args)
        assert kinds["gpu"]["resources"] == {"CPU": engine["num_cpus"], "GPU": engine["num_gpus"]}


class TestTheImage:
    def test_it_has_the_environment_that_every_node_needs(self) -> None:
        wanted = environment.on_a_cluster(SCRIPTS)
        assert wanted.items() <= image_environment().items()

    def test_it_holds_the_model_that_its_config_names(self) -> None:
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        (model,) = config["applications"][0]["args"]["models"]
        path = model["engine_args"]["model"]
        assert (ROOT / path).is_dir()
        assert f"COPY {path} {path}" in containerfile()
        assert f"!{path}" in (CLUSTER / "Containerfile.dockerignore").read_text().splitlines()

    def test_it_installs_as_the_makefile_does(self) -> None:
        assert "RUN make install ACCELERATOR=${ACCELERATOR}" in containerfile()
        assert image_environment()["PATH"].split(":")[0] == str(SCRIPTS)

    def test_it_copies_only_what_exists_and_is_let_through(self) -> None:
        ignored = (CLUSTER / "Containerfile.dockerignore").read_text().splitlines()
        for line in re.findall(r"^COPY (.*)$", containerfile(), re.MULTILINE):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored

    def test_caches_are_on_the_volume(self) -> None:
        assert "/cache" in [mount["mountPath"] for mount in container("gpus")["volumeMounts"]]
        for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME"):
            assert image_environment()[name].startswith("/cache/")

    def test_both_variants_are_named_by_the_manifests(self) -> None:
        images = {image["name"]: image["newTag"] for image in documents(KUBERAY / "kustomization.yaml")[0]["images"]}
        assert {container(group)["image"] for group in groups()} == set(images)
        assert container("gpus")["image"].endswith("gpu") and images[container("gpus")["image"]].endswith("-gpu")


def each_deployments_actor_options(args: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    args = serve_config()["applications"][0]["args"] if args is None else args
    for model in args["models"]:
        yield model["deployment"]["ray_actor_options"]
    yield args["documents"]["indexer"]["ray_actor_options"]
    yield args["documents"]["retriever"]["ray_actor_options"]
    yield args["router"]["deployment"]["ray_actor_options"]


def references(node: Any) -> Iterator[tuple[str, str]]:
    """Return the secrets and claims that a manifest names, wherever it does."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("secretKeyRef", "secretRef"):
                yield "Secret", value["name"]
            elif key == "secretName":
                yield "Secret", value
            elif key == "claimName":
                yield "PersistentVolumeClaim", value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for item in node:
            yield from references(item)
