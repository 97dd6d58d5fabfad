#!/bin/bash
# The endpoint of compose.yaml: Ray, and the Serve application of the file $1. When the container is to stop, answers that run are ended first.
set -eu
config=$1
ray start --head --num-gpus="${ALTIPLANO_GPUS:-1}" --dashboard-host=127.0.0.1
serve deploy "$config"

leave() {
  # The same place without applications: replicas end their answers, and the proxy stays until they have.
  { sed '/^applications:/,$d' "$config" && echo 'applications: []'; } > /tmp/none.yaml
  serve deploy /tmp/none.yaml
  while grep -Ezqs '^ray::ServeReplica' /proc/[0-9]*/cmdline; do
    sleep 1
  done
  ray stop
  exit 0
}
trap leave TERM INT
sleep infinity &
wait $!
