"""Splitting and fusing of changes to a fused q, k, v weight, exact where that is possible.

In fused form the three A are stacked, and the three B form a block diagonal; if all three have the same A, it is kept
once and the B are stacked. The same holds for both products of a LoHa, whose elementwise product is zero outside the
blocks as well.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from zimage_train.lora import keys
from zimage_train.lora.keys import MAGNITUDE

Change = dict[str, Tensor]
"""Part -> tensor of a module, such as A, B and alpha."""
PAIRS = (("B", "A"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
"""(up, down) parts of a product: up has a row per output, down a column per input."""


class CannotFuseError(Exception):
    """A change that has no fused form, or a fused change that cannot be split; the message says why."""


def split_qkv(change: Change, ranks: Sequence[int] | None = None) -> list[Change | None]:
    """Return the changes of q, k and v, with None for a part that is not changed.

    Args:
        ranks: the ranks of q, k and v before they were fused, where the factors do not show them.

    Raises:
        CannotFuseError: a LoKr whose first factor cannot be divided into three groups of rows, a DoRA with a
            magnitude per input, or an OFT with a constraint.
    """
    if any(part in change for part in keys.LOKR):
        return _split_lokr(change)
    if keys.OFT in change:
        if change.get("alpha", torch.zeros(())) != 0:
            raise CannotFuseError("is an OFT with a constraint on q, k and v together")
        return [change | {keys.OFT: third.contiguous()} for third in change[keys.OFT].chunk(3)]
    if MAGNITUDE in change and change[MAGNITUDE].dim() == 2 and change[MAGNITUDE].shape[0] == 1:
        raise CannotFuseError("has a magnitude for each input of q, k and v together")
    pairs = [(up, down) for up, down in PAIRS if up in change]
    rank = change[pairs[0][0]].shape[1]
    slices = _slices([change[up] for up, _ in pairs], ranks, MAGNITUDE in change)
    thirds: list[Change | None] = []
    for third, columns in enumerate(slices):
        width = columns.stop - columns.start
        part: Change = {}
        for up, down in pairs:
            part[up] = change[up].chunk(3)[third][:, columns].contiguous()
            part[down] = change[down][columns].contiguous()
        if "alpha" in change:
            # alpha / rank is the scale, so alpha shrinks with the rank.
            part["alpha"] = (change["alpha"].double() * width / rank).float()
        if MAGNITUDE in change:
            part[MAGNITUDE] = change[MAGNITUDE].reshape(3, -1)[third].contiguous()
        thirds.append(part if width else None)
    return thirds


def fuse_qkv(changes: Sequence[Change | None]) -> Change:
    """Return the change of the fused weight from those of q, k and v, of which at least one is not None.

    If their scales differ, each is multiplied into its block of B, in fp32.

    Raises:
        CannotFuseError: a LoKr, a DoRA that lacks any of the three or has a magnitude per input, an OFT with a
            constraint, or changes that differ in kind or in the shape of the weight.
    """
    present = [change for change in changes if change is not None]
    kinds = {frozenset(change.keys() - {"alpha"}) for change in present}
    if len(kinds) > 1:
        raise CannotFuseError("has changes of several kinds for q, k and v")
    sizes = {keys.size_of({part: tuple(tensor.shape) for part, tensor in change.items()}) for change in present}
    if len(sizes) > 1:
        raise CannotFuseError("has q, k and v of different shapes")
    first = present[0]
    if any(part in first for part in keys.LOKR):
        raise CannotFuseError("is a Kronecker product, and three of those have no fused form")
    if keys.OFT in first:
        return _fuse_oft(changes)
    if MAGNITUDE in first and (len(present) < 3 or any(change[MAGNITUDE].dim() > 1 for change in present)):
        raise CannotFuseError("has magnitudes that the fused weight cannot have")
    pairs = [(up, down) for up, down in PAIRS if up in first]
    if len(present) == 3 and _have_same_down(present, [down for _, down in pairs]):
        fused: Change = {}
        for up, down in pairs:
            fused[up] = torch.cat([change[up] for change in present])
            fused[down] = first[down]
        if "alpha" in first:
            fused["alpha"] = first["alpha"]
    else:
        fused = _fuse_block_diagonal(changes, pairs)
    if MAGNITUDE in first:
        fused[MAGNITUDE] = torch.cat([change[MAGNITUDE] for change in present])
    return fused


def scale_of(change: Change) -> float:
    """Return alpha / rank, or 1 if there is no alpha; for a LoKr, the rank of its last factor that is a product.

    A LoKr whose factors are whole matrices has no rank, and its alpha no effect. An OFT's alpha is no scale.
    """
    if "alpha" not in change:
        return 1.0
    rank = rank_of(change)
    for part in ("lokr_w2_b", "lokr_w1_b"):
        if not rank and part in change:
            rank = change[part].shape[0]
    return float(change["alpha"]) / rank if rank else 1.0


def rank_of(change: Change) -> int:
    """Return the rank of the (first) product; 0 for a LoKr and an OFT, which has none."""
    for _, down in PAIRS:
        if down in change:
            return change[down].shape[0]
    return 0


def _slices(ups: Sequence[Tensor], ranks: Sequence[int] | None, is_dora: bool) -> list[slice]:
    """Return the columns of `ups` that belong to q, k and v: a slice for each, or all columns for each.

    Args:
        ups: the fused up factors, (3 out, rank): one of a LoRA, two of a LoHa.
        ranks: the widths before fusing, if a file remembers them.
        is_dora: none of the three may be without columns, since each has a magnitude.
    """
    rank = ups[0].shape[1]
    used: list[list[bool]] = []
    for third in range(3):
        rows = torch.cat([up.chunk(3)[third] for up in ups])
        used.append([bool(is_used) for is_used in rows.ne(0).any(dim=0)])
    # A file does not store the widths, and B may have zeros inside its blocks too (a fresh B is all zeros). So the
    # likely widths are tried in turn: those that leave only zeros outside the blocks lose nothing.
    candidates: list[Sequence[int]] = []
    if ranks and sum(ranks) == rank:
        candidates.append(ranks)
    if rank % 3 == 0:
        candidates.append([rank // 3] * 3)
    widths_in_use = _widths_in_use(used)
    if widths_in_use is not None and not (is_dora and 0 in widths_in_use):
        candidates.append(widths_in_use)
    for widths in candidates:
        starts = list(itertools.accumulate(widths, initial=0))
        is_outside = [any(used[i][: starts[i]]) or any(used[i][starts[i + 1] :]) for i in range(3)]
        if not any(is_outside):
            return [slice(starts[i], starts[i + 1]) for i in range(3)]
    # Not a block diagonal: all three share A.
    return [slice(0, rank)] * 3


def _widths_in_use(used: Sequence[Sequence[bool]]) -> list[int] | None:
    """Return the number of columns of q, k and v by the last column that each uses, or None if none is used.

    Columns that none of them uses go to the next of the three. The widths are a guess: where the columns of a part do
    not come after those of the previous part, the caller finds values outside the blocks.
    """
    ends: list[int] = []
    for columns in used:
        ends.append(max((index + 1 for index, is_used in enumerate(columns) if is_used), default=0))
    if not any(ends):
        return None
    last = max(third for third in range(3) if ends[third])
    widths, start = [], 0
    for third in range(3):
        end = len(used[third]) if third == last else max(ends[third], start)
        widths.append(end - start)
        start = end
    return widths


def _have_same_down(changes: list[Change], downs: list[str]) -> bool:
    """Return whether all changes have the same scale and the same down factors."""
    first = changes[0]
    for other in changes[1:]:
        if scale_of(other) != scale_of(first) or not all(torch.equal(other[down], first[down]) for down in downs):
            return False
    return True


def _fuse_block_diagonal(changes: Sequence[Change | None], pairs: list[tuple[str, str]]) -> Change:
    """Return the fused change with the up factors as a block diagonal; None has a block without columns."""
    present = [change for change in changes if change is not None]
    scales = {scale_of(change) for change in present}
    outputs = present[0][pairs[0][0]].shape[0]
    fused: Change = {}
    for index, (up, down) in enumerate(pairs):
        # A fused change has a single alpha, so different scales go into the factors: for a LoHa into the first of its
        # two products only, since the two are multiplied with each other.
        is_scaled = len(scales) > 1 and index == 0
        ups = [change[up].float() * scale_of(change) if is_scaled else change[up] for change in present]
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in ups))
        remaining = iter(ups)
        blocks: list[Tensor] = []
        for change in changes:
            empty = torch.zeros(outputs, 0, dtype=dtype)
            blocks.append(empty if change is None else next(remaining).to(dtype))
        fused[up] = torch.block_diag(*blocks)
        fused[down] = torch.cat([change[down] for change in present])
    rank = fused[pairs[0][1]].shape[0]
    scale = scales.pop() if len(scales) == 1 else 1.0
    fused["alpha"] = torch.tensor(scale * rank, dtype=torch.float64).float()
    return fused


def _fuse_oft(changes: Sequence[Change | None]) -> Change:
    """Return the groups of rows of all three; a missing module has groups that are not turned."""
    present = [change for change in changes if change is not None]
    sizes, alphas = set(), set()
    for change in present:
        sizes.add(change[keys.OFT].shape)
        alphas.add(float(change.get("alpha", torch.zeros(()))))
    if len(sizes) > 1 or alphas != {0.0}:
        raise CannotFuseError("is an OFT with groups of different sizes for q, k and v, or with a constraint")
    still = torch.zeros_like(present[0][keys.OFT])
    return present[0] | {keys.OFT: torch.cat([still if one is None else one[keys.OFT] for one in changes])}


def _split_lokr(change: Change) -> list[Change | None]:
    # The rows of a Kronecker product are grouped by the rows of its first factor, so a third of those is a third of
    # all.
    first = "lokr_w1" if "lokr_w1" in change else "lokr_w1_a"
    rows = change[first].shape[0]
    if rows % 3:
        raise CannotFuseError(f"is a Kronecker product with {rows} rows in its first factor, not 3 groups")
    rest = {part: tensor for part, tensor in change.items() if part != first}
    return [rest | {first: third.contiguous()} for third in change[first].chunk(3)]
