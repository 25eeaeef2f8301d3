"""Beam search and sampling, their options and word rules."""
