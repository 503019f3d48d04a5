"""Settings of the noise: the density of its level sigma, the loss weight of each level, and an offset (torch-free)."""

import math
from statistics import NormalDist
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from zimage_train.config.types import ConflictError, Section, SettingError
from zimage_train.config.variants import VARIANTS

DensityName = Literal[
    "weighted", "linear", "sigmoid", "uniform_shift", "logsnr", "cosine_bell", "turbo_grid", "fixed"
]  # fmt: skip
BiasName = Literal["balanced", "high_noise", "low_noise"]
ShiftName = Literal["flux", "qwen", "variant"]
WeightName = Literal["aitoolkit", "bell"]

NORMAL: tuple[DensityName, ...] = ("sigmoid", "logsnr")
"""Densities that are normal in the logit of sigma, and have a mean and a scale."""
LISTED: tuple[DensityName, ...] = ("turbo_grid", "fixed")
"""Densities that draw one of some sigmas."""
USED_BY: dict[str, tuple[DensityName, ...]] = {
    "mean": NORMAL,
    "scale": NORMAL,
    "sigmas": ("fixed",),
    "jitter": LISTED,
    "shift": tuple(name for name in get_args(DensityName) if name not in LISTED),
    "weight": tuple(name for name in get_args(DensityName) if name != "weighted"),
}
"""Setting -> the densities for which it has an effect, if not for all."""
INSTEAD = {
    "sigmas": "use fixed",
    "shift": "write the shifted sigmas into timesteps.sigmas, with fixed",
    "weight": "use linear, which is drawn in the same way",
}
"""Setting -> what to do where it would have no effect; otherwise it can only be left out."""
SHIFTS_BY_SIZE: dict[str, tuple[tuple[int, float], tuple[int, float]]] = {
    "flux": ((256, 0.5), (4096, 1.15)),
    "qwen": ((256, 0.5), (8192, 0.9)),
}
"""Name of a shift -> two pairs (image tokens, logarithm of the factor), of a line through both and beyond."""
PATCH_PIXELS = 256
"""Pixels of an image for each of its tokens in the transformer."""
MAX_WEIGHT = 1000.0
LEAST_MASS = 1e-6
"""Share of a density that `min` and `max` must leave; of less, rounding would leave a few values."""

Sigma = Annotated[float, Field(gt=0.0, le=1.0)]


