"""Training of the two demo checkpoints from scratch, on a CPU: `bash scripts/demo/train.sh v1.5`."""
