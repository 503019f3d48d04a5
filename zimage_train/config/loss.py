"""Settings of the loss and of its target, and their conflicts with each other and with other sections."""

from typing import Literal

from pydantic import Field, field_validator

from zimage_train.config.timesteps import TimestepSettings
from zimage_train.config.types import ConflictError, Section

LossType = Literal["mse", "mae", "huber", "pseudo_huber"]
ContrastiveSchedule = Literal["constant", "sigma"]

DEFAULT_DELTAS: dict[LossType, float] = {"huber": 0.1, "pseudo_huber": 0.01}
"""`loss.delta` of each type that has it, if it is left out."""
DEFAULT_MIN_SNR_FLOOR = 0.1
"""`loss.min_snr_floor`, if it is left out."""


class LossSettings(Section):
    type: LossType = "mse"
    """What is averaged over the errors e of the velocity. mse: e^2; mae: |e|; huber: e^2 up to `delta`, beyond it
    2 delta |e| - delta^2, so that no error pulls more than `delta` does; pseudo_huber: sqrt(e^2 + delta^2) - delta."""
    delta: float | None = Field(default=None, gt=0.0, le=1000.0)
    """Error from which huber and pseudo_huber grow linearly; null: 0.1 for huber, 0.01 for pseudo_huber."""
    detail: float = Field(default=1.0, ge=0.0, le=100.0)
    """Factor on the squares of the finest details of the error, which are the Haar wavelets of blocks of 16 px; 1: all
    frequencies count alike."""
    min_snr: float | None = Field(default=None, gt=0.0, le=1000.0)
    """Gamma of min-SNR weights: min((1 - sigma)^2, gamma sigma^2) for a velocity, over its maximum; null: off."""
    min_snr_floor: float | None = Field(default=None, ge=0.0, le=1.0)
    """Least weight of `min_snr`, so that pure noise and the almost finished image are trained too; 1 turns it off;
    null: 0.1."""

    @property
    def used_delta(self) -> float:
        """Return the delta of the type, or 0 if it has none."""
        return DEFAULT_DELTAS.get(self.type, 0.0) if self.delta is None else self.delta

    @property
    def used_min_snr_floor(self) -> float:
        """Return the least weight of `min_snr`."""
        return DEFAULT_MIN_SNR_FLOOR if self.min_snr_floor is None else self.min_snr_floor


class GuidanceSettings(Section):
    differential: float | None = Field(default=None, gt=0.0, le=100.0)
    """Scale s: the target becomes pred + s (target - pred), which multiplies the gradient of mse by s; null or 1:
    off."""
    contrastive: float | None = Field(default=None, gt=0.0, le=100.0)
    """Scale g: the target becomes u + g (target - u), away from the prediction u for the empty prompt; null or 1:
    off."""
    contrastive_schedule: ContrastiveSchedule = "constant"
    """Scale of contrastive guidance at the noise level sigma. constant: g; sigma: 1 + (g - 1) sigma, since at low noise
    it would amplify what no model can predict."""
    cfg_zero: bool = False
    """Multiply u in contrastive guidance by <target, u> / |u|^2, as CFG-Zero* does, so that it pushes from the part of
    u that lies along the target."""

    @field_validator("differential", "contrastive")
    @classmethod
    def _one_is_off(cls, value: float | None) -> float | None:
        return None if value == 1.0 else value


def loss_error(
    loss: LossSettings, guidance: GuidanceSettings, timesteps: TimestepSettings, imitates_teacher: bool
) -> ConflictError | None:
    """Return the first setting of the loss that conflicts with another or has no effect, or None if there is none."""
    if loss.delta is not None and loss.type not in DEFAULT_DELTAS:
        return _unused("loss", "delta", f"loss.type {loss.type} has no delta", f"use {' or '.join(DEFAULT_DELTAS)}")
    if loss.min_snr is None and loss.min_snr_floor is not None:
        return _unused("loss", "min_snr_floor", "needs loss.min_snr", "set it")
    if loss.min_snr is not None and imitates_teacher:
        message = "weights noise levels, and trajectory_imitation trains at Turbo's eight"
        return _unused("loss", "min_snr", message)
    if loss.min_snr is not None and timesteps.weight is not None:
        return _unused("loss", "min_snr", "timesteps.weight has weights of noise levels already")
    if loss.min_snr is not None and timesteps.type == "weighted":
        message = "timesteps.type: weighted has weights of noise levels already"
        return _unused("loss", "min_snr", message, "set timesteps.type: linear")
    if guidance.differential is not None and loss.type == "mae":
        message = "has no effect with loss.type: mae, whose gradient has the same size for every error"
        return _unused("guidance", "differential", message, "use huber or pseudo_huber")
    if guidance.contrastive is None:
        for key in ("contrastive_schedule", "cfg_zero"):
            if getattr(guidance, key) != GuidanceSettings.model_fields[key].default:
                return _unused("guidance", key, "needs guidance.contrastive", "set it above 1, as to 3")
    return None


def _unused(section: str, key: str, message: str, hint: str = "") -> ConflictError:
    hint = f"{hint}, or leave {section}.{key} out" if hint else f"leave {section}.{key} out"
    return ConflictError(message, hint, (section, key))
