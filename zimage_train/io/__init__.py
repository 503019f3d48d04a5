"""Files on disk: atomic writes, locks, safetensors, digests."""
