"""A Z-Image family of a few megabytes, and the drawn world it knows.

Tests, the quickstart and the laboratory download nothing. Only paths live here, so that importing this costs nothing;
`scripts/make_miniature.py` makes the files, and `manifest.json` says how good each is.
"""

from pathlib import Path

HERE = Path(__file__).parent

TURBO = HERE / "turbo"
"""Distilled to eight steps without guidance; a folder that `diffusers.ZImagePipeline` loads, as on the hub."""

BASE = HERE / "base"
"""What Turbo was distilled from."""

DETURBO = HERE / "deturbo"
"""Turbo with the distillation trained out of it."""

ADAPTER_V1 = HERE / "adapter_v1.safetensors"
"""A training adapter for `TURBO`, in the layout of the real adapter."""

ADAPTER_V2 = HERE / "adapter_v2.safetensors"
"""A training adapter of more rank, trained for longer."""

DISTILLPATCH = HERE / "distillpatch.safetensors"
"""A LoRA that gives Turbo its eight steps back after plain training."""

IMAGES = HERE / "pictures"
"""Sixteen captioned images of the `zorb`, a thing that the family has never seen."""

STYLE = HERE / "style"
"""Sixteen captioned images of things that it knows, drawn in a way that it has never seen: `etched`."""

LESSON = HERE / "lesson"
"""What the quickstart learns: 48 images in the folder `zorb`, and 96 of what it knows already in `world`."""
