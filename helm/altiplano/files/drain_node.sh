#!/bin/bash
# Before a Ray worker's pod ends: tell Ray, which moves replicas and warns training, then wait for what still runs here. $1: seconds, at most.
# `ray stop` instead would cut every stream and task at once. What Ray starts is named ray::... in the list of processes.
set -u
seconds=$1
node=$(sed -zn 's/^--node_id=//p' /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' | head -n 1)
if [[ -z $node ]]; then
  exit 0
fi
# A head that is being replaced answers again within a minute; one that is deleted with its cluster never does.
until timeout 30 ray drain-node --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message "its pod is being deleted" --deadline-remaining-seconds "$seconds"; do
  if ((SECONDS > 60)); then
    exit 0
  fi
  sleep 2
done
busy() {
  grep -Ezhs '^ray::' /proc/[0-9]*/cmdline | grep -Ezvq '^ray::(IDLE|DashboardAgent|RuntimeEnvAgent)'
}
while ((SECONDS < seconds)) && busy; do
  sleep 1
done
