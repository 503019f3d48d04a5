"""Sizes in bytes as text."""


def format_bytes(size: float) -> str:
    """Return a size as text, such as `22.60 GB`, or `12.0 MB` below 0.1 GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
