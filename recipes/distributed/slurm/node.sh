#!/bin/bash
# One node with 8 cards:
#
#   sbatch recipes/distributed/slurm/node.sh
#
# Run it from the folder that holds data/ and output_zh/, which every node must see.
#SBATCH --job-name=glmtune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%j.log

set -euo pipefail

srun torchrun --standalone --nproc_per_node 8 -m glmtune train \
  --base zai-org/chatglm-6b \
  --dataset_path data/alpaca_zh \
  --output_dir output_zh \
  --disable_tqdm true
