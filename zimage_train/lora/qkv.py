"""Changes of a fused q, k, v weight taken apart and put together, to the bit where that is possible.

Fused, the three A stand one above the other and the three B on a diagonal of blocks; where all three have the same A,
one is enough. LoHa's two products go the same way, since the rest of each block is zero in both.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from zimage_train.lora import keys
from zimage_train.lora.keys import MAGNITUDE

Change = dict[str, Tensor]
"""Part -> tensor, of one module."""
PAIRS = (("B", "A"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
"""Factors with rows for the outputs, and those with columns for the inputs."""


class CannotFuseError(Exception):
    """Why a change has no fused form, or a fused one cannot be split."""


def split_qkv(change: Change, ranks: Sequence[int] | None = None) -> list[Change | None]:
    """The changes of q, k and v; None where there is none.

    `ranks` are those that they had before they were fused, for what the factors themselves do not tell.

    Raises:
        CannotFuse: a LoKr whose first factor has no three equal groups of rows, or a magnitude for each input.
    """
    if any(part in change for part in keys.LOKR):
        return _split_lokr(change)
    if MAGNITUDE in change and change[MAGNITUDE].dim() == 2 and change[MAGNITUDE].shape[0] == 1:
        raise CannotFuseError("has a magnitude for each input of q, k and v together")
    pairs = [(up, down) for up, down in PAIRS if up in change]
    rank = change[pairs[0][0]].shape[1]
    slices = _slices([change[up] for up, _ in pairs], ranks, MAGNITUDE in change)
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


def fuse_qkv(changes: Sequence[Change | None]) -> Change:
    """One change of the fused weight from those of q, k and v, at least one of which is there.

    Where their scales differ, each is multiplied into its block in fp32.

    Raises:
        CannotFuse: LoKr, a DoRA of some of them only or with a magnitude for each input, or changes that differ in
            kind or in the shape of the weight.
    """
    there = [one for one in changes if one is not None]
    if len({frozenset(one.keys() - {"alpha"}) for one in there}) > 1:
        raise CannotFuseError("has changes of several kinds for q, k and v")
    if len({keys.size_of({part: tuple(tensor.shape) for part, tensor in one.items()}) for one in there}) > 1:
        raise CannotFuseError("has q, k and v of different shapes")
    first = there[0]
    if any(part in first for part in keys.LOKR):
        raise CannotFuseError("is a Kronecker product, and three of those have no fused form")
    if MAGNITUDE in first and (len(there) < 3 or any(one[MAGNITUDE].dim() > 1 for one in there)):
        raise CannotFuseError("has magnitudes that the fused weight cannot have")
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
    return float(change["alpha"]) / rank_of(change) if "alpha" in change else 1.0


def rank_of(change: Change) -> int:
    """Of its (first) product; a LoKr has none."""
    return next((change[down].shape[0] for _, down in PAIRS if down in change), 0)


def _slices(ups: Sequence[Tensor], ranks: Sequence[int] | None, is_whole: bool) -> list[slice]:
    """The columns of q, k and v: their blocks on the diagonal, or all for each where there is no diagonal.

    `is_whole`: none of the three may be without any.
    """
    rank = ups[0].shape[1]
    used = [[bool(one) for one in torch.cat([up.chunk(3)[i] for up in ups]).ne(0).any(dim=0)] for i in range(3)]
    third = rank // 3
    guesses = [ranks] if ranks and sum(ranks) == rank else []
    guesses += [[third] * 3] if rank % 3 == 0 else []
    guesses += [found] if (found := _widths(used)) is not None and not (is_whole and 0 in found) else []
    for widths in guesses:
        starts = list(itertools.accumulate(widths, initial=0))
        if not any(any(one[: starts[i]]) or any(one[starts[i + 1] :]) for i, one in enumerate(used)):
            return [slice(starts[i], starts[i + 1]) for i in range(3)]
    return [slice(0, rank)] * 3


def _widths(used: Sequence[Sequence[bool]]) -> list[int] | None:
    """How many columns each third has, if those that it uses come after those of the one before; None: they do not.

    Columns that none uses are the next one's.
    """
    ends = [max((i + 1 for i, is_used in enumerate(one) if is_used), default=0) for one in used]
    if not any(ends):
        return None
    last = max(third for third in range(3) if ends[third])
    widths, place = [], 0
    for third in range(3):
        end = len(used[third]) if third == last else max(ends[third], place)
        widths.append(end - place)
        place = end
    return widths


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
        raise CannotFuseError(
            f"is a Kronecker product with {change[first].shape[0]} rows in its first factor, not 3 groups"
        )
    rest = {part: tensor for part, tensor in change.items() if part != first}
    return [rest | {first: rows.contiguous()} for rows in change[first].chunk(3)]
