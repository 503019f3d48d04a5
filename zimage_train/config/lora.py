"""Settings of what is trained."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from zimage_train.config.module_groups import TARGET_GROUPS, module_pattern, require_patterns
from zimage_train.config.types import ConflictError, NonEmptyPath, Section, SettingError, without_default

AdapterType = Literal["lora", "lokr", "loha", "dora", "oft"]
LORA_ONLY = ("dropout", "rank_dropout", "module_dropout", "ranks", "rslora", "start")
"""Settings of a plain LoRA that the other kinds do not have."""
LABELS: dict[AdapterType, str] = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "dora": "DoRA", "oft": "OFT"}
RANKS: dict[AdapterType, int | None] = {"lora": 16, "lokr": None, "loha": 16, "dora": 16, "oft": 32}
"""`rank` where it is left out."""


class LoraSettings(Section):
    type: AdapterType = "lora"
    """What is trained beside each weight. lora: a product of two matrices of `rank`; lokr: a Kronecker product of a
    small and a large matrix, which changes a weight in its full rank with few parameters; loha: two products of `rank`,
    multiplied element by element, which reaches the square of the rank with two LoRAs' parameters; dora: a LoRA and
    a factor for each row of the weight with it; oft: a rotation of each group of `rank` rows, which keeps their lengths
    and angles. The change of a dora or an oft depends on the weight; that of others does not."""
    rank: int | None = Field(default=16, ge=1, le=1024, json_schema_extra=without_default)
    """Rank of the LoRA, which is its capacity; the size of its file is proportional to it. Of a LoKr, the rank of its
    large matrix; null: that is stored whole. Of an OFT, the rows of a group, which divide those of each weight. If left
    out: null for lokr, 32 for oft, 16 for others."""
    factor: Literal["auto"] | Annotated[int, Field(ge=2, le=1024)] = 16
    """Of a LoKr: rows and columns of its small matrix. The smaller, the larger the other matrix, the capacity and the
    file; where it does not divide a side of the weight, the next smaller divisor. auto: both matrices about as large,
    which is the least capacity."""
    alpha: float | None = Field(default=None, gt=0.0)
    """The change to each weight is scaled by alpha / rank, with the rank of its module; null: alpha = rank, so the
    scale is 1."""
    rslora: bool = False
    """Whether the scale is alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732), so that a higher rank does not learn less;
    with alpha: null it is sqrt(rank), as in peft. The exported file has the scale in its weights."""
    ranks: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    """Ranks of modules that differ from `rank`, by group or by a regular expression for full module names: {attention:
    32, "layers.[0-4][.]feed.+": 8}. Each must match a module, and no module may match two."""
    targets: list[str] | str = ["attention", "feed_forward"]
    """Modules that are trained: a list of the groups attention, feed_forward, adaln and refiners, or a regular
    expression for full module names."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the LoRA's inputs that is set to zero during training."""
    rank_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction p of the ranks of each module that is left out of a sample during training; the others are scaled by
    1 / (1 - p)."""
    module_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the modules that have no LoRA in a forward pass of the training; the others are as they are."""
    start: Literal["zero", "orthogonal", "pissa"] = "zero"
    """The LoRA at step 0. zero: A random and B zero; orthogonal: both random, with a product of zero, for an even rank;
    pissa: the principal part of each weight (with the training adapter), which is subtracted again, so that the
    exported file has twice the rank. docs/settings.md compares them."""
    init_from: NonEmptyPath | None = None
    """LoRA to start from, with the same rank and modules: a file, or org/repo/file."""

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, value: list[str] | str) -> list[str] | str:
        if isinstance(value, str):
            module_pattern(value)
            return value
        hint = f"groups are {', '.join(TARGET_GROUPS)}; a regular expression is a single string"
        if not value:
            raise SettingError("names no group, so nothing would be trained", hint)
        for name in value:
            if name not in TARGET_GROUPS:
                raise SettingError(f"unknown group {name!r}", hint)
        return value

    @field_validator("ranks")
    @classmethod
    def _known_patterns(cls, value: dict[str, int]) -> dict[str, int]:
        require_patterns(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_rank(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, dict) else None
        if isinstance(kind, str) and kind in RANKS and "rank" not in values:
            return values | {"rank": RANKS[kind]}
        return values

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.type != "lokr":
            if self.rank is None:
                raise ConflictError(f"type: {self.type} needs a rank", "give a number", ("rank",))
            if "factor" in self.model_fields_set and self.factor != 16:
                what = f"factor is for type: lokr, and type: {self.type} has none"
                raise ConflictError(what, "leave it out", ("factor",))
        if self.alpha is not None and self.rank is None:
            hint = "leave it out, or give a rank"
            raise ConflictError("alpha has no effect on a LoKr whose matrices are whole", hint, ("alpha",))
        if self.type == "oft":
            self._require_rotation()
        for name in LORA_ONLY:
            if self.type != "lora" and getattr(self, name) != type(self).model_fields[name].default:
                raise ConflictError(f"{name} is for type: lora", "leave it out", (name,))
        self._require_start_fits()
        return self

    def _require_rotation(self) -> None:
        if self.alpha is not None:
            raise ConflictError("alpha is a scale, and a rotation has none", "leave it out", ("alpha",))
        if self.rank == 1:
            raise ConflictError("one row cannot be rotated", "give a rank of 2 or more", ("rank",))

    def _require_start_fits(self) -> None:
        if self.start == "zero":
            return
        if self.init_from is not None:
            raise ConflictError(f"start: {self.start} has no effect beside init_from", "leave it out", ("start",))
        if self.start == "pissa":
            for name in ("dropout", "rank_dropout", "module_dropout"):
                if getattr(self, name) > 0:
                    hint = "leave either of them out"
                    raise ConflictError(f"{name} with start: pissa would drop parts of the weights", hint, (name,))
            return
        odd = [rank for rank in (self.rank, *self.ranks.values()) if rank is not None and rank % 2]
        if odd:
            hint = f"take {odd[0] + 1}, or leave start out"
            raise ConflictError(f"start: orthogonal needs an even rank, and one is {odd[0]}", hint, ("start",))

    @property
    def factor_number(self) -> int | None:
        """The factor, or None for auto."""
        return None if self.factor == "auto" else self.factor

    @property
    def exported_rank(self) -> int | None:
        """The rank in the exported file, where PiSSA's subtracted part counts too."""
        return 2 * self.rank if self.start == "pissa" and self.rank is not None else self.rank

    @property
    def draws_masks(self) -> bool:
        """Whether a forward pass of the training is random."""
        return self.dropout > 0 or self.rank_dropout > 0 or self.module_dropout > 0

    def scale_at(self, rank: int) -> float:
        """Return the factor on the change of a module whose LoRA has `rank`."""
        alpha = rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def label(self) -> str:
        """The name of the kind."""
        return LABELS[self.type]

    @property
    def scale(self) -> float:
        """The factor on the change of every module, of kinds with a single rank."""
        return 1.0 if self.rank is None else self.scale_at(self.rank)

    @property
    def is_fusible(self) -> bool:
        """Whether fused blocks compute it; the layers of other kinds run as modules."""
        return self.type in ("lora", "lokr")

    @property
    def is_additive(self) -> bool:
        """Whether its change to a weight does not depend on that weight, so that it moves to another model as it is."""
        return self.type not in ("dora", "oft")

    @property
    def needs_norms(self) -> bool:
        """Whether its file has the norms of the rows of the weights that it is used on."""
        return self.type == "dora"

    @property
    def description(self) -> str:
        """The kind and its size, as log lines and `check` name it."""
        if self.type == "oft":
            return f"OFT of {self.rank} rows a group"
        others = ", ".join(f"{rank} on {name}" for name, rank in self.ranks.items())
        if self.type != "lokr":
            return f"{self.label} of rank {self.rank}" + (f" ({others})" if others else "")
        return f"LoKr of factor {self.factor}" + ("" if self.rank is None else f" and rank {self.rank}")


def adapter_error(lora: LoraSettings, has_adapter: bool, is_beside: bool, is_two_sided: bool) -> ConflictError | None:
    """Return the conflict of a kind whose change depends on the weights, or None if there is none.

    Args:
        has_adapter: whether a training adapter is merged for the training.
        is_beside: whether other LoRAs are merged for the training (`train.beside`).
        is_two_sided: whether the method trains at the weights +1 and -1.
    """
    if lora.is_additive:
        return None
    if has_adapter and lora.type == "oft":
        message = (
            "an OFT that learns beside a training adapter changes Turbo more, once that is removed, than a LoRA that "
            "learns as much (docs/methods.md)"
        )
        return ConflictError(message, "set lora.type: lora, or model.variant: deturbo or base", ("lora", "type"))
    if is_beside:
        message = f"the change of a {lora.label} depends on the weights, to which train.beside adds others"
        return ConflictError(message, "leave train.beside out, or set lora.type: lora", ("lora", "type"))
    if is_two_sided:
        message = f"the change of a {lora.label} at the weight -1 is not the reverse of that at +1"
        return ConflictError(message, "set lora.type: lora, lokr or loha", ("lora", "type"))
    return None
