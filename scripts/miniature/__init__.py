"""The stages of `scripts/make_miniature.py`: texts, images, diffusion, and how they are fitted."""
