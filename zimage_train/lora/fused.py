"""Changes of a fused q, k, v weight taken apart and put together, to the bit where that is possible.

Fused, the three A stand one above the other and the three B on a diagonal of blocks; where all three have the same A,
one is enough. LoHa's two products go the same way, since the rest of each block is zero in both.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from zimage_train.lora import keys
from zimage_train.lora.keys import MAGNITUDE

Change = dict[str, Tensor]
"""Part -> tensor, of one module."""
PAIRS = (("B", "A"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
"""Factors with rows for the outputs, and those with columns for the inputs."""


class CannotFuse(Exception):
    """Why a change has no fused form, or a fused one cannot be split."""


def split(change: Change) -> list[Change | None]:
    """The changes of q, k and v; None where there is none.

    Raises:
        CannotFuse: a LoKr whose first factor has no three equal groups of rows, or a magnitude for each input.
    """
    if any(part in change for part in keys.LOKR):
        return _split_lokr(change)
    if MAGNITUDE in change and change[MAGNITUDE].dim() == 2 and change[MAGNITUDE].shape[0] == 1:
        raise CannotFuse("has a magnitude for each input of q, k and v together")
    pairs = [(up, down) for up, down in PAIRS if up in change]
    columns = [_blocks(change[up]) for up, _ in pairs]
    rank = change[pairs[0][0]].shape[1]
    is_block_diagonal = columns[0] is not None and all(found == columns[0] for found in columns)
    slices = columns[0] if is_block_diagonal and columns[0] is not None else [slice(0, rank)] * 3
    found: list[Change | None] = []
    for third, place in enumerate(slices):
        width = place.stop - place.start
        one = {up: change[up].chunk(3)[third][:, place].contiguous() for up, _ in pairs}
        one |= {down: change[down][place].contiguous() for _, down in pairs}
        if "alpha" in change:
            one["alpha"] = (change["alpha"].double() * width / rank).float()
        if MAGNITUDE in change:
            one[MAGNITUDE] = change[MAGNITUDE].reshape(3, -1)[third].contiguous()
        found.append(one if width else None)
    return found


def fuse(changes: Sequence[Change | None]) -> Change:
    """One change of the fused weight from those of q, k and v, at least one of which is there.

    Where their scales differ, each is multiplied into its block in fp32.

    Raises:
        CannotFuse: LoKr, a DoRA of some of them only or with a magnitude for each input, or changes of several kinds.
    """
    there = [one for one in changes if one is not None]
    if len({frozenset(one.keys() - {"alpha"}) for one in there}) > 1:
        raise CannotFuse("has changes of several kinds for q, k and v")
    first = there[0]
    if any(part in first for part in keys.LOKR):
        raise CannotFuse("is a Kronecker product, and three of those have no fused form")
    if MAGNITUDE in first and (len(there) < 3 or first[MAGNITUDE].dim() > 1):
        raise CannotFuse("has magnitudes that the fused weight cannot have")
    pairs = [(up, down) for up, down in PAIRS if up in first]
    if len(there) == 3 and _share(there, [down for _, down in pairs]):
        whole = {up: torch.cat([one[up] for one in there]) for up, _ in pairs} | {
            down: first[down] for _, down in pairs
        }
        whole |= {"alpha": first["alpha"]} if "alpha" in first else {}
    else:
        whole = _diagonal(changes, pairs)
    if MAGNITUDE in first:
        whole[MAGNITUDE] = torch.cat([one[MAGNITUDE] for one in there])
    return whole


def scale_of(change: Change) -> float:
    """alpha / rank; 1 without alpha."""
    rank = next(change[down].shape[0] for _, down in PAIRS if down in change)
    return float(change["alpha"]) / rank if "alpha" in change else 1.0


def _blocks(up: Tensor) -> list[slice] | None:
    """The columns of each third's block on the diagonal; None: it is not block-diagonal, or nothing tells."""
    rank = up.shape[1]
    used = [part.ne(0).any(dim=0) for part in up.chunk(3)]
    equal = [slice(i * rank // 3, (i + 1) * rank // 3) for i in range(3)]
    if rank % 3 == 0 and not any(used[i][_outside(rank, equal[i])].any() for i in range(3)):
        return equal
    if not any(one.any() for one in used):
        return None
    ends = [int(one.nonzero().max()) + 1 if one.any() else None for one in used]
    starts = [int(one.nonzero().min()) if one.any() else None for one in used]
    found, place = [], 0
    last = max(third for third in range(3) if ends[third] is not None)
    for third in range(3):
        start, end = starts[third], ends[third]
        if start is None or end is None:
            found.append(slice(place, place))
            continue
        if start < place:
            return None
        found.append(slice(place, rank if third == last else end))
        place = found[-1].stop
    return found


def _outside(rank: int, inside: slice) -> Tensor:
    """Which of `rank` columns are not `inside`."""
    outside = torch.ones(rank, dtype=torch.bool)
    outside[inside] = False
    return outside


def _share(changes: list[Change], downs: list[str]) -> bool:
    first = changes[0]
    return all(
        scale_of(one) == scale_of(first) and all(torch.equal(one[down], first[down]) for down in downs)
        for one in changes[1:]
    )


def _diagonal(changes: Sequence[Change | None], pairs: list[tuple[str, str]]) -> Change:
    there = [one for one in changes if one is not None]
    scales = {scale_of(one) for one in there}
    outputs = there[0][pairs[0][0]].shape[0]
    whole: Change = {}
    for number, (up, down) in enumerate(pairs):
        is_scaled = len(scales) > 1 and number == 0  # into one product of a LoHa only
        there_up = [one[up].float() * scale_of(one) if is_scaled else one[up] for one in there]
        dtype = functools.reduce(torch.promote_types, (block.dtype for block in there_up))
        blocks = iter(there_up)
        diagonal = [torch.zeros(outputs, 0, dtype=dtype) if one is None else next(blocks).to(dtype) for one in changes]
        whole[up] = torch.block_diag(*diagonal)
        whole[down] = torch.cat([one[down] for one in there])
    rank = whole[pairs[0][1]].shape[0]
    scale = scales.pop() if len(scales) == 1 else 1.0
    return whole | {"alpha": torch.tensor(scale * rank, dtype=torch.float64).float()}


def _split_lokr(change: Change) -> list[Change | None]:
    first = "lokr_w1" if "lokr_w1" in change else "lokr_w1_a"
    if change[first].shape[0] % 3:
        raise CannotFuse(f"is a Kronecker product with {change[first].shape[0]} rows in its first factor, not 3 groups")
    rest = {part: tensor for part, tensor in change.items() if part != first}
    return [rest | {first: rows.contiguous()} for rows in change[first].chunk(3)]
