"""The loop of both trainings, losses, self-critical training, resuming, reports."""
