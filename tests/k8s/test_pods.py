"""What pods ask of a cluster: the restricted rules, resources, probes, settings that services read, time to end."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from services.kit.server import LIVENESS, READINESS
from services.kit.settings import AUTHORITY, CERTIFICATE, KEY, ServiceSettings
from tests.k8s.rendered import (
    Build,
    Object,
    container_of,
    environment_of,
    labels_of,
    name_of,
    of_kind,
    pod_of,
    ports_of,
    rendered,
    workloads,
)

SERVICES = ("gateway", "ocr", "diffusion", "compiler")
# What stands for the values of Secrets, by their key.
SECRETS = {"store": "s3://bucket/inkwell", "url": "postgresql://user:password@host/database"}


def _service(workload: Object) -> str:
    return labels_of(workload)["app.kubernetes.io/name"]


def _settings(
    workload: Object, objects: tuple[Object, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> ServiceSettings:
    """The service's settings, read by the service itself from the variables of its pod; paths lie in `folder`."""
    service = _service(workload)
    container = container_of(workload)
    for name, variable in environment_of(workload, objects).items():
        if not name.startswith("INKWELL_"):
            continue
        source = variable.get("valueFrom", {})
        if "resourceFieldRef" in source:
            kind, _, resource = source["resourceFieldRef"]["resource"].partition(".")
            value = str(container["resources"][kind][resource])
        elif "secretKeyRef" in source:
            value = SECRETS[source["secretKeyRef"]["key"]]
        else:
            value = variable["value"]
        if value.startswith("/"):
            place = folder / value.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
            for file in (CERTIFICATE, KEY, AUTHORITY) if name.endswith("_TLS") else ():
                (place / file).touch()
            value = str(place)
        monkeypatch.setenv(name, value)
    settings: ServiceSettings = importlib.import_module(f"services.{service}.settings").Settings()
    return settings


