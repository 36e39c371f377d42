"""What a training step will cost on a TPU, from the TPU compiler on a machine that has none."""
