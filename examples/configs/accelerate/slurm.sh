#!/usr/bin/env bash
# Several machines of eight GPUs, from a folder that all of them share:  sbatch -N 4 slurm.sh CONFIG RUN [KEY=VALUE ...]
# One launcher a machine; sharded with FSDP2, as fsdp.yaml says; MODE=ddp for whole copies. Three minutes before its time
# is up the training is told to save, and the job asks to be queued again.
#SBATCH --job-name=farmer
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
set -euo pipefail
config=$1 run=$2
shift 2
here=${FARMER_CONFIGS:-examples/configs/accelerate}
mode=${MODE:-fsdp}
gpus=${SLURM_GPUS_ON_NODE:-8}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # seconds that the launcher leaves its processes to save in
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

told=
trap 'told=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
# $SLURM_NODEID is for each machine to fill in
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file "$0/$1.yaml" --num_machines "$2" --num_processes "$3" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$4" --main_process_port 29500 --rdzv_backend static -m farmer_examples train "${@:5}"
' "$here" "$mode" "$SLURM_NNODES" "$((SLURM_NNODES * gpus))" "$address" \
  --config "$config" --output "$run" --resume "$@" &
job=$!
status=0
wait "$job" || status=$?
if [ -n "$told" ]; then # the first wait ended with the signal
  status=0
  wait "$job" || status=$?
  if [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then # 0: it was at its end
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
