"""The stages of `scripts/make_miniature.py`: texts, pictures, diffusion, and how they are fitted."""
