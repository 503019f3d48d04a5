"""The parts of `scripts/lab.py`: what is trained, how it is scored, and how it is told."""
