"""LLaVA's training recipe on transformers' Trainer. llava.shapes.training trains the demo checkpoints from scratch."""
