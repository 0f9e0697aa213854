"""Training: LLaVA's recipe on transformers' Trainer (train.py), and the demo checkpoints from nothing (demo/)."""
