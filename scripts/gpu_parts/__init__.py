"""What a rented GPU is asked by scripts/gpu_checks.py: one module a part."""
