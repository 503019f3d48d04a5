"""What every record names."""

from importlib import metadata


def version(package: str) -> str | None:
    """The installed version; None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def identity() -> dict[str, str | None]:
    """torch, triton (None: not installed) and the card (None: torch sees no GPU)."""
    import torch  # here, so that the process that watches can do without it

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "triton": version("triton"), "card": card}
