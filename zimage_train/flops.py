"""How much arithmetic a training step and a preview take, from sizes alone: what goes where in a run (torch-free).

Matrix products count two operations per weight and token; attention, taken as fused, 4 T^2 d forward and 10 T^2 d
backward per block. Frozen weights need no gradient, so the backward of their products costs as much as the forward, and
nothing before the first LoRA has a backward. A test counts the same on the real graph.
"""

from zimage_train.data.buckets import Bucket
from zimage_train.memory import count, padded
from zimage_train.model.shapes import TransformerShape

CAPTION_TOKENS = 64
"""A typical caption."""


def forward(shape: TransformerShape, size: Bucket) -> float:
    """Operations of one forward pass on one picture of `size` px."""
    linear, attention = _layers(shape, size)
    return linear + attention + _before_the_layers(shape, size)


def step(shape: TransformerShape, size: Bucket, checkpointing: bool) -> float:
    """Operations of forward and backward on one sample; the LoRA's own, about 1 %, are left out."""
    linear, attention = _layers(shape, size)
    again = linear + attention if checkpointing else 0.0
    return forward(shape, size) + linear + 2.5 * attention + again


def _layers(shape: TransformerShape, size: Bucket) -> tuple[float, float]:
    tokens = _image_tokens(size) + padded(CAPTION_TOKENS)
    return _products(shape, "layers", tokens), _attention(shape, shape.n_layers, tokens)


def _before_the_layers(shape: TransformerShape, size: Bucket) -> float:
    parts = (("noise_refiner", _image_tokens(size)), ("context_refiner", padded(CAPTION_TOKENS)))
    return sum(
        _products(shape, name, tokens) + _attention(shape, shape.n_refiner_layers, tokens) for name, tokens in parts
    )


def _products(shape: TransformerShape, part: str, tokens: int) -> float:
    """Modulations are left out: they see one vector a picture and not one a token."""
    weights = sum(
        count(parameter)
        for name, parameter in shape.parameters.items()
        if name.startswith(f"{part}.") and len(parameter) == 2 and "adaLN" not in name
    )
    return 2.0 * weights * tokens


def _attention(shape: TransformerShape, blocks: int, tokens: int) -> float:
    return blocks * 4.0 * shape.dim * float(tokens) ** 2


def _image_tokens(size: Bucket) -> int:
    return padded(size.width * size.height // 256)
