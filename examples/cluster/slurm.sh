#!/bin/bash
# A run on machines that Slurm gives: `sbatch examples/cluster/slurm.sh`, from the tree that shall run, which lies
# on a filesystem of all machines. The run goes on where it stopped when the same job is submitted again.
#SBATCH --job-name=consilience
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

RUNS=${RUNS:-$SLURM_SUBMIT_DIR/runs}
PORT=$((20000 + SLURM_JOB_ID % 20000))
# Read this way, no pipe breaks while its program still writes (with `head` in a pipe, one now and then did).
read -r HEAD _ < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r ADDRESS _ < <(srun --nodes=1 --ntasks=1 --nodelist="$HEAD" hostname --ip-address)

export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$RUNS/.ray-token-$SLURM_JOB_ID"
export RAY_ADDRESS="$ADDRESS:$PORT"
mkdir -p "$RUNS"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")

# Each machine's part of the cluster ends with its step, and the steps with this job.
srun --nodes=1 --ntasks=1 --nodelist="$HEAD" --overlap \
    env -u RAY_ADDRESS ray start --head --block --node-ip-address="$ADDRESS" --port="$PORT" --include-dashboard=false &
until srun --nodes=1 --ntasks=1 --nodelist="$HEAD" --overlap ray status > /dev/null 2>&1; do sleep 2; done
if ((SLURM_NNODES > 1)); then
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$HEAD" --overlap \
        ray start --block --address="$RAY_ADDRESS" &
fi

# The first 8 GPUs train, the others sample; `placement_limit_s` is the time for all machines to join.
trap 'kill -TERM "$DRIVER"' TERM
srun --nodes=1 --ntasks=1 --nodelist="$HEAD" --overlap \
    consilience run cluster=join cluster.placement=apart cluster.placement_limit_s=600 \
    engine.ranks=8 rollout.num_workers=16 cluster.worker_gpus=1 cluster.spread=true \
    run.name="slurm-${RUN:-$SLURM_JOB_NAME}" run.folder="$RUNS" &
DRIVER=$!
STATUS=0
wait "$DRIVER" || STATUS=$?
wait "$DRIVER" 2> /dev/null || true # after the signal the driver has two minutes to save what runs
rm -f "$RAY_AUTH_TOKEN_PATH"
exit "$STATUS"
