"""Bytes on disk: atomic writes, locks, safetensors, digests."""
