"""What objects say of one another is so: selectors, ports, names, certificates, and the gateway's pools."""

import pytest

from inkwell.version import __version__ as VERSION
from services.gateway import config
from services.gateway.config import GatewayConfig, parse_target
from tests.k8s.rendered import (
    Build,
    Object,
    container_of,
    environment_of,
    labels_of,
    matches,
    name_of,
    of_kind,
    pod_of,
    ports_of,
    rendered,
    workloads,
)

# Made by whoever sets a cluster up: k8s/README.md.
BROUGHT = {
    ("Secret", "inkwell-s3"),
    ("Secret", "inkwell-postgres"),
    ("Secret", "inkwell-public-tls"),
    ("ConfigMap", "inkwell-authority"),
    ("ConfigMap", "kube-root-ca.crt"),
}


def _there(objects: tuple[Object, ...]) -> set[tuple[str, str]]:
    made = {("Secret", item["spec"]["secretName"]) for item in of_kind(objects, "Certificate")}
    return BROUGHT | made | {(item["kind"], name_of(item)) for item in objects}


def test_selectors_find_their_own_pods_and_no_others(objects: tuple[Object, ...]) -> None:
    pods = {name_of(item): labels_of(item) for item in workloads(objects)}
    for deployment in of_kind(objects, "Deployment"):
        own = [name for name, labels in pods.items() if matches(deployment["spec"]["selector"], labels)]
        assert own == [name_of(deployment)]
    for service in of_kind(objects, "Service"):
        own = [name for name, labels in pods.items() if matches({"matchLabels": service["spec"]["selector"]}, labels)]
        assert own == [name_of(service)]
    for policy in of_kind(objects, "NetworkPolicy"):
        if policy["spec"]["podSelector"]:
            assert any(matches(policy["spec"]["podSelector"], labels) for labels in pods.values()), name_of(policy)


def test_every_service_has_a_budget_for_disruptions(objects: tuple[Object, ...]) -> None:
    budgets = {name_of(item): item["spec"] for item in of_kind(objects, "PodDisruptionBudget")}
    assert budgets.keys() == {name_of(item) for item in of_kind(objects, "Deployment")}
    for deployment in of_kind(objects, "Deployment"):
        budget = budgets[name_of(deployment)]
        assert budget["selector"] == deployment["spec"]["selector"]
        # One that never lets a pod go would hold up the upgrade of a node.
        assert budget["maxUnavailable"] == 1


