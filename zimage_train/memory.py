"""How much memory a training step takes, from sizes alone, and whether activations must be recomputed for it to fit.

Torch-free. The activation constants were counted with saved-tensor hooks on the real graph (a test counts again);
attention is taken as fused, which keeps no matrix of tokens by tokens.
"""

from collections import Counter
from dataclasses import dataclass

from zimage_train.config.schema import Config
from zimage_train.data.buckets import Bucket
from zimage_train.model.shapes import TransformerShape

SAVED_BYTES_PER_DIM = {"bf16": 99, "fp32": 91}
"""Saved for backward by one block with an fp32 LoRA, per token and unit of `dim`."""
DTYPE_BYTES = {"bf16": 2, "fp32": 4}
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2.1, "prodigy": 16}
"""State per trainable parameter."""
CONTEXT_BYTES = 500_000_000
"""What CUDA and its libraries take for themselves."""
LARGEST_ON_CPU = 1_000_000_000
"""Parameters; a larger model is trained on a GPU or not at all."""
CAPTION_TOKENS = 512
"""The longest caption."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step at its largest size."""

    weights: int
    lora: int
    activations: int
    context: int
    checkpointing: bool
    tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.lora + self.activations + self.context

    def lines(self) -> list[str]:
        """The estimate for people."""
        how = "recomputed" if self.checkpointing else "kept"
        return [
            f"frozen transformer      {self.weights / 1e9:7.2f} GB",
            f"LoRA, gradient, optimizer {self.lora / 1e9:5.2f} GB",
            f"activations ({how})  {self.activations / 1e9:5.2f} GB at {self.tokens} tokens",
            f"context                 {self.context / 1e9:7.2f} GB",
            f"one training step       {self.total / 1e9:7.2f} GB (predicted)",
        ]


def estimate(
    config: Config, shape: TransformerShape, modules: list[str], sizes: Counter[Bucket], checkpointing: bool, gpu: bool
) -> Estimate:
    """The bytes of a step of `config` on a transformer of `shape` with a LoRA on `modules`, at its largest batch.

    `sizes` counts the samples of each size in an epoch: a batch is never larger than that.
    """
    parameters = parameters_of(shape)
    trained = sum(sum(shape.linears[module]) for module in modules) * config.lora.rank
    batches = {size: min(number, config.train.batch_size) for size, number in sizes.items()}
    tokens = max(
        ((padded(size.width * size.height // 256) + CAPTION_TOKENS) * batch for size, batch in batches.items()),
        default=0,
    )
    dtype = config.model.dtype
    block = SAVED_BYTES_PER_DIM[dtype] * shape.dim * tokens
    kept = DTYPE_BYTES[dtype] * shape.dim * tokens * shape.n_layers + block
    return Estimate(
        weights=parameters * DTYPE_BYTES[dtype],
        lora=int(trained * (4 + 4 + OPTIMIZER_BYTES[config.optimizer.name])),
        activations=kept if checkpointing else block * shape.n_layers,
        context=CONTEXT_BYTES if gpu else 0,
        checkpointing=checkpointing,
        tokens=tokens,
    )


def choose_checkpointing(
    config: Config, shape: TransformerShape, modules: list[str], sizes: Counter[Bucket], budget_bytes: int, gpu: bool
) -> tuple[bool, str]:
    """Whether to recompute activations, and why: only when a step would not fit the budget without."""
    if config.memory.checkpointing != "auto":
        return config.memory.checkpointing, "set in the config"
    kept = estimate(config, shape, modules, sizes, checkpointing=False, gpu=gpu)
    fits = kept.total <= budget_bytes
    why = f"keeping activations takes {kept.total / 1e9:.1f} GB of {budget_bytes / 1e9:.1f} GB"
    return not fits, why


def smaller(
    config: Config, shape: TransformerShape, modules: list[str], sizes: Counter[Bucket], limit_bytes: int, gpu: bool
) -> str:
    """What to set so that a step is predicted to fit: the fewest of the changes that cost least, in this order."""
    said: list[str] = []
    current = config
    for setting, value in (
        ("memory.checkpointing", True),
        ("train.batch_size", 1),
        ("data.resolution", 768),
        ("data.resolution", 512),
        ("lora.rank", 8),
    ):
        if setting == "data.resolution":
            if max((size.width * size.height for size in sizes), default=0) <= value**2:
                continue
            sizes = Counter({Bucket(value, value): sizes.total()})
        else:
            section, _, key = setting.partition(".")
            part = getattr(current, section)
            if getattr(part, key) is True or (setting != "memory.checkpointing" and getattr(part, key) <= value):
                continue
            current = current.model_copy(update={section: part.model_copy(update={key: value})})
        said = [*(one for one in said if not one.startswith(setting)), f"{setting}: {str(value).lower()}"]
        found = estimate(current, shape, modules, sizes, current.memory.checkpointing is True, gpu).total
        if found <= limit_bytes:
            return f"set {', '.join(said)} (predicted: {found / 1e9:.2f} GB)"
    least = estimate(current, shape, modules, sizes, True, gpu).total
    return f"a step takes {least / 1e9:.2f} GB at the least (predicted), so more memory is needed"


def parameters_of(shape: TransformerShape) -> int:
    """How many parameters the transformer has."""
    return sum(count(size) for size in shape.parameters.values())


def padded(tokens: int) -> int:
    """`tokens` as the model pads them: to the next multiple of 32."""
    return -(-tokens // 32) * 32


def count(shape: tuple[int, ...]) -> int:
    """The number of elements of a tensor."""
    result = 1
    for side in shape:
        result *= side
    return result
