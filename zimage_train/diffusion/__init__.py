"""Sampling with the true model: previews while training, and the `sample` command."""
