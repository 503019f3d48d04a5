"""The Z-Image models: what they are, where they are, how they are read. Nothing here knows about training."""