def test_the_restricted_rules(objects: tuple[Object, ...]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and a root that is read only."""
    (namespace,) = of_kind(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for workload in workloads(objects):
        pod, container = pod_of(workload)["spec"], container_of(workload)
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert 0 not in pod["securityContext"].get("supplementalGroups", [])
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert not any("hostPort" in port for port in container.get("ports", ()))
        allowed = {"name", "configMap", "emptyDir", "secret", "persistentVolumeClaim", "projected"}
        assert all(volume.keys() <= allowed for volume in pod.get("volumes", ()))


def test_no_pod_has_a_token_but_the_gateway(objects: tuple[Object, ...]) -> None:
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    names = [pod_of(workload)["spec"]["serviceAccountName"] for workload in workloads(objects)]
    assert len(names) == len(set(names))
    for workload in workloads(objects):
        pod = pod_of(workload)["spec"]
        assert pod["automountServiceAccountToken"] is False
        sources = [s for volume in pod["volumes"] for s in volume.get("projected", {}).get("sources", ())]
        has_token = any("serviceAccountToken" in source for source in sources)
        assert has_token == (_service(workload) == "gateway")
    (binding,) = of_kind(objects, "RoleBinding")
    assert [subject["name"] for subject in binding["subjects"]] == ["gateway"]
    (role,) = of_kind(objects, "Role")
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    ]


def test_every_container_says_what_it_takes(objects: tuple[Object, ...]) -> None:
    for workload in workloads(objects):
        resources = container_of(workload)["resources"]
        for kind in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= resources[kind].keys(), name_of(workload)


def test_services_understand_their_settings(
    objects: tuple[Object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {
        f"INKWELL_{service.upper()}_{field.upper()}"
        for service in SERVICES
        for field in importlib.import_module(f"services.{service}.settings").Settings.model_fields
    }
    for workload in of_kind(objects, "Deployment"):
        names = {name for name in environment_of(workload, objects) if name.startswith("INKWELL_")}
        assert names <= known, name_of(workload)
        others = environment_of(workload, objects).keys() - names - {"HOME", "ARTIFACT_STORE"}
        assert all(name.startswith("AWS_") for name in others)
        with monkeypatch.context() as patch:
            settings = _settings(workload, objects, tmp_path / name_of(workload), patch)
        ports = ports_of(workload)
        assert (settings.host, settings.metrics_host) == ("0.0.0.0", "0.0.0.0")
        assert (settings.port, settings.metrics_port) == (ports["grpc"], ports["metrics"])
        assert settings.health_port == ports.get("health", -1)


def test_variables_in_arguments_are_there(objects: tuple[Object, ...]) -> None:
    """Else their text would stay as it is, and a Job would keep its work in a folder called $(ARTIFACT_STORE)."""
    for job in of_kind(objects, "Job"):
        given = environment_of(job, objects).keys()
        for argument in container_of(job)["args"]:
            for part in argument.split("$(")[1:]:
                assert part.partition(")")[0] in given, (name_of(job), argument)


def test_teaching_pods_find_each_other(objects: tuple[Object, ...]) -> None:
    """By host names, which an Indexed Job makes of its own name, under the Service that is their subdomain."""
    for job in of_kind(objects, "Job"):
        if _service(job) != "finetune":
            continue
        spec, arguments = job["spec"], container_of(job)["args"]
        assert spec["completionMode"] == "Indexed"
        assert f"--nnodes={spec['completions']}" in arguments
        assert spec["parallelism"] == spec["completions"]
        assert pod_of(job)["spec"]["subdomain"] == name_of(job)
        (service,) = [item for item in of_kind(objects, "Service") if name_of(item) == name_of(job)]
        assert service["spec"]["publishNotReadyAddresses"] is True
        (port,) = service["spec"]["ports"]
        assert f"--rdzv-endpoint=$(JOB_NAME)-0.$(JOB_NAME):{port['port']}" in arguments
        name = environment_of(job)["JOB_NAME"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert name == "metadata.labels['batch.kubernetes.io/job-name']"


def test_probes(objects: tuple[Object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native gRPC probes, in plain text; a pod is not killed while its models may still load."""
    for workload in of_kind(objects, "Deployment"):
        container, ports = container_of(workload), ports_of(workload)
        # A gateway that waits for an endpoint to be ready could never wake a pool that is at zero.
        ready = "inkwell.gateway.v1.GatewayService" if _service(workload) == "gateway" else READINESS
        encrypted = environment_of(workload)[f"INKWELL_{_service(workload).upper()}_TLS"]["value"] != "off"
        assert encrypted == ("health" in ports)
        for kind, name in (("startupProbe", ready), ("readinessProbe", ready), ("livenessProbe", LIVENESS)):
            assert container[kind]["grpc"] == {"port": ports["health" if encrypted else "grpc"], "service": name}
        with monkeypatch.context() as patch:
            settings = _settings(workload, objects, tmp_path / name_of(workload), patch)
        startup = container["startupProbe"]
        if _service(workload) in ("ocr", "diffusion"):
            assert startup["periodSeconds"] * startup["failureThreshold"] > settings.engine_start_s


def test_admitted_work_ends_before_the_pod_is_killed(
    objects: tuple[Object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grace_s: dict[str, float] = {}
    for workload in of_kind(objects, "Deployment"):
        with monkeypatch.context() as patch:
            settings = _settings(workload, objects, tmp_path / name_of(workload), patch)
        pause_s = container_of(workload)["lifecycle"]["preStop"]["sleep"]["seconds"]
        needed_s = pause_s + settings.drain_delay_s + settings.drain_grace_s
        # For the engine, and what else there is, to end.
        assert pod_of(workload)["spec"]["terminationGracePeriodSeconds"] >= needed_s + 10, name_of(workload)
        grace_s[_service(workload)] = settings.drain_grace_s
    # What it passes on may take as long as there.
    assert grace_s["gateway"] == max(grace_s.values())


def test_folders_to_write_to(objects: tuple[Object, ...]) -> None:
    """The root is read only. Engines get shared memory, which the runtime gives too little of."""
    for workload in workloads(objects):
        mounts = {mount["mountPath"]: mount for mount in container_of(workload)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod_of(workload)["spec"]["volumes"]}
        home = environment_of(workload)["HOME"]["value"]
        assert {home, "/tmp"} <= mounts.keys()
        if _service(workload) in ("ocr", "diffusion", "finetune", "tensorrt-build"):
            assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
        sizes = [volume["emptyDir"] for volume in volumes.values() if "emptyDir" in volume]
        assert all("sizeLimit" in size for size in sizes)
        disk = sum(int(size["sizeLimit"].removesuffix("Gi")) for size in sizes if "medium" not in size)
        assert int(container_of(workload)["resources"]["limits"]["ephemeral-storage"].removesuffix("Gi")) > disk


def test_replicas_are_spread(objects: tuple[Object, ...]) -> None:
    for workload in of_kind(objects, "Deployment"):
        spread = pod_of(workload)["spec"]["topologySpreadConstraints"]
        assert [item["topologyKey"] for item in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        for item in spread:
            assert item["labelSelector"]["matchLabels"] == workload["spec"]["selector"]["matchLabels"]


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [("INKWELL_OCR_PORT", "no", "port"), ("INKWELL_OCR_DRAIN_GRACE_S", "-1", "drain_grace_s")],
)
def test_a_setting_that_a_service_does_not_take_is_noticed(
    variable: str, value: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload: Any = next(
        item for item in of_kind(rendered(Build(overlay="laptop")), "Deployment") if _service(item) == "ocr"
    )
    container = {**container_of(workload), "env": [{"name": variable, "value": value}]}
    wrong = {**workload, "spec": {"template": {**pod_of(workload), "spec": {"containers": [container]}}}}
    with pytest.raises(ValueError, match=expected):
        _settings(wrong, (), tmp_path, monkeypatch)
