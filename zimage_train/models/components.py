"""Text encoder, tokenizer and VAE, checked by configs and headers alone (torch-free).

The text encoder and the VAE are folders, as diffusers writes them, or single files, whose config follows from their
tensors (`single_files`). The loaders call the same functions. Two checks need the model's own class, and happen only on
loading: whether the VAE has every tensor, and whether the rest of a config is consistent.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from zimage_train.errors import Problem, WeightsError, ZImageTrainError, collect_errors, raise_all
from zimage_train.io.safetensors_format import read_json
from zimage_train.models import arch, single_files, stored_weights
from zimage_train.models.stored_weights import StoredWeight

LATENT_CHANNELS = 16
LATENT_STRIDE = 8
"""Pixels per latent, in each direction."""
TEXT_ENCODER_HINT = "check model.extras and model.text_encoder"
DERIVED = ".rotary_emb.inv_freq"
MAX_SIZE = 10_000_000
"""No size in a config is larger; a damaged config must not make us allocate that much."""


@dataclass(frozen=True)
class ExtrasPaths:
    """The parts of a model besides its transformer."""

    text_encoder: Path
    """A folder with config.json and weights, or a single .safetensors."""
    tokenizer: Path
    """A folder."""
    vae: Path
    """A folder with config.json and weights, or a single .safetensors."""

    @classmethod
    def in_folder(cls, folder: Path) -> Self:
        """Return the parts of the pipeline in `folder`."""
        return cls(folder / "text_encoder", folder / "tokenizer", folder / "vae")


@dataclass(frozen=True)
class ModelPaths:
    """Paths of everything a run reads."""

    transformer: Path
    """A folder with config.json and weights, or a single .safetensors."""
    extras: ExtrasPaths
    adapter: Path | None
    second_model: Path | None = None
    """The transformer that previews are drawn on beside."""
    init_from: Path | None = None
    """The LoRA that the training begins with."""
    extra_loras: tuple[Path, ...] = ()
    """LoRAs that previews have besides the run's own."""
    beside: tuple[Path, ...] = ()
    """LoRAs that are in place while the run's own is trained."""


def require_components(extras: ExtrasPaths, features: int) -> None:
    """Require that all components can be loaded, and that embeddings have the `features` that the transformer takes.

    Raises:
        WeightsError: lists what is wrong with each component.
    """
    errors: list[ZImageTrainError] = []
    with collect_errors(errors):
        width = read_text_encoder(extras.text_encoder)[0].get("hidden_size")
        if width != features:
            what = f"makes embeddings of {width} features, and the transformer takes {features}"
            raise WeightsError(Problem(str(extras.text_encoder), what, TEXT_ENCODER_HINT, "other-shape"))
    with collect_errors(errors):
        require_tokenizer(extras.tokenizer)
    with collect_errors(errors):
        read_vae(extras.vae)
    raise_all(errors)


def read_text_encoder(path: Path) -> tuple[dict[str, Any], dict[str, StoredWeight]]:
    """Return the config and the weights of a Qwen3, by their names in its class without `model.`.

    Raises:
        WeightsError: it is another model, in a precision that is not read, or incomplete.
    """
    config = read_json(path / "config.json") if path.is_dir() else None
    if config is not None and config.get("model_type") != "qwen3":
        message = f"is {_kind_of(config)}, not a Qwen3"
        raise WeightsError(Problem(str(path / "config.json"), message, TEXT_ENCODER_HINT, "other-model"))
    stored = stored_weights.read_part(path, "text_encoder")
    # Old exports hold the frequencies of the positions, which follow from the config.
    weights = {key.removeprefix("model."): one for key, one in stored.items() if not key.endswith(DERIVED)}
    shapes = {name: weight.shape for name, weight in weights.items()}
    if config is None:
        config = single_files.qwen3_config(path, shapes)
    expected = _qwen3_tensors(path / "config.json" if path.is_dir() else path, config)
    # The file also holds the last layer, the final norm and the head, which are not used and may be anything.
    layers = {_layer_of(name) for name in expected}
    used = {name: shape for name, shape in shapes.items() if _layer_of(name) in layers}
    arch.require_same_shapes(str(path), used, expected, "Qwen3")
    return config, weights


def _kind_of(config: dict[str, Any]) -> str:
    """Return what a config says that its model is, as a part of a sentence."""
    kind = config.get("model_type") or config.get("_class_name")
    return str(kind)[:40] if kind else "no model that is known"


def _layer_of(name: str) -> tuple[str, ...]:
    """Return the part of a Qwen3 that a tensor is of, such as (`layers`, `7`)."""
    return tuple(name.split(".")[:2])


def _qwen3_tensors(path: Path, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a Qwen3, without the last layer, the final norm and the head."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys = (*keys, "num_key_value_heads", "head_dim")
    for key in keys:
        if type(config.get(key)) is not int or not 0 < config[key] < MAX_SIZE:
            raise WeightsError(Problem(str(path), f"{key} is {config.get(key)!r}", "get the file again", "bad-value"))
    vocab, width, inner, layers, heads, kv_heads, head = (config[key] for key in keys)
    layer = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (heads * head, width),
        "self_attn.k_proj": (kv_heads * head, width),
        "self_attn.v_proj": (kv_heads * head, width),
        "self_attn.o_proj": (width, heads * head),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    tensors: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocab, width)}
    for index in range(min(layers, 1000) - 1):
        tensors |= {f"layers.{index}.{name}.weight": size for name, size in layer.items()}
    return tensors


def require_tokenizer(folder: Path) -> None:
    """Require a tokenizer with a chat template in `folder`.

    Raises:
        WeightsError: it has no tokenizer.json, a damaged tokenizer, or no chat template.
    """
    if not (folder / "tokenizer.json").exists():
        raise WeightsError(Problem(str(folder), "has no tokenizer.json", "get the folder again", "missing-file"))
    if not isinstance(read_json(folder / "tokenizer.json").get("model"), dict):
        raise WeightsError(
            Problem(str(folder / "tokenizer.json"), "is not a tokenizer", "get the folder again", "damaged-file")
        )
    settings = read_json(folder / "tokenizer_config.json")
    if not (folder / "chat_template.jinja").exists() and not settings.get("chat_template"):
        raise WeightsError(Problem(str(folder), "has no chat template", "get the folder again", "missing-template"))


def read_vae(path: Path) -> tuple[dict[str, Any], dict[str, StoredWeight]]:
    """Return the config and the weights of an AutoencoderKL with 16 channels and stride 8, by their names in the file.

    Raises:
        WeightsError: it is another model, in a precision that is not read, or incomplete.
    """
    if not path.is_dir():
        weights = stored_weights.read_part(path, "vae")
        return single_files.vae_config(path, {name: weight.shape for name, weight in weights.items()}), weights
    config = read_json(path / "config.json")
    kind, channels = config.get("_class_name"), config.get("latent_channels")
    blocks = config.get("block_out_channels")
    stride = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and 0 < len(blocks) < 10 else None
    if kind != "AutoencoderKL" or channels != LATENT_CHANNELS or stride != LATENT_STRIDE:
        what = f"is {_kind_of(config)}"
        if kind == "AutoencoderKL":
            what += f" with {channels} channels and stride {stride}"
        raise WeightsError(
            Problem(str(path), what, "Z-Image needs an AutoencoderKL with 16 channels and stride 8", "other-model")
        )
    return config, stored_weights.read_part(path, "vae")
