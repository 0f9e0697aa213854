"""Training of the two demo checkpoints, from nothing, on a CPU: `bash scripts/demo/train.sh v1.5`."""
