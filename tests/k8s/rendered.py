"""The manifests as `kubectl kustomize` renders them: the overlays, and combinations of pools and components."""

import functools
import itertools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = tuple(sorted(path.name for path in (K8S / "overlays").iterdir()))

Object = dict[str, Any]

# In the order that an overlay lists them: jobs before the components that say where they put their work.
COMPONENTS = (
    "finetune",
    "tensorrt-build",
    "gateway-hpa",
    "models-pvc",
    "s3",
    "postgres",
    "mtls",
    "gateway-api",
    "gateway-api-mtls",
    "monitoring",
    "tracing",
    "network-policies",
)
# What a component asks for, as k8s/README.md has it.
_NEEDS = {
    "finetune": {"models-pvc"},
    "tensorrt-build": {"s3"},
    "gateway-api-mtls": {"mtls", "gateway-api"},
}
# Overlays have every pool in every way of scaling; these go with the combinations, in turn.
_POOLS = (
    ("cpu",),
    ("cuda", "cpu"),
    ("rocm-keda",),
    ("cuda-hpa", "rocm", "cpu-keda"),
    ("cuda",),
    ("rocm-hpa", "cpu-hpa"),
)
# Components in a combination, before what they need is added: with half of them, few combinations have every pair.
_AT_A_TIME = len(COMPONENTS) // 2


@dataclass(frozen=True)
class Build:
    """Something to render: an overlay by its name, or pools and components that somebody may put together."""

    overlay: str = ""
    pools: tuple[str, ...] = ()
    components: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.overlay or "+".join((*self.pools, *(name for name in COMPONENTS if name in self.components)))


def _apart(components: frozenset[str]) -> set[tuple[str, str]]:
    """The pairs of which the first is there and the second is not."""
    return {(there, away) for there in components for away in COMPONENTS if away not in components}


def _combinations() -> Iterator[Build]:
    """No component, all, and so many that of any two each is there without the other, unless it needs it."""
    rows = [
        frozenset(chosen).union(*(_NEEDS.get(name, set()) for name in chosen))
        for chosen in itertools.combinations(COMPONENTS, _AT_A_TIME)
    ]
    sets = [frozenset[str](), frozenset(COMPONENTS)]
    missing = set().union(*(_apart(row) for row in rows))
    while missing:
        sets.append(max(rows, key=lambda row: len(missing & _apart(row))))
        missing -= _apart(sets[-1])
    for components, pools in zip(sets, itertools.cycle(_POOLS), strict=False):
        # Only the compiler, which is in the pool of processors, has a database.
        alone = "postgres" in components and not any(pool.startswith("cpu") for pool in pools)
        yield Build(pools=(*pools, "cpu") if alone else pools, components=components)


COMBINATIONS = tuple(_combinations())
BUILDS = (*(Build(overlay=name) for name in OVERLAYS), *COMBINATIONS)


@functools.cache
def rendered(build: Build) -> tuple[Object, ...]:
    """The objects, in the order that kubectl would apply them. Nobody may change them: tests share them."""
    if build.overlay:
        return tuple(yaml.load_all(render(K8S / "overlays" / build.overlay), Loader=yaml.CSafeLoader))
    with tempfile.TemporaryDirectory(prefix="inkwell-overlay-") as folder:
        # kustomize takes no absolute paths.
        base = os.path.relpath(K8S, Path(folder).resolve())
        whole = {
            "namespace": "inkwell",
            "resources": [f"{base}/base/common", f"{base}/base/gateway", *(f"{base}/pools/{p}" for p in build.pools)],
            "components": [f"{base}/components/{name}" for name in COMPONENTS if name in build.components],
        }
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(whole))
        return tuple(yaml.load_all(render(Path(folder)), Loader=yaml.CSafeLoader))


def render(folder: Path) -> str:
    """What `kubectl kustomize` prints; fails with what it says if it cannot, or warns."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def of_kind(objects: tuple[Object, ...], *kinds: str) -> list[Object]:
    """Those of these kinds."""
    return [item for item in objects if item["kind"] in kinds]


def workloads(objects: tuple[Object, ...]) -> list[Object]:
    """What makes pods."""
    return of_kind(objects, "Deployment", "Job")


def name_of(item: Object) -> str:
    """Its name."""
    return str(item["metadata"]["name"])


def pod_of(workload: Object) -> Object:
    """The pod that it makes: metadata and spec."""
    template: Object = workload["spec"]["template"]
    return template


def labels_of(workload: Object) -> dict[str, str]:
    """The labels of its pods."""
    labels: dict[str, str] = pod_of(workload)["metadata"]["labels"]
    return labels


def container_of(workload: Object) -> Object:
    """Its only container."""
    (container,) = pod_of(workload)["spec"]["containers"]
    assert "initContainers" not in pod_of(workload)["spec"]
    return dict(container)


def ports_of(workload: Object) -> dict[str, int]:
    """Its ports by name."""
    return {port["name"]: port["containerPort"] for port in container_of(workload).get("ports", ())}


def environment_of(workload: Object, objects: tuple[Object, ...] = ()) -> dict[str, Object]:
    """Its variables by name, as they stand in the manifest; those of whole ConfigMaps too if `objects` has these."""
    variables = container_of(workload).get("env", [])
    assert len({variable["name"] for variable in variables}) == len(variables)
    maps = {name_of(item): item["data"] for item in of_kind(objects, "ConfigMap")}
    whole: dict[str, Object] = {}
    for source in container_of(workload).get("envFrom", ()) if objects else ():
        data = maps[source["configMapRef"]["name"]]
        whole |= {name: {"name": name, "value": value} for name, value in data.items()}
    return whole | {variable["name"]: variable for variable in variables}


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector takes these labels. Raises KeyError for an operator that is not used here."""
    expressions: dict[str, Callable[[str | None, list[str]], bool]] = {
        "In": lambda value, values: value in values,
        "NotIn": lambda value, values: value not in values,
        "Exists": lambda value, _: value is not None,
        "DoesNotExist": lambda value, _: value is None,
    }
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        expressions[asked["operator"]](labels.get(asked["key"]), asked.get("values", []))
        for asked in selector.get("matchExpressions", ())
    )
