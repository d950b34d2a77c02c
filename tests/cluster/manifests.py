"""What Kubernetes would make of a manifest: KubeRay's schemas and Kubernetes' own, read strictly."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = "1.32"
_CRDS = Path(__file__).parent / "crds"
_INT_OR_STRING = {"anyOf": [{"type": "integer"}, {"type": "string"}]}


def documents(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file."""
    return [document for document in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader) if document]


@cache
def crd(kind: str) -> dict[str, Any]:
    """Return the schema of a kind of KubeRay's, version v1, in which unknown fields are mistakes."""
    (definition,) = documents(_CRDS / f"ray.io_{kind.lower()}s.yaml")
    version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, not the definition's
    return schema


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a structural schema as JSON Schema in which what Kubernetes would prune is refused."""
    if schema.get("x-kubernetes-int-or-string"):
        return _INT_OR_STRING
    result = dict(schema)
    if schema.get("nullable") and "type" in schema:
        result["type"] = [schema["type"], "null"]
    if "items" in schema:
        result["items"] = strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    if "properties" in schema:
        result["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not open_ended:
        result["additionalProperties"] = False
    return result


def mistakes(manifest: dict[str, Any]) -> list[str]:
    """Return what Kubernetes, or KubeRay's definitions, would refuse or drop."""
    if manifest["apiVersion"].startswith("ray.io/"):
        return schema_mistakes(manifest, crd(manifest["kind"]))
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def schema_mistakes(instance: Any, schema: dict[str, Any]) -> list[str]:
    """Return each mistake with its place."""
    errors = jsonschema.Draft202012Validator(schema).iter_errors(instance)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
