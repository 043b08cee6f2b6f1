"""The models that lie in a folder of models, each in a subfolder under its own name."""

import re
from pathlib import Path

# Names from a request are looked up among these and never made into a path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def folders_in(model_folder: str, holding: str) -> list[Path]:
    """The subfolders that hold a file named `holding`, sorted by name; none when the folder is not there."""
    if not model_folder:
        return []
    try:
        # A folder that is being written has no such file yet, or lies under a name that begins with a dot.
        return sorted(
            folder
            for folder in Path(model_folder).expanduser().iterdir()
            if _NAME.fullmatch(folder.name) and (folder / holding).is_file()
        )
    except OSError:  # it may be gone for a while, such as a volume that is mounted again
        return []
