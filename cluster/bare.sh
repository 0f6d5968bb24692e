#!/usr/bin/env bash
# A Ray cluster on machines that SSH reaches. Each machine needs the same sdbatch, and its `ray` on
# the PATH.
#
#   up      cluster/bare.sh up HEAD WORKER...       the head also draws
#           ssh -NL 8265:127.0.0.1:8265 HEAD &
#           export RAY_AUTH_MODE=token
#   submit  sdbatch submit jobs/sd15.yaml --address http://127.0.0.1:8265
#   look    sdbatch status OUTPUT --watch; http://127.0.0.1:8265; ssh HEAD ray status
#   drain   cluster/bare.sh drain WORKER            before a machine leaves: then look, then down
#   down    cluster/bare.sh down WORKER... HEAD
#
# `up HEAD WORKER` also adds workers later: a head that already runs is not changed. Ray's ports
# must be open between the machines and closed to all others, because there is a token but no TLS.
set -euo pipefail

on() { # HOST COMMAND: run it there with the environment of a login shell
  ssh -o BatchMode=yes "$1" "bash -lc $(printf %q "export RAY_AUTH_MODE=token; $2")"
}
up() {
  local token address='' start='ray start --disable-usage-stats'
  [ -f ~/.ray/auth_token ] || ray get-auth-token --generate >/dev/null
  token=$(<~/.ray/auth_token) # read before it is written, because machines may share a home
  for host in "$@"; do
    printf %s "$token" | on "$host" 'install -Dm600 /dev/stdin ~/.ray/auth_token'
    if [ -z "$address" ]; then
      address=${1#*@}:6379
      on "$host" "ray status >/dev/null 2>&1 || $start --head --port=6379"
    else
      on "$host" "$start --address=$address"
    fi
  done </dev/null
}
drain() {
  for host in "$@"; do
    on "$host" 'ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message by-hand'
  done </dev/null
}
down() {
  for host in "$@"; do
    on "$host" 'ray stop'
  done </dev/null
}

case "${1:-}" in
  up | drain | down)
    (($# > 1)) || { echo "$0 $1: no machine given. Use $0 $1 HOST..." >&2; exit 2; }
    "$@"
    ;;
  *)
    sed -n '2,/^[^#]/s/^# \?//p' "$0" >&2
    exit 2
    ;;
esac
