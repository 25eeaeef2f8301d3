"""The loop of both trainings, learning rates and precision, losses, self-critical training, resuming, reports."""
