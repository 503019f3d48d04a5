"""What a rented GPU is asked by scripts/gpu_checks.py: a module per part."""
