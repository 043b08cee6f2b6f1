"""Write the software bill of materials of a Python environment, as CycloneDX 1.6 JSON, to standard output.

    /opt/venv/bin/python requirements/sbom.py inkwell-ocr-cpu > sbom.cdx.json

lists every distribution of the environment that runs it. What the image's operating system brings is not in it: the
builder's own attestation (docs/containers.md) has that too.
"""

import json
import re
import sys
from importlib.metadata import Distribution, distributions
from typing import Any


def bill(name: str, found: list[Distribution]) -> dict[str, Any]:
    """The document for the application `name`, its components sorted by name so that equal images have equal bills."""
    components = [_component(distribution) for distribution in found]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": name, "bom-ref": name}},
        "components": sorted(components, key=lambda component: component["name"]),
    }


def _component(distribution: Distribution) -> dict[str, Any]:
    name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
    # A local version's "+" is not allowed as it is in a package URL.
    package_url = f"pkg:pypi/{name}@{distribution.version.replace('+', '%2B')}"
    component: dict[str, Any] = {
        "type": "library",
        "name": name,
        "version": distribution.version,
        "purl": package_url,
        "bom-ref": package_url,
    }
    # An SPDX expression (PEP 639); older metadata has free text, which is not one.
    if "License-Expression" in distribution.metadata:
        component["licenses"] = [{"expression": distribution.metadata["License-Expression"]}]
    return component


if __name__ == "__main__":
    print(json.dumps(bill(sys.argv[1], list(distributions())), indent=1))
