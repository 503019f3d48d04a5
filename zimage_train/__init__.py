"""Train LoRAs for the Z-Image family of image models."""

__version__ = "0.1.0"
