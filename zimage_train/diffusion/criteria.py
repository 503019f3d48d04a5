"""What is made of the error of a velocity: its kinds of loss, weights and guidance, a function each, as in `flow`.

Nothing here reads a number of a tensor on the CPU, so a step with any of it can be recorded as a CUDA graph.
"""

import torch

from zimage_train.config.loss import LossType
from zimage_train.typing import AnyShape, LatentBatch, PerSample


def loss_of_error(error: AnyShape, type: LossType, delta: float) -> AnyShape:
    """Return the loss of each element of `error`; `delta` is used by huber and pseudo_huber.

    huber is twice that of torch: e^2 up to `delta` and tangent to it beyond, so that a large `delta` gives mse to the
    bit. pseudo_huber is sqrt(e^2 + delta^2) - delta.
    """
    if type == "mae":
        return error.abs()
    squares = error.square()
    if type == "huber":
        return torch.where(error.abs() <= delta, squares, 2.0 * delta * error.abs() - delta**2)
    if type == "pseudo_huber":
        # The same number as the difference, which would cancel the digits of errors far below delta.
        return squares / ((squares + delta**2).sqrt() + delta)
    return squares


def weight_details(error: LatentBatch, factor: float) -> LatentBatch:
    """Return `error` with the squares of its finest details multiplied by `factor`; its sides must be even.

    The details are what the means of 2 x 2 latents leave over: the three bands LH, HL and HH of one level of the Haar
    transform. This is orthonormal, so the mean square of the result is that of its bands, with the weights 1 of the
    coarse one and `factor` of the others. As the result has the places of the error, masks apply to it.
    """
    if factor == 1.0:
        return error
    b, c, h, w = error.shape
    blocks = error.reshape(b, c, h // 2, 2, w // 2, 2)
    coarse = blocks.mean(dim=(3, 5), keepdim=True)
    return (coarse + factor**0.5 * (blocks - coarse)).reshape(b, c, h, w)


def min_snr_weight(sigma: PerSample, gamma: float, floor: float) -> PerSample:
    """Return max(floor, w / max w) for w = min((1 - sigma)^2, gamma sigma^2).

    Hang et al. 2023 give the error of x0 the weight min(SNR, gamma). In flow matching SNR = ((1 - sigma) / sigma)^2,
    and an error of the velocity is sigma times as large in x0, so its square has the weight sigma^2 min(SNR, gamma),
    which is w. Its maximum is gamma / (1 + sqrt(gamma))^2 at sigma = 1 / (1 + sqrt(gamma)), and it is 0 at both ends:
    hence the floor.
    """
    peak = gamma / (1.0 + gamma**0.5) ** 2
    weight = torch.minimum((1.0 - sigma).square(), gamma * sigma.square())
    return (weight / peak).clamp(floor, 1.0)  # rounding of a maximum aside, a floor of 1 is a weight of 1


def contrastive_scale(sigma: PerSample, scale: float) -> LatentBatch:
    """Return 1 + (scale - 1) sigma, (b, 1, 1, 1): the scale of contrastive guidance that decreases with the noise.

    The target holds noise that no model can predict at low sigma, which a constant scale amplifies.
    """
    return 1.0 + (scale - 1.0) * sigma.view(-1, 1, 1, 1)


def along_target(unconditional: LatentBatch, target: LatentBatch) -> LatentBatch:
    """Return `unconditional` times <target, unconditional> / |unconditional|^2 of each sample.

    Fan et al. 2025 (CFG-Zero*, eq. 12): the factor for which it is nearest to the target.
    """
    product = (target * unconditional).sum(dim=(1, 2, 3), keepdim=True)
    square = unconditional.square().sum(dim=(1, 2, 3), keepdim=True)
    return unconditional * (product / (square + 1e-8))
