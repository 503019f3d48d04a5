"""Names and shapes of all parameters of a Z-Image transformer, computed from its configuration without building it.

Torch-free, so that `check` can compare a file with it at once. A test compares the result with the diffusers class.
"""

import math
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from zimage_train.errors import Problem, WeightsError

ADALN_DIM = 256
T_EMBEDDER_DIM = 1024
TensorShape = tuple[int, ...]
MAX_LAYERS = 1000
IN_A_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward)\.")
"""Matches the linear layers that hold 98 % of the weights, the only layers that are ever quantised."""
BLOCK_PRODUCTS = (
    ("attention.to_q", "attention.to_k", "attention.to_v"),
    ("attention.to_out.0",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)
"""The linear layers of a block in the order in which they run; those of a group have the same input."""
SCALE_BLOCK = 64
"""Number of quantised weights that share a scale; see `scale_block_size`."""
MAX_PROMPT_TOKENS = 512
"""Tokens of a prompt, with its chat template, that the model reads; the rest is cut off."""


@dataclass(frozen=True)
class TransformerShape:
    """The fields of the transformer's config that determine its parameters; the defaults are those of the 6 B model."""

    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    in_channels: int = 16
    cap_feat_dim: int = 2560
    norm_eps: float = 1e-5
    qk_norm: bool = True
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: TensorShape = (32, 48, 48)
    axes_lens: TensorShape = (1536, 512, 512)
    all_patch_size: TensorShape = (2,)
    all_f_patch_size: TensorShape = (1,)

    @property
    def ffn_dim(self) -> int:
        """Hidden size of the feed forward, computed as in diffusers, with its rounding."""
        return int(self.dim / 3 * 8)

    def config(self) -> dict[str, Any]:
        """Return the keyword arguments of `ZImageTransformer2DModel`."""
        arguments: dict[str, Any] = {}
        for key, value in asdict(self).items():
            arguments[key] = list(value) if isinstance(value, tuple) else value
        return arguments

    @cached_property
    def parameters(self) -> dict[str, TensorShape]:
        """Return the name and shape of every parameter."""
        patch = self.in_channels * self.all_patch_size[0] ** 2 * self.all_f_patch_size[0]
        adaln = min(self.dim, ADALN_DIM)
        size = f"{self.all_patch_size[0]}-{self.all_f_patch_size[0]}"
        shapes: dict[str, TensorShape] = {
            "x_pad_token": (1, self.dim),
            "cap_pad_token": (1, self.dim),
            **_linear(f"all_x_embedder.{size}", patch, self.dim),
            **_linear(f"all_final_layer.{size}.linear", self.dim, patch),
            **_linear(f"all_final_layer.{size}.adaLN_modulation.1", adaln, self.dim),
            **_linear("t_embedder.mlp.0", ADALN_DIM, T_EMBEDDER_DIM),
            **_linear("t_embedder.mlp.2", T_EMBEDDER_DIM, adaln),
            "cap_embedder.0.weight": (self.cap_feat_dim,),
            **_linear("cap_embedder.1", self.cap_feat_dim, self.dim),
        }
        for group, count in (("noise_refiner", self.n_refiner_layers), ("layers", self.n_layers)):
            for index in range(count):
                shapes |= self._block(f"{group}.{index}")
                shapes |= _linear(f"{group}.{index}.adaLN_modulation.0", adaln, 4 * self.dim)
        # Text does not depend on the time step: the context refiner has no adaLN modulation.
        for index in range(self.n_refiner_layers):
            shapes |= self._block(f"context_refiner.{index}")
        return shapes

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the name and (out, in) of every linear layer."""
        return {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.parameters.items()
            if name.endswith(".weight") and len(shape) == 2
        }

    def _block(self, prefix: str) -> dict[str, TensorShape]:
        head = self.dim // self.n_heads
        names = {f"attention.{part}.weight": (self.dim, self.dim) for part in ("to_q", "to_k", "to_v", "to_out.0")}
        if self.qk_norm:
            names |= {"attention.norm_q.weight": (head,), "attention.norm_k.weight": (head,)}
        names |= {f"feed_forward.{part}.weight": (self.ffn_dim, self.dim) for part in ("w1", "w3")}
        names |= {"feed_forward.w2.weight": (self.dim, self.ffn_dim)}
        names |= {f"{n}.weight": (self.dim,) for n in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")}
        return {f"{prefix}.{name}": shape for name, shape in names.items()}


def shape_from_config(path: Path, config: dict[str, Any]) -> TransformerShape:
    """Return the shape that a diffusers `config.json` describes; missing keys default to those of the 6 B model.

    Raises:
        WeightsError: the config is of another class, of an unsupported model, or contradicts itself.
    """
    kind = config.get("_class_name", "ZImageTransformer2DModel")
    if kind != "ZImageTransformer2DModel":
        raise WeightsError(
            Problem(str(path), f"is a {kind}, not a Z-Image transformer", "check model.path", "other-model")
        )
    if config.get("siglip_feat_dim") is not None:
        raise WeightsError(
            Problem(str(path), "is Z-Image Omni, which is not supported", "use Turbo, De-Turbo or Base", "other-model")
        )
    arguments: dict[str, Any] = {}
    for key in asdict(TransformerShape()).keys() & config.keys():
        value = config[key]
        arguments[key] = tuple(value) if isinstance(value, list) else value
    try:
        shape = TransformerShape(**arguments)
        if not (0 < shape.n_layers <= MAX_LAYERS and 0 <= shape.n_refiner_layers <= MAX_LAYERS):
            raise ValueError(f"n_layers {shape.n_layers}, n_refiner_layers {shape.n_refiner_layers}")
        if shape.dim // shape.n_heads != sum(shape.axes_dims):
            raise ValueError(f"dim {shape.dim} / n_heads {shape.n_heads} is not the sum of axes_dims {shape.axes_dims}")
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(
            Problem(str(path), f"is not a valid config ({error})", "get the file again", "damaged-config")
        ) from None
    return shape


def shape_from_tensors(shapes: dict[str, TensorShape]) -> TransformerShape:
    """Return the shape of a single-file checkpoint, which has no config: sizes are derived from its tensors.

    All published Z-Image checkpoints agree in every other field; rotary positions take 1/4, 3/8 and 3/8 of a head.
    """

    def count(group: str) -> int:
        matches = [re.match(rf"{group}\.(\d+)\.", name) for name in shapes]
        return 1 + max((int(match[1]) for match in matches if match), default=-1)

    def first_size(name: str, default: int) -> int:
        # A damaged file may hold it without sizes, or empty; the comparison with all expected shapes names it then.
        return next(iter(shapes.get(name, ())), 0) or default

    base = TransformerShape()
    dim = first_size("cap_embedder.1.weight", base.dim)
    head = first_size("layers.0.attention.norm_q.weight", sum(base.axes_dims))
    heads = max(dim // head, 1)
    axes = tuple(axis * head // sum(base.axes_dims) for axis in base.axes_dims)
    return replace(
        base,
        dim=dim,
        n_layers=count("layers"),
        n_refiner_layers=count("noise_refiner"),
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=first_size("cap_embedder.0.weight", base.cap_feat_dim),
        axes_dims=axes,
    )


def require_same_shapes(
    where: str, actual: dict[str, TensorShape], expected: dict[str, TensorShape], what: str
) -> None:
    """Require that `actual` has exactly the tensor names and shapes of `expected`, which are those of a `what`.

    Raises:
        WeightsError: names the tensors that are missing, unexpected or of another shape, up to three of each.
    """
    missing = sorted(expected.keys() - actual.keys())
    extra = sorted(actual.keys() - expected.keys())
    misshapen = sorted(name for name in actual.keys() & expected.keys() if actual[name] != expected[name])
    problems = []
    if missing:
        message = f"{len(missing)} tensors of {what} are missing: {_first_three(missing)}"
        problems.append(Problem(where, message, "get it again", "missing-tensors"))
    if extra:
        message = f"{len(extra)} tensors are not of {what}: {_first_three(extra)}"
        problems.append(Problem(where, message, "is it the right file?", "other-model"))
    if misshapen:
        details = [f"{name} is {list(actual[name])}, expected {list(expected[name])}" for name in misshapen]
        message = f"{len(misshapen)} tensors have another shape: {_first_three(details)}"
        problems.append(Problem(where, message, "is it the right file?", "other-shape"))
    if problems:
        raise WeightsError(*problems)


def _first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _linear(name: str, inputs: int, outputs: int) -> dict[str, TensorShape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def scale_block_size(columns: int) -> int:
    """Return the number of weights per scale in rows of `columns`: 64, or the largest power of two that divides."""
    return math.gcd(columns, SCALE_BLOCK)


def padded_tokens(tokens: int) -> int:
    """Return `tokens` rounded up to a multiple of 32, as the model pads captions and images each."""
    return -(-tokens // 32) * 32


def image_tokens(width: int, height: int) -> int:
    """Return the padded number of tokens of an image of so many px: a token per patch of 2 x 2 latents of 8 x 8 px."""
    return padded_tokens(width * height // 256)
