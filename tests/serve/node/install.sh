#!/usr/bin/env bash
# Fetch OpenAI's client for Node as package-lock.json pins it: install.sh DIRECTORY. What cannot be had is named; its tests then skip.
set -euo pipefail
directory="$1" here="$(cd "$(dirname "$0")" && pwd)"
if ! command -v npm >/dev/null || ! command -v node >/dev/null; then
  echo "no Node.js: the contract of OpenAI's Node client will be skipped" >&2
  exit 0
fi
mkdir -p "${directory}"
if cmp -s "${here}/package-lock.json" "${directory}/installed"; then exit 0; fi
cp "${here}/package.json" "${here}/package-lock.json" "${directory}/"
if (cd "${directory}" && npm ci --ignore-scripts --no-audit --no-fund --silent); then
  cp "${here}/package-lock.json" "${directory}/installed"
else
  echo "npm cannot fetch OpenAI's client: the contract of the Node client will be skipped" >&2
fi
