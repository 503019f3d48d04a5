"""Numbers of bytes, for people."""


def format_bytes(size: float) -> str:
    """`22.60 GB`, or `12.0 MB` below a tenth of a GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
