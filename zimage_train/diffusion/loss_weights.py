"""The loss weight of each noise level."""

import math

import torch
from torch import Tensor

from zimage_train.config.timesteps import TimestepSettings
from zimage_train.typing import AnyShape

WEIGHTED_KNOTS: list[tuple[float, float]] = [
    (0, 0.9057), (1, 0.9098), (2, 0.9251), (3, 0.9399), (4, 0.9497), (5, 0.9622), (6, 0.9692),
    (7, 0.9927), (8, 1.0166), (9, 1.0393), (10, 1.0429), (11, 1.0678), (12, 1.0929), (13, 1.1149),
    (14, 1.1016), (15, 1.1209), (16, 1.1399), (17, 1.1559), (18, 1.1438), (19, 1.1606), (20, 1.1761),
    (25, 1.2201), (30, 1.2562), (35, 1.2973), (40, 1.3295), (45, 1.3556), (50, 1.3748), (55, 1.3910),
    (60, 1.4132), (70, 1.4601), (80, 1.4760), (90, 1.4951), (100, 1.5068), (110, 1.5116), (120, 1.5187),
    (130, 1.5184), (140, 1.5163), (150, 1.5069), (160, 1.4980), (170, 1.4874), (180, 1.4733), (190, 1.4587),
    (200, 1.4413), (210, 1.4249), (220, 1.4082), (230, 1.3910), (240, 1.3736), (250, 1.3549), (260, 1.3375),
    (270, 1.3186), (280, 1.3005), (290, 1.2810), (300, 1.2636), (310, 1.2446), (320, 1.2269), (330, 1.2084),
    (340, 1.1899), (350, 1.1720), (360, 1.1539), (370, 1.1354), (380, 1.1172), (390, 1.0997), (400, 1.0826),
    (410, 1.0654), (420, 1.0487), (430, 1.0326), (440, 1.0160), (450, 1.0004), (460, 0.9846), (470, 0.9694),
    (480, 0.9543), (490, 0.9398), (500, 0.9254), (510, 0.9114), (520, 0.8980), (530, 0.8849), (540, 0.8718),
    (550, 0.8596), (560, 0.8476), (570, 0.8363), (580, 0.8254), (590, 0.8149), (600, 0.8049), (610, 0.7955),
    (620, 0.7864), (630, 0.7776), (640, 0.7694), (650, 0.7618), (660, 0.7547), (670, 0.7479), (680, 0.7418),
    (690, 0.7364), (700, 0.7312), (710, 0.7269), (720, 0.7228), (730, 0.7198), (740, 0.7171), (750, 0.7152),
    (760, 0.7141), (770, 0.7136), (780, 0.7138), (790, 0.7144), (800, 0.7161), (810, 0.7181), (820, 0.7203),
    (830, 0.7230), (840, 0.7258), (850, 0.7285), (860, 0.7314), (870, 0.7325), (880, 0.7311), (890, 0.7258),
    (900, 0.7162), (910, 0.7008), (920, 0.6791), (930, 0.6515), (940, 0.6189), (950, 0.5822), (960, 0.5446),
    (970, 0.5098), (980, 0.4755), (985, 0.4606), (990, 0.4521), (995, 0.4465), (997, 0.4448), (999, 0.4473),
]  # fmt: skip
"""AI Toolkit's `weighted` loss weights as knots (i, weight), where i = 1000 (1 - sigma).

The table was measured there on another model (Flex.1-alpha) and one image: the inverse of its loss at each noise
level, with mean 1. Linear interpolation between these knots reproduces its 1000 entries within 0.0093.
"""


BELL_FLOOR = math.exp(-0.5)
"""exp(-2 (sigma - 1/2)^2) at both ends, which is subtracted."""
BELL_AREA = math.sqrt(math.pi / 2.0) * math.erf(math.sqrt(0.5)) - BELL_FLOOR
"""Integral of the rest over [0, 1], by which it is divided for a mean of 1."""


def loss_weight(sigma: AnyShape, settings: TimestepSettings) -> AnyShape:
    """Return the factor of the loss at `sigma`, in fp32."""
    weight = settings.weight or ("aitoolkit" if settings.type == "weighted" else None)
    if weight is None:
        return torch.ones_like(sigma, dtype=torch.float32)
    if weight == "bell":
        return bell(sigma.double()).float()
    if weight == "aitoolkit":
        return _interpolate(WEIGHTED_KNOTS, 1000.0 * (1.0 - sigma.double())).float()
    return _interpolate([(point[0], point[1]) for point in weight], sigma.double()).float()


def bell(sigma: AnyShape) -> AnyShape:
    """Return exp(-2 (sigma - 1/2)^2) minus its value at both ends, with mean 1 over sigma."""
    return ((torch.exp(-2.0 * (sigma - 0.5) ** 2) - BELL_FLOOR) / BELL_AREA).clamp(min=0.0)  # the clamp is for rounding


def _interpolate(points: list[tuple[float, float]], x: Tensor) -> Tensor:
    """Return the function that is linear between `points` (x, y), and constant beyond the first and the last."""
    knots = torch.tensor(points, dtype=torch.float64, device=x.device)
    x = x.clamp(knots[0, 0], knots[-1, 0])
    right = torch.searchsorted(knots[:, 0].contiguous(), x).clamp(1, len(knots) - 1)
    (x0, y0), (x1, y1) = knots[right - 1].unbind(-1), knots[right].unbind(-1)
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
