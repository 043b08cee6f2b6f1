"""Everything is what Kubernetes 1.31 to 1.36 and the custom resources' definitions take, to the last field."""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s.rendered import ROOT, Build, Object, name_of, rendered, workloads

VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36")
# Definitions of custom resources, one a file: GROUP_PLURAL.yaml. A folder of them is no part of the repository.
CRDS = Path(os.environ.get("INKWELL_CRDS", ROOT.parent / "shared" / "k8s" / "crds"))
# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")

# It would read five megabytes of definitions anew for every object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)

_valid: set[tuple[str, str]] = set()


def _is_custom(item: Object) -> bool:
    group = item["apiVersion"].rpartition("/")[0]
    return "." in group and not group.endswith(".k8s.io") or group == "gateway.networking.k8s.io"


@pytest.mark.parametrize("version", VERSIONS)
def test_builtin_kinds(objects: tuple[Object, ...], version: str) -> None:
    for item in objects:
        if _is_custom(item):
            continue
        key = (version, json.dumps(item, sort_keys=True))
        if key in _valid:
            continue
        # It raises for a kind that it does not know, and takes an older version for one that it does not.
        assert kubernetes_validate.validate(item, version, strict=True) == version
        _valid.add(key)


@functools.cache
def _definition(api_version: str, kind: str) -> Any:
    group, _, version = api_version.rpartition("/")
    for path in sorted(CRDS.glob(f"{group}_*.yaml")):
        definition = yaml.load(path.read_text("utf-8"), Loader=yaml.CSafeLoader)["spec"]
        if definition["names"]["kind"] == kind:
            found = next(item for item in definition["versions"] if item["name"] == version)
            assert found["served"]
            return _closed(found["schema"]["openAPIV3Schema"])
    return None


def _closed(schema: Any) -> Any:
    """The schema with unknown fields refused, as the API server warns of them."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    return closed


CUSTOM = (
    ("keda.sh/v1alpha1", "ScaledObject"),
    ("monitoring.coreos.com/v1", "PodMonitor"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("gateway.networking.k8s.io/v1", "Gateway"),
    ("gateway.networking.k8s.io/v1", "GRPCRoute"),
    ("gateway.networking.k8s.io/v1", "BackendTLSPolicy"),
    ("cert-manager.io/v1", "Certificate"),
    ("cert-manager.io/v1", "Issuer"),
)


@pytest.mark.parametrize(("api_version", "kind"), CUSTOM)
def test_custom_resources(objects: tuple[Object, ...], api_version: str, kind: str) -> None:
    found = [item for item in objects if (item["apiVersion"], item["kind"]) == (api_version, kind)]
    if not found:
        return
    schema = _definition(api_version, kind)
    if schema is None:
        pytest.skip(f"no definition of {kind} in {CRDS}")
    for item in found:
        jsonschema.Draft202012Validator(
            {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}
        ).validate(item)


def test_no_other_custom_resources(objects: tuple[Object, ...]) -> None:
    used = {(item["apiVersion"], item["kind"]) for item in objects if _is_custom(item)}
    assert used <= set(CUSTOM)


def test_names_are_given_once(objects: tuple[Object, ...]) -> None:
    names = [(item["kind"], item["metadata"].get("namespace"), name_of(item)) for item in objects]
    assert len(names) == len(set(names))
    assert {namespace for kind, namespace, _ in names if kind not in ("Namespace", "PriorityClass")} == {"inkwell"}


def test_quantities(objects: tuple[Object, ...]) -> None:
    """The schemas take any text for one."""
    for workload in workloads(objects):
        for container in workload["spec"]["template"]["spec"]["containers"]:
            for kind, amounts in container["resources"].items():
                for resource, amount in amounts.items():
                    assert QUANTITY.fullmatch(str(amount)), (name_of(workload), kind, resource, amount)
                    if resource.endswith("/gpu"):
                        assert str(amount).isdecimal(), (name_of(workload), resource, amount)


@pytest.mark.parametrize(
    "wrong", [{"unknown": 1}, {"replicas": "two"}, {"template": {"spec": {"containers": [{"imge": "x"}]}}}]
)
def test_a_wrong_field_is_noticed(wrong: Object) -> None:
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "x"},
        "spec": {"selector": {}, "template": {}} | wrong,
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_a_wrong_field_of_a_custom_resource_is_noticed() -> None:
    schema = _definition("keda.sh/v1alpha1", "ScaledObject")
    if schema is None:
        pytest.skip(f"no definition of ScaledObject in {CRDS}")
    whole = next(item for item in rendered(Build(overlay="production")) if item["kind"] == "ScaledObject")
    wrong = {**whole, "spec": {**whole["spec"], "minReplicas": 0}}
    with pytest.raises(jsonschema.ValidationError, match="minReplicas"):
        jsonschema.Draft202012Validator(schema).validate(wrong)
