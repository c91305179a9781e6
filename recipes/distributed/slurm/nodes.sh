#!/bin/bash
# Eight nodes with 8 cards each: one torchrun on every node, which find each other at the first.
#
#   sbatch recipes/distributed/slurm/nodes.sh
#
# The folders of base, rows and run must be the same files on every node.
#SBATCH --job-name=glmtune
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%j.log

set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# Base and tokenizer come from a folder that all nodes share: 64 processes would ask a hub at once.
export HF_HUB_OFFLINE=1

srun torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node 8 \
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:29500" \
  -m glmtune train \
  --base models/chatglm-6b \
  --dataset_path data/alpaca_zh \
  --output_dir output_zh \
  --disable_tqdm true
