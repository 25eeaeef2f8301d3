"""What every captioner gives; attention models; BLIP and its kin."""