def test_ports_are_there(objects: tuple[Object, ...]) -> None:
    by_name = {name_of(item): item for item in workloads(objects)}
    for service in of_kind(objects, "Service"):
        target = by_name[name_of(service)]
        for port in service["spec"]["ports"]:
            if target["kind"] == "Deployment":
                assert ports_of(target)[port["targetPort"]] == port["port"]
    ours = {name_of(item): item["spec"]["ports"] for item in of_kind(objects, "Service")}
    for route in of_kind(objects, "GRPCRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                assert backend["port"] in [port["port"] for port in ours[backend["name"]]]
    for monitor in of_kind(objects, "PodMonitor"):
        for deployment in of_kind(objects, "Deployment"):
            assert matches(monitor["spec"]["selector"], labels_of(deployment))
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                assert endpoint["port"] in ports_of(deployment)


def test_pools_are_headless_and_the_gateway_is_not(objects: tuple[Object, ...]) -> None:
    for service in of_kind(objects, "Service"):
        assert (service["spec"].get("clusterIP") == "None") == (name_of(service) != "gateway")


def test_names_refer_to_something(objects: tuple[Object, ...]) -> None:
    there = _there(objects)
    for workload in workloads(objects):
        pod, name = pod_of(workload)["spec"], name_of(workload)
        wanted = {("ServiceAccount", pod["serviceAccountName"]), ("PriorityClass", pod["priorityClassName"])}
        if "subdomain" in pod:
            wanted.add(("Service", pod["subdomain"]))
        for volume in pod["volumes"]:
            for source in (volume, *volume.get("projected", {}).get("sources", ())):
                if "configMap" in source and not source["configMap"].get("optional"):
                    wanted.add(("ConfigMap", source["configMap"]["name"]))
            if "secret" in volume:
                wanted.add(("Secret", volume["secret"]["secretName"]))
            if "persistentVolumeClaim" in volume:
                wanted.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        for whole in container_of(workload).get("envFrom", ()):
            wanted.add(("ConfigMap", whole["configMapRef"]["name"]))
        for variable in environment_of(workload).values():
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                wanted.add(("Secret", source["secretKeyRef"]["name"]))
        assert wanted <= there, (name, wanted - there)
        used = {mount["name"] for mount in container_of(workload)["volumeMounts"]}
        assert used == {volume["name"] for volume in pod["volumes"]}
    for gateway in of_kind(objects, "Gateway"):
        secret = gateway["spec"].get("tls", {}).get("backend", {}).get("clientCertificateRef")
        references = [r for listener in gateway["spec"]["listeners"] for r in listener["tls"]["certificateRefs"]]
        for reference in (*references, *([secret] if secret else [])):
            assert ("Secret", reference["name"]) in there
    issuers = {name_of(item) for item in of_kind(objects, "Issuer")}
    for certificate in of_kind(objects, "Certificate"):
        assert certificate["spec"]["issuerRef"]["name"] in issuers


def test_claims_are_all_used(objects: tuple[Object, ...]) -> None:
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for workload in workloads(objects)
        for volume in pod_of(workload)["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert {name_of(item) for item in of_kind(objects, "PersistentVolumeClaim")} == used


def test_images_are_of_this_version_and_of_the_pools_hardware(objects: tuple[Object, ...]) -> None:
    for workload in workloads(objects):
        labels = labels_of(workload)
        hardware = labels.get("inkwell.dev/hardware")
        name = {"tensorrt-build": "compiler"}.get(labels["app.kubernetes.io/name"], labels["app.kubernetes.io/name"])
        tag = VERSION + (f"-{hardware}" if hardware else "")
        assert container_of(workload)["image"] == f"inkwell/{name}:{tag}"
        if hardware:
            assert name_of(workload).endswith(f"-{hardware}")


def _gateway_config(objects: tuple[Object, ...]) -> GatewayConfig:
    """What the gateway reads: the files of its folder by their names, from the ConfigMaps that are mounted there."""
    (gateway,) = [item for item in of_kind(objects, "Deployment") if name_of(item) == "gateway"]
    (volume,) = [volume for volume in pod_of(gateway)["spec"]["volumes"] if volume["name"] == "pools"]
    (mount,) = [item for item in container_of(gateway)["volumeMounts"] if item["name"] == "pools"]
    assert environment_of(gateway)["INKWELL_GATEWAY_CONFIG"]["value"] == mount["mountPath"]
    maps = {name_of(item): item["data"] for item in of_kind(objects, "ConfigMap")}
    files: dict[str, str] = {}
    for source in volume["projected"]["sources"]:
        data = maps.get(source["configMap"]["name"], {})
        assert not files.keys() & data.keys()
        files |= data
    return config.parse("\n---\n".join(files[name] for name in sorted(files)), name="gateway")


def test_the_gateway_knows_every_pool(objects: tuple[Object, ...]) -> None:
    pools = {pool.name: pool for pool in _gateway_config(objects).pools}
    services = {name_of(item): item for item in of_kind(objects, "Service")}
    behind = {name_of(item): labels_of(item) for item in of_kind(objects, "Deployment") if name_of(item) != "gateway"}
    assert pools.keys() == behind.keys()
    for name, labels in behind.items():
        pool = pools[name]
        assert pool.service == labels["app.kubernetes.io/name"]
        assert pool.hardware == labels["inkwell.dev/hardware"]
        (target,) = (parse_target(text) for text in pool.targets)
        service = services[target.host]
        assert (name_of(service), service["metadata"]["namespace"]) == (name, target.namespace)
        assert target.port in [port["port"] for port in service["spec"]["ports"]]


def test_gpus_are_preferred(objects: tuple[Object, ...]) -> None:
    order = [pool.hardware for pool in _gateway_config(objects).pools if pool.service == "ocr"]
    assert order == [hardware for hardware in ("cuda", "rocm", "cpu") if hardware in order]


def test_certificates_have_the_names_that_they_are_called_by(objects: tuple[Object, ...]) -> None:
    certificates = {item["spec"]["secretName"]: item["spec"] for item in of_kind(objects, "Certificate")}
    if not certificates:
        return
    targets = {pool.name: parse_target(pool.targets[0]) for pool in _gateway_config(objects).pools}
    first = certificates["gateway-tls"]["dnsNames"][0]
    for deployment in of_kind(objects, "Deployment"):
        (secret,) = [v["secret"]["secretName"] for v in pod_of(deployment)["spec"]["volumes"] if "secret" in v]
        certificate = certificates[secret]
        assert "server auth" in certificate["usages"]
        if name_of(deployment) == "gateway":
            assert "client auth" in certificate["usages"]
            continue
        target = targets[name_of(deployment)]
        assert f"{target.host}.{target.namespace}.svc" in certificate["dnsNames"]
        service = labels_of(deployment)["app.kubernetes.io/name"].upper()
        assert environment_of(deployment)[f"INKWELL_{service}_CALLERS"]["value"] == f'["{first}"]'
    for policy in of_kind(objects, "BackendTLSPolicy"):
        assert policy["spec"]["validation"]["hostname"] in certificates["gateway-tls"]["dnsNames"]


def test_pictures_wait_for_a_gpu_in_production() -> None:
    (route,) = _gateway_config(rendered(Build(overlay="production"))).routes
    assert (route.service, route.methods, route.only) == ("diffusion", ("Generate",), ["cuda", "rocm"])


def test_a_reference_to_nothing_is_noticed() -> None:
    production = rendered(Build(overlay="production"))
    without = tuple(
        item for item in production if (item["kind"], name_of(item)) != ("PriorityClass", "inkwell-serving")
    )
    with pytest.raises(AssertionError, match="inkwell-serving"):
        test_names_refer_to_something(without)
