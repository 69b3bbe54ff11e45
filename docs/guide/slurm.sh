#!/bin/bash
#SBATCH --job-name=iclip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --signal=TERM@120
#SBATCH --requeue
# At the end of the time limit the run saves a checkpoint; started again, it goes on from there.
export MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'accelerate launch --multi_gpu --mixed_precision fp16 \
    --num_machines $SLURM_NNODES --num_processes $((4 * SLURM_NNODES)) \
    --machine_rank $SLURM_PROCID --main_process_ip $MAIN --main_process_port 29500 \
    -m iclip_hf.cli train --config iclip-vit-b16 --per_device_train_batch_size 128 \
    --output_dir runs/iclip-vit-b16 --resume'
