"""What a stage does: objective, pure step, evaluation function. No I/O and no config."""
