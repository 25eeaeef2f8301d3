"""Pretrained weights and checkpoints."""
