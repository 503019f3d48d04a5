"""The LoRA in other projects' own loaders, each in a process of its own."""

from collections.abc import Iterator
from pathlib import Path

from zimage_train.measure.proofs.claims import Claim, not_tried
from zimage_train.models.arch import TransformerShape


def comfyui_claims(folder: Path, lora: Path, shape: TransformerShape) -> Iterator[Claim]:
    yield not_tried("ComfyUI", "")


def aitoolkit_claims(folder: Path, lora: Path, shape: TransformerShape) -> Iterator[Claim]:
    yield not_tried("AI Toolkit", "")
