"""Where pods may go, on nodes as the vendors' operators label and taint them."""

import pytest

from tests.k8s.rendered import Object, container_of, labels_of, matches, name_of, of_kind, pod_of, workloads

NFD = "feature.node.kubernetes.io/"
# Labels, taints and GPUs of nodes, by what made them so.
NODES: dict[str, tuple[str, dict[str, str], list[Object], dict[str, int]]] = {
    "plain": ("cpu", {"kubernetes.io/arch": "amd64"}, [], {}),
    "nvidia-operator": (
        "cuda",
        {"nvidia.com/gpu.present": "true", f"{NFD}pci-10de.present": "true"},
        [{"key": "nvidia.com/gpu", "effect": "NoSchedule", "value": "present"}],
        {"nvidia.com/gpu": 1},
    ),
    "nvidia-nfd-only": ("cuda", {f"{NFD}pci-10de.present": "true"}, [], {"nvidia.com/gpu": 8}),
    "nvidia-aks": (
        "cuda",
        {"nvidia.com/gpu.present": "true"},
        [{"key": "sku", "effect": "NoSchedule", "value": "gpu"}],
        {"nvidia.com/gpu": 1},
    ),
    "amd-operator": (
        "rocm",
        {f"{NFD}amd-gpu": "true"},
        [{"key": "amd.com/gpu", "effect": "NoSchedule", "value": "true"}],
        {"amd.com/gpu": 1},
    ),
    "amd-labeller": (
        "rocm",
        {"amd.com/gpu.product-name": "MI300X", "amd.com/gpu.device-id": "74a1"},
        [],
        {"amd.com/gpu": 8},
    ),
    "amd-nfd-only": ("rocm", {f"{NFD}pci-1002.present": "true"}, [], {"amd.com/gpu": 1}),
}
GPUS = {"cuda": "nvidia.com/gpu", "rocm": "amd.com/gpu"}


def _tolerates(pod: Object, taint: Object) -> bool:
    return any(
        toleration["key"] == taint["key"]
        and toleration["effect"] == taint["effect"]
        and (toleration["operator"] == "Exists" or toleration.get("value") == taint["value"])
        for toleration in pod.get("tolerations", ())
    )


def _fits(workload: Object, labels: dict[str, str], taints: list[Object], gpus: dict[str, int]) -> bool:
    pod = pod_of(workload)["spec"]
    affinity = pod.get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [{}])
    limits = container_of(workload)["resources"]["limits"]
    return (
        any(matches(term, labels) for term in terms)
        and all(_tolerates(pod, taint) for taint in taints)
        and all(int(limits.get(gpu, 0)) <= gpus.get(gpu, 0) for gpu in GPUS.values())
    )


@pytest.mark.parametrize("node", NODES)
def test_a_pool_goes_to_its_hardware_and_nowhere_else(objects: tuple[Object, ...], node: str) -> None:
    has, labels, taints, gpus = NODES[node]
    for workload in workloads(objects):
        wants = labels_of(workload).get("inkwell.dev/hardware")
        if wants is not None:
            assert _fits(workload, labels, taints, gpus) == (wants == has), (name_of(workload), node)


def test_a_gpu_a_pod_and_no_second_one_while_it_is_replaced(objects: tuple[Object, ...]) -> None:
    for workload in workloads(objects):
        hardware = labels_of(workload).get("inkwell.dev/hardware", "")
        limits = container_of(workload)["resources"]["limits"]
        assert {name: limits.get(name) for name in GPUS.values()} == {
            name: "1" if name == GPUS.get(hardware) else None for name in GPUS.values()
        }
        if workload["kind"] == "Deployment" and hardware in GPUS:
            assert workload["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
        if (
            workload["kind"] == "Deployment"
            and hardware not in GPUS
            and "rollingUpdate" in workload["spec"]["strategy"]
        ):
            assert workload["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_rocm_opens_the_devices_of_the_node(objects: tuple[Object, ...]) -> None:
    for workload in workloads(objects):
        groups = pod_of(workload)["spec"]["securityContext"].get("supplementalGroups", [])
        assert bool(groups) == (labels_of(workload).get("inkwell.dev/hardware") == "rocm")


def test_the_gateway_goes_before_services_and_these_before_jobs(objects: tuple[Object, ...]) -> None:
    value = {name_of(item): item["value"] for item in of_kind(objects, "PriorityClass")}
    assert value["inkwell-gateway"] > value["inkwell-serving"] > value["inkwell-batch"]
    for workload in workloads(objects):
        wanted = "inkwell-batch" if workload["kind"] == "Job" else "inkwell-serving"
        if labels_of(workload)["app.kubernetes.io/name"] == "gateway":
            wanted = "inkwell-gateway"
        assert pod_of(workload)["spec"]["priorityClassName"] == wanted
