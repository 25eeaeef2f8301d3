"""Scores, comparisons, figures and the gallery."""