class TimestepSettings(Section):
    type: DensityName = "weighted"
    """Density of sigma. weighted: uniform, with AI Toolkit's loss weights; linear: uniform; sigmoid: logit-normal;
    uniform_shift: uniform, then shifted as in the sampler; logsnr: normal in the logarithm of the signal-to-noise
    ratio; cosine_bell: proportional to 1 - cos(2 pi sigma); turbo_grid: the 8 sigmas of Turbo's sampler; fixed: those
    of `sigmas`."""
    shift: Annotated[float, Field(gt=0.0, le=100.0)] | ShiftName | None = None
    """Factor s of a shift after `type` is drawn: sigma becomes s sigma / (1 + (s - 1) sigma). flux, qwen: a factor by
    the size of each image, 1.9 and 1.7 at 512 px, 3.2 and 2.0 at 1024 px; variant: that of the model's sampler; null:
    variant for uniform_shift, else none. The density called shift in musubi-tuner, SimpleTuner and diffusion-pipe is
    sigmoid with a number here."""
    mean: float = Field(default=0.0, ge=-20.0, le=20.0)
    """Mean of the logit of sigma for sigmoid, or of the logarithm of the signal-to-noise ratio for logsnr."""
    scale: float = Field(default=1.0, gt=0.0, le=20.0)
    """Standard deviation of the same."""
    sigmas: list[Sigma] | None = Field(default=None, min_length=1)
    """Sigmas of fixed, each drawn as often as any other."""
    jitter: float = Field(default=0.0, ge=0.0, le=0.5)
    """Largest distance of a drawn sigma from its value in turbo_grid or fixed, within which it is uniform."""
    bias: BiasName = "balanced"
    """Noise levels that are drawn more often: high_noise favours composition and style, low_noise favours detail."""
    min: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Smallest sigma that is trained; 0 is the image."""
    max: float = Field(default=1.0, gt=0.0, le=1.0)
    """Largest sigma that is trained; 1 is pure noise."""
    stratified: bool = False
    """Whether the n samples of an epoch draw from n equal parts of the density, one from each, and each image from
    other parts in every epoch; false: each draw is independent."""
    weight: WeightName | list[list[float]] | None = None
    """Loss weight by sigma. aitoolkit: AI Toolkit's table; bell: DiffSynth's, 0 at both ends and 1.58 at 0.5; or pairs
    [sigma, weight], interpolated linearly, which `zimage-train timesteps CONFIG --measure` prints; null: aitoolkit for
    weighted, else 1."""
    offset_noise: float = Field(default=0.0, ge=0.0, le=1.0)
    """Factor w of an offset of the noise, w N(0, 1) for each image and channel of the latents; 0: none."""

    @field_validator("sigmas")
    @classmethod
    def _distinct(cls, value: list[float] | None) -> list[float] | None:
        for number, sigma in enumerate(value or []):
            if sigma in (value or [])[:number]:
                raise SettingError(f"{sigma:g} stands twice", "remove one")
        return value

    @field_validator("weight")
    @classmethod
    def _is_a_function(cls, value: str | list[list[float]] | None) -> str | list[list[float]] | None:
        if not isinstance(value, list):
            return value
        if len(value) < 2 or any(len(point) != 2 for point in value):
            raise SettingError("is no list of pairs", "write [[sigma, weight], [sigma, weight], ...]")
        sigmas = [point[0] for point in value]
        weights = [point[1] for point in value]
        if sigmas != sorted(set(sigmas)) or sigmas[0] < 0 or sigmas[-1] > 1:
            raise SettingError("its sigmas do not increase within 0 to 1", "write [sigma, weight] with rising sigmas")
        if min(weights) < 0 or not 0 < max(weights) <= MAX_WEIGHT:
            hint = f"give weights from 0 to {MAX_WEIGHT:g}, not all of them 0"
            raise SettingError(f"its weights are from {min(weights):g} to {max(weights):g}", hint)
        return value

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.min >= self.max:
            raise ConflictError(f"min {self.min} must be below max {self.max}", key=("min",))
        for name, users in USED_BY.items():
            if name in self.changed and self.type not in users:
                hint = INSTEAD.get(name, "leave it out")
                raise ConflictError(f"has no effect with timesteps.type: {self.type}", hint, (name,))
        if self.type == "fixed" and self.sigmas is None:
            raise ConflictError("fixed needs sigmas", "give a list, such as [0.9, 0.75, 0.5]", ("sigmas",))
        return self

    @model_validator(mode="after")
    def _limits_leave_something(self) -> Self:
        whole = self.min == 0.0 and self.max == 1.0
        limits = f"min {self.min:g} and max {self.max:g}"
        if self.type in LISTED:
            if not self.intervals(self.min, self.max):
                raise ConflictError(f"{limits} leave none of the sigmas", "widen them", ("min",))
            if not whole and self.intervals(self.min, self.max) == self.intervals(0.0, 1.0):
                raise ConflictError(f"{limits} leave every sigma as it is", "leave them out", ("min",))
            if self._draws_one_sigma and (self.bias != "balanced" or self.stratified):
                name = "stratified" if self.stratified else "bias"
                raise ConflictError("has no effect where a single sigma is drawn", "leave it out", (name,))
        elif self.type in (*NORMAL, "cosine_bell") and self._mass(self.min, self.max) < LEAST_MASS:
            raise ConflictError(f"{limits} leave less than a millionth of {self.type}", "widen them", ("min",))
        return self

    @property
    def changed(self) -> set[str]:
        """The names of the settings that are not at their defaults."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}

    @property
    def _draws_one_sigma(self) -> bool:
        intervals = self.intervals(self.min, self.max)
        return len(intervals) == 1 and intervals[0][0] == intervals[0][1]

    def _mass(self, low: float, high: float) -> float:
        """Return the share of the density between two sigmas; with a shift by size, that of an image of 1024 px."""
        factor = self.shift_factor(VARIANTS["turbo"].shift, 1024 * 1024)
        bottom, top = (min(sigma / (factor - (factor - 1.0) * sigma), 1.0) for sigma in (low, high))
        return self.cdf(top) - self.cdf(bottom)

    @property
    def logit_normal(self) -> tuple[float, float]:
        """Mean and standard deviation of the logit of sigma, for sigmoid and logsnr."""
        # The signal-to-noise ratio is ((1 - sigma) / sigma)^2, so its logarithm is -2 logit(sigma).
        return (-self.mean / 2.0, self.scale / 2.0) if self.type == "logsnr" else (self.mean, self.scale)

    def cdf(self, sigma: float) -> float:
        """Return the share of the density below `sigma`, before any shift; for densities that are continuous."""
        if self.type == "cosine_bell":
            return sigma - math.sin(2.0 * math.pi * sigma) / (2.0 * math.pi)
        if self.type not in NORMAL or sigma in (0.0, 1.0):
            return sigma
        mean, scale = self.logit_normal
        return NormalDist(mean, scale).cdf(math.log(sigma / (1.0 - sigma)))

    def intervals(self, low: float, high: float) -> list[tuple[float, float]]:
        """Return the range of each sigma of turbo_grid or fixed between two limits, from the least noise on.

        A sigma outside of the limits is left out, and a range that reaches beyond them is cut off there.
        """
        kept = [sigma for sigma in self._levels() if low <= sigma <= high]
        return [(max(low, sigma - self.jitter), min(high, sigma + self.jitter)) for sigma in kept]

    def _levels(self) -> list[float]:
        if self.sigmas is not None:
            return sorted(self.sigmas)
        turbo = VARIANTS["turbo"]
        evenly = [index / turbo.steps for index in range(1, turbo.steps + 1)]
        return [turbo.shift * sigma / (1.0 + (turbo.shift - 1.0) * sigma) for sigma in evenly]

    @property
    def summary(self) -> str:
        """The density in a line, with what differs from the defaults."""
        parts = [self.type, self.bias]
        for name in ("shift", "mean", "scale", "jitter", "min", "max", "offset_noise"):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                parts.append(f"{name} {value if isinstance(value, str) else f'{value:g}'}")
        if self.weight is not None:
            parts.append(f"weight {self.weight if isinstance(self.weight, str) else 'by a table'}")
        return ", ".join([*parts, "stratified"] if self.stratified else parts)

    def shift_factor(self, variant_shift: float, pixels: int) -> float:
        """Return s for an image of so many pixels; 1 is no shift."""
        if self.shift is None:
            return variant_shift if self.type == "uniform_shift" else 1.0
        if self.shift == "variant":
            return variant_shift
        if not isinstance(self.shift, str):
            return self.shift
        (tokens0, log0), (tokens1, log1) = SHIFTS_BY_SIZE[self.shift]
        slope = (log1 - log0) / (tokens1 - tokens0)
        return math.exp(log0 + slope * (pixels // PATCH_PIXELS - tokens0))
