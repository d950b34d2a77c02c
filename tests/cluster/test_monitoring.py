"""The dashboard and the alerts name metrics that exist, and Prometheus takes them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.metrics import METRICS
from tests.cluster.manifests import CLUSTER, ROOT, documents

MONITORING = CLUSTER / "monitoring"
OPERATIONS = ROOT / "docs" / "operations.md"
HISTOGRAM = ("_bucket", "_sum", "_count")
_NAME = re.compile(r"\bray_[a-z_]+")


def sources(package: str, *folders: str) -> Iterator[str]:
    """Return the Python sources of an installed package, without importing it."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    for folder in folders:
        for path in sorted((Path(spec.origin).parent / folder).rglob("*.py")):
            yield path.read_text()


@cache
def exported() -> dict[str, set[str]]:
    """Return the names that may be on Ray's endpoint, by who exports them."""
    ours = set()
    for name, metric in METRICS.items():
        full = f"ray_groundswell_{name}"
        ours |= {"counter": {f"{full}_total"}, "gauge": {full}}.get(metric.kind, {full + end for end in HISTOGRAM})
    vllm = declared("vllm", r'"vllm:(\w+)"', "ray_vllm_", "v1/metrics", "v1/spec_decode")
    serve = declared("ray", r'"(serve_\w+)"', "ray_", "serve/_private")
    node = declared("ray", r'"(node_\w+)"', "ray_", "dashboard/modules/reporter")
    return {"ours": ours, "vllm": vllm, "serve": serve, "node": node}


def declared(package: str, pattern: str, prefix: str, *folders: str) -> set[str]:
    """Return what a package declares, with every ending that its kind may bring: which one it is, its code decides."""
    names = {name for text in sources(package, *folders) for name in re.findall(pattern, text)}
    assert names
    return {f"{prefix}{name}{end}" for name in names for end in ("", "_total", *HISTOGRAM)}


def dashboard() -> dict[str, Any]:
    return dict(json.loads((MONITORING / "grafana-dashboard.json").read_text()))


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    variables = [v["query"]["query"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    return [*panels, *variables, *(rule["expr"] for rule in rules())]


@pytest.mark.parametrize("name", sorted({name for e in expressions() for name in _NAME.findall(e)}))
def test_a_metric_that_is_shown_or_alerted_on_exists(name: str) -> None:
    assert any(name in names for names in exported().values())


def test_a_name_that_does_not_exist_would_be_found() -> None:
    known = set().union(*exported().values())
    assert "ray_groundswell_fleet_requests" not in known  # a counter, without its ending
    assert "ray_groundswell_fleet_request_total" not in known
    assert "ray_vllm_no_such_thing" not in known


def test_labels_of_our_own_metrics_are_ones_they_have() -> None:
    matched = re.compile(r"ray_groundswell_([a-z_]+?)(?:_total|_bucket)?\{([^}]*)\}")
    seen = 0
    for expression in expressions():
        for name, selector in matched.findall(expression):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= set(METRICS[name].tags), (name, labels)
            seen += bool(labels)
    assert seen > 10


def test_the_documentation_names_every_metric_its_kind_and_its_labels() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (counter|gauge|histogram) \|([\w, ]*)\|", OPERATIONS.read_text(), re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"\w+", tags))) for name, kind, tags in rows}
    assert len(rows) == len(documented), "each of them once"
    assert documented == {name: (metric.kind, set(metric.tags)) for name, metric in METRICS.items()}


def test_the_pod_monitor_finds_each_pod_and_its_port() -> None:
    (monitor,) = documents(MONITORING / "podmonitor.yaml")
    (service,) = documents(CLUSTER / "kuberay" / "rayservice.yaml")
    cluster = service["spec"]["rayClusterConfig"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        template = group["template"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        (container,) = template["spec"]["containers"]
        assert endpoint["port"] in [port["name"] for port in container["ports"]]


def test_the_guides_command_makes_the_alerts_a_rule_of_the_prometheus_operator() -> None:
    guide = (ROOT / "docs" / "deploy.md").read_text()
    (command,) = re.findall(r"^    (.*PrometheusRule.*) \| kubectl apply -f -$", guide, re.MULTILINE)
    made = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    rule = yaml.safe_load(made.stdout)
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["metadata"] == documents(MONITORING / "podmonitor.yaml")[0]["metadata"]
    assert rule["spec"] == yaml.safe_load((MONITORING / "alerts.yaml").read_text())


def test_panels_have_room_and_names_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24


def test_an_alert_says_whom_to_call_what_happened_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "runbook"}


def test_each_alert_is_made_to_fire() -> None:
    """By `promtool test rules`, where it is installed."""
    tests = yaml.safe_load((MONITORING / "alerts.test.yaml").read_text())["tests"]
    fired = {alert["alertname"] for test in tests for alert in test.get("alert_rule_test", []) if alert["exp_alerts"]}
    samples = [s for test in tests for expr in test.get("promql_expr_test", []) for s in expr["exp_samples"]]
    fired |= {name for sample in samples for name in re.findall(r'alertname="(\w+)"', sample["labels"])}
    assert fired == {rule["alert"] for rule in rules()}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is in Debian's package prometheus")
@pytest.mark.parametrize(
    "command",
    [("check", "rules", "alerts.yaml"), ("test", "rules", "alerts.test.yaml"), ("check", "config", "prometheus.yaml")],
)
def test_prometheus_takes_the_files_and_each_alert_fires_on_what_it_is_for(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is in Debian's package prometheus")
def test_prometheus_can_read_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    queries = [e.replace("$__rate_interval", "1m") for e in expressions() if not e.startswith("label_values")]
    recorded = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(queries)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert f"{len(queries)} rules found" in done.stdout, done.stdout + done.stderr
