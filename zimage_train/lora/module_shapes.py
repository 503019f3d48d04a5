"""Shapes and costs of the kinds of adapters that run as modules (torch-free)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zimage_train.config.lora import LoraSettings

Sizes = Mapping[str, tuple[int, int]]
"""Module -> (out, in)."""


@dataclass(frozen=True)
class ModuleCosts:
    """Costs of the layers of a kind in a step, beside the frozen products."""

    products: int = 0
    """Multiplications for each token, forward and backward, in `layers`."""
    forward_products: int = 0
    """Those of the forward alone, which a recomputed block does once more."""
    moved: int = 0
    """Bytes that are moved in a step whatever its tokens, as by forming a dense matrix."""
    kept: int = 0
    """Numbers for each token that the layers of a block keep for their backward."""
    moved_for_token: int = 0
    """Bytes that are moved for each token in a step, in all layers."""
    dense: int = 0
    """Numbers in dense matrices that the largest layer needs while its backward runs."""


NO_COSTS = ModuleCosts()
DORA_BYTES, OFT_BYTES = 12, 24
"""Bytes that are moved for each number of the output."""
LOHA_MATRICES, LOHA_BYTES = 4, 40
"""Dense matrices that a LoHa's backward holds at once, and the bytes that forming all of a step's moves for each
number."""


def part_shapes(settings: LoraSettings, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """Return part -> shape of the parameters beside a weight (outputs, inputs)."""
    rank = settings.rank
    assert rank is not None
    if settings.type == "dora":
        return {"A": (rank, inputs), "B": (outputs, rank), "gain": (outputs,)}
    if settings.type == "oft":
        # The part of a skew-symmetric matrix above its diagonal.
        return {"above": (outputs // rank, rank * (rank - 1) // 2)}
    assert settings.type == "loha"
    return {"w1_a": (outputs, rank), "w1_b": (rank, inputs), "w2_a": (outputs, rank), "w2_b": (rank, inputs)}


def module_parameters(settings: LoraSettings, linears: Sizes, modules: Iterable[str]) -> int:
    """Return the number of parameters of the adapter on `modules`."""
    total = 0
    for module in modules:
        total += sum(map(math.prod, part_shapes(settings, *linears[module]).values()))
    return total


def module_costs(settings: LoraSettings, linears: Sizes, modules: Iterable[str]) -> ModuleCosts:
    """Return the costs of the adapter on `modules`; those of kinds with a fused form are counted elsewhere."""
    if settings.is_fusible:
        return NO_COSTS
    sizes = [math.prod(linears[module]) for module in modules]
    in_layers = sum(math.prod(linears[module]) for module in modules if module.startswith("layers."))
    outputs = sum(linears[module][0] for module in modules if module.startswith("layers."))
    if settings.type in ("dora", "oft"):
        # The output is kept to know the gradient of its factors, and is read or written several times more.
        kept = sum(linears[module][0] for module in modules if module.startswith("layers.0."))
        if settings.type == "dora":
            return ModuleCosts(kept=kept, moved_for_token=DORA_BYTES * outputs)
        assert settings.rank is not None
        turned = settings.rank * outputs
        return ModuleCosts(3 * turned, turned, kept=kept, moved_for_token=OFT_BYTES * outputs)
    # The dense change multiplies each token once more, its gradient is as large as that of a weight that is trained
    # whole, and so is the gradient of the input.
    return ModuleCosts(3 * in_layers, in_layers, LOHA_BYTES * in_layers, LOHA_MATRICES * max(sizes, default=0))
