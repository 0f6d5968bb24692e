#!/usr/bin/env bash
# A batch run under Slurm with its own Ray cluster on the nodes of the allocation.
#
#   up      nothing; sdbatch is in an active virtual environment that all nodes can read
#   submit  sbatch cluster/slurm.sh jobs/sd15.yaml --set output.path=/shared/sd15
#   look    squeue --me; tail -f sdbatch-JOBID.log; sdbatch status /shared/sd15 --watch
#   down    scancel JOBID      committed shards stay; submit it again to resume
#
# When the job reaches its time limit or is preempted, it returns to the queue and resumes later.
# The arguments are those of `sdbatch run`, and its exit code becomes the exit code of the job.
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
# If GPUs have types, or belong to a partition, use these instead of --gpus-per-node:
##SBATCH --gres=gpu:h100:8
##SBATCH --partition=gpu
set -uo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ip=$(hostname -I | awk '{print $1}') # of the first node, where this script runs
# The Ray of another job may run on the same node, so each has its own ports, folder and token.
port=$((20000 + SLURM_JOB_ID % 6000 * 2))
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_ADDRESS=$ip:$port RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # all nodes stop at the same time

log=sdbatch-$SLURM_JOB_ID-ray.log
node() { # NUMBER, NODES, arguments of `ray start`
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
trap 'requeue=yes; stop' USR1 # the time limit is near
trap stop TERM

# `actors: auto` counts the nodes that have joined, so wait for all of them.
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
  echo "Error: Ray did not start on all ${#nodes[@]} nodes within 300 s. See $log." >&2
  end 2
fi

sdbatch run "$@" &
run=$!
while wait "$run"; code=$?; kill -0 "$run" 2>/dev/null; do :; done # a signal interrupts wait
end "$code"
