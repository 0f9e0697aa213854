"""Training of the demo checkpoints, on a CPU: `bash scripts/demo/train.sh v1.5`."""
