"""Captioning a folder of images: plan, run, journal."""
