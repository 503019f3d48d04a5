"""Training: the objective, the run folder, the loop."""
