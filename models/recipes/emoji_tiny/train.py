"""Train emoji-tiny from nothing: ``python -m models.recipes.emoji_tiny.train --work DIR``.

Without ``--stage`` all stages run in order. Every stage works for a budget of minutes, writes checkpoints every few
minutes and resumes from them, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

#: stage -> minutes on one core that gave the quality in the model card
STAGES: dict[str, float] = {"vae": 22, "text": 8, "unet": 61, "polish": 4, "preview": 4}


def main() -> None:
    """Read the command line and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, checkpoints and the export")
    parser.add_argument("--stage", choices=[*STAGES, "export"], help="run one stage only")
    parser.add_argument("--styles", nargs="+", default=["noto", "twemoji"], help="styles the prompts know")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    for stage, minutes in STAGES.items():
        parser.add_argument(f"--{stage}-minutes", type=float, default=minutes, help="time budget (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in [args.stage] if args.stage else [*STAGES, "export"]:
        module = importlib.import_module(f".{stage}", __package__)
        if stage == "export":
            module.export(args.work)
        elif stage in ("text", "unet", "polish"):
            module.train(args.work, getattr(args, f"{stage}_minutes"), args.styles)
        else:
            module.train(args.work, getattr(args, f"{stage}_minutes"))


if __name__ == "__main__":
    main()
