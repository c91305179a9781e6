#!/bin/bash
# Cards that may be taken away, or a time limit shorter than the run: the job saves, goes back into
# the queue and resumes.
#
#   sbatch recipes/distributed/slurm/requeue.sh
#
# Five minutes before the limit, and where another job takes the cards, Slurm sends SIGTERM to the
# processes. glmtune then ends its step, writes a checkpoint and exits with code 130. Slurm starts
# each process itself here: torchrun would kill those that take more than 30 s to save.
#SBATCH --job-name=glmtune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -uo pipefail

output=output_zh
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=29500 WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=1

srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' start \
  glmtune train \
  --base models/chatglm-6b \
  --dataset_path data/alpaca_zh \
  --output_dir "$output" \
  --save_steps 200 \
  --save_total_limit 2 \
  --disable_tqdm true \
  --resume_from_checkpoint auto
code=$?

if [ "$code" -eq 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
