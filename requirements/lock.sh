#!/usr/bin/env bash
# Write requirements/cpu.txt and requirements/dev.txt: the exact versions that pip chooses for pyproject.toml today.
# Run through `make lock`; commit the difference after the tests pass with it.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r requirements/torch.txt
header="# Written by \`make lock\` from pyproject.toml; do not edit. torch stands in torch.txt and is installed first."
freeze() { "${pip[@]}" freeze --exclude torch --exclude inkwell; }
# Building an editable install needs these three in the environment itself.
"${pip[@]}" install ".[cpu,compiler,tracing]" hatchling==1.27.0 editables grpcio-tools==1.85.1 mypy-protobuf==5.1.0
{ echo "$header"; freeze; } > "$work/cpu.txt"
"${pip[@]}" install ".[cpu,compiler,tracing,dev]"
{ echo "$header"; echo "-r cpu.txt"; freeze | grep -vxFf "$work/cpu.txt"; } > "$work/dev.txt"
"${pip[@]}" check
mv "$work/cpu.txt" "$work/dev.txt" requirements/
