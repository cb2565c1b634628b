#!/usr/bin/env bash
#SBATCH --job-name=vdt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
# sbatch docs/how-to/slurm.sh BUNDLE DATASET_DIR [further settings], from the root of the repository.
# A job that is requeued goes on from its last whole epoch.
set -euo pipefail
cd "$1"
data="$2"
shift 2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=100000
# In a job, ignite takes Slurm's task on the node, of which there is one, for the rank of each process: it is not told.
srun --label --kill-on-bad-exit=1 env --unset=SLURM_JOB_ID torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" \
    -m monai.bundle run --config_file "['configs/train.yaml', 'configs/multi_gpu_train.yaml']" \
    --bundle_root . --dataset_dir "$data" "$@"
