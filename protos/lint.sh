#!/usr/bin/env bash
# Lint the protos with buf (npm @bufbuild/buf) in a staging folder that also holds the google protos they import.
set -euo pipefail
cd "$(dirname "$0")/.."
version=1.75.0
stage=build/protos
if ! command -v npm >/dev/null; then
  echo "buf comes through npm, which is missing: apt-get install npm" >&2
  exit 1
fi
if [ ! -x build/buf/node_modules/.bin/buf ]; then
  echo "· installing buf $version"
  npm install --silent --no-audit --no-fund --prefix build/buf "@bufbuild/buf@$version" >/dev/null
fi
rm -rf "$stage" && mkdir -p "$stage/google/rpc" "$stage/google/api"
cp -r protos/inkwell protos/buf.yaml "$stage/"
PYTHONPATH=protos .venv/bin/python - "$stage" <<'EOF'
import importlib.util, pathlib, shutil, sys
import generate
stage = pathlib.Path(sys.argv[1])
site_packages = pathlib.Path(importlib.util.find_spec("google.rpc").submodule_search_locations[0]).parents[1]
for needed in (site_packages / "google" / "rpc" / "status.proto", *(site_packages / "google" / "api").glob("*.proto")):
    shutil.copy(needed, stage / needed.parent.relative_to(site_packages))
generate.stage_operations(site_packages, stage)
EOF
cd "$stage"
../buf/node_modules/.bin/buf lint --path inkwell
../buf/node_modules/.bin/buf format --diff --exit-code --path inkwell
