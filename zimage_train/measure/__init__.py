"""What a training step costs and whether it is exact, measured and counted in one place."""
