"""Generates the protobuf modules before the package is built or installed, so that a wheel holds them."""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface):
    """Runs protos/generate.py."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files; raises CalledProcessError when a proto does not compile."""
        runpy.run_path(str(Path(self.root) / "protos" / "generate.py"))["generate"]()
