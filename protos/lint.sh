#!/usr/bin/env bash
# Lint the protos with buf (npm @bufbuild/buf), and hold them to the last release: what it could say is still understood.
# `protos/lint.sh --release` writes the contract as it is now into protos/released.binpb, for a release.
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
.venv/bin/python protos/staged.py "$stage"
cd "$stage"
buf=../buf/node_modules/.bin/buf
released=../../protos/released.binpb
"$buf" lint --path inkwell
"$buf" format --diff --exit-code --path inkwell
"$buf" breaking --path inkwell --against "$released"
if [ "${1:-}" = --release ]; then
  "$buf" build --path inkwell --exclude-source-info --output "$released"
  echo "· protos/released.binpb is the contract as it is now"
fi
