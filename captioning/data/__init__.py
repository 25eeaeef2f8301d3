"""Annotations, images and prepared data: what is read and written on disk."""
