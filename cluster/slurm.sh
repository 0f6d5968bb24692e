#!/usr/bin/env bash
# A batch run under Slurm, with a Ray cluster of its own on the nodes of the allocation.
#
#   up      nothing: sdbatch in a virtual environment that all nodes see, active as you submit
#   submit  sbatch cluster/slurm.sh jobs/sd15.yaml --set output.path=/shared/sd15
#   look    squeue --me; tail -f sdbatch-JOBID.log; sdbatch status /shared/sd15 --watch
#   down    scancel JOBID      what is drawn stays; submit it again to go on
#
# At its time limit, and when it is preempted, the job goes back into the queue and then goes on
# where it was. Arguments are those of `sdbatch run`, and its exit code is the job's.
#SBATCH --job-name=sdbatch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=sdbatch-%j.log
# Where GPUs have types, or are a partition's, in place of --gpus-per-node:
##SBATCH --gres=gpu:h100:8
##SBATCH --partition=gpu
set -uo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ip=$(hostname -I | awk '{print $1}') # of the first node, where this script runs
# Another job's Ray may stand on the same node: each has its ports, its folder and its token.
port=$((20000 + SLURM_JOB_ID % 6000 * 2))
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_ADDRESS=$ip:$port RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # all nodes end together

log=sdbatch-$SLURM_JOB_ID-ray.log
node() { # HOW MANY, WHICH, how `ray start` is to start them
  # shellcheck disable=SC2016
  srun --overlap --nodes="$1" --ntasks="$1" --nodelist="$2" bash -c 'mkdir -p "$RAY_TMPDIR" &&
    exec ray start "$@" --block --disable-usage-stats --num-cpus="$SLURM_CPUS_ON_NODE"' \
    ray "${@:3}" >>"$log" 2>&1 &
}
node 1 "${nodes[0]}" --head --node-ip-address="$ip" --port="$port" --include-dashboard=false \
  --ray-client-server-port=$((port + 1))
if ((${#nodes[@]} > 1)); then
  node $((${#nodes[@]} - 1)) "$(IFS=,; echo "${nodes[*]:1}")" --address="$RAY_ADDRESS"
fi

run='' requeue=''
end() { # EXIT CODE
  trap '' USR1 TERM
  # shellcheck disable=SC2046
  kill $(jobs -p) 2>/dev/null
  wait
  srun --overlap --ntasks-per-node=1 rm -rf "$RAY_TMPDIR"
  if [ -n "$requeue" ] && [ "$1" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$1"
}
# shellcheck disable=SC2317  # the traps call it
stop() {
  if [ -n "$run" ]; then
    kill -TERM "$run"
  else
    end 1
  fi
}
trap 'requeue=yes; stop' USR1 # the time is nearly over
trap stop TERM

# What `actors: auto` counts are the nodes that are there.
if ! timeout 300 python - "${#nodes[@]}" 2>>"$log" <<'WAIT'; then
import sys, time
import ray

while not ray.is_initialized():
    try:
        ray.init(log_to_driver=False, logging_level="critical")
    except (ConnectionError, RuntimeError, OSError):
        time.sleep(1)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(1)
WAIT
  echo "Ray = not on all ${#nodes[@]} nodes after 300 s: the reason must be in $log." >&2
  end 2
fi

sdbatch run "$@" &
run=$!
while wait "$run"; code=$?; kill -0 "$run" 2>/dev/null; do :; done # a signal ends a wait
end "$code"
