"""The loop of both trainings, learning rates, precision, losses, self-critical training, resuming."""
