"""A whole Z-Image Turbo of a few megabytes, and the drawn world it knows.

Tests and the quickstart download nothing. Only paths live here, so that importing this costs nothing;
`scripts/make_miniature.py` makes the files.
"""

from pathlib import Path

HERE = Path(__file__).parent

TURBO = HERE / "turbo"
"""A folder that `diffusers.ZImagePipeline.from_pretrained` loads, laid out as on the hub."""

ADAPTER = HERE / "adapter.safetensors"
"""A training adapter for `TURBO`, in the layout of the real one."""

PICTURES = HERE / "pictures"
"""Sixteen captioned pictures of the `zorb`, a thing that `TURBO` has never seen."""
