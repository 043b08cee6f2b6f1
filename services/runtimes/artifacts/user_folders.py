"""Folders of the user who runs a service, by the XDG base directory specification."""

import os
from pathlib import Path


def data_folder() -> Path:
    """What is to be kept: ~/.local/share/inkwell, or below XDG_DATA_HOME."""
    return _base("XDG_DATA_HOME", ".local/share") / "inkwell"


def cache_folder() -> Path:
    """What can be made or fetched again: ~/.cache/inkwell, or below XDG_CACHE_HOME."""
    return _base("XDG_CACHE_HOME", ".cache") / "inkwell"


def _base(variable: str, otherwise: str) -> Path:
    chosen = os.environ.get(variable, "")
    # The specification: a relative path is to be ignored.
    return Path(chosen) if os.path.isabs(chosen) else Path.home() / otherwise
