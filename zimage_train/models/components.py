"""Text encoder, tokenizer and VAE of a diffusers folder, checked by configs and headers alone (torch-free).

The loaders call the same functions. Two checks need the model's own class, and happen only on loading: whether the VAE
has every tensor, and whether the rest of a config is consistent.
"""

from pathlib import Path
from typing import Any

from zimage_train.errors import Problem, WeightsError, ZImageTrainError, collect_errors, raise_all
from zimage_train.io.safetensors_format import TensorInfo, read_json, read_sharded
from zimage_train.models import arch

LATENT_CHANNELS = 16
LATENT_STRIDE = 8
"""Pixels per latent, in each direction."""
MAX_SIZE = 10_000_000
"""No size in a config is larger; a damaged config must not make us allocate that much."""


def require_components(extras: Path, features: int) -> None:
    """Require that all components can be loaded, and that embeddings have the `features` that the transformer takes.

    Raises:
        WeightsError: lists what is wrong with each component.
    """
    errors: list[ZImageTrainError] = []
    with collect_errors(errors):
        width = read_text_encoder(extras)[0].get("hidden_size")
        if width != features:
            what = f"makes embeddings of {width} features, and the transformer takes {features}"
            raise WeightsError(Problem(str(extras / "text_encoder"), what, "check model.extras", "other-shape"))
    with collect_errors(errors):
        tokenizer_folder(extras)
    with collect_errors(errors):
        read_vae(extras)
    raise_all(errors)


def read_text_encoder(extras: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return the config and the tensor headers of a Qwen3.

    Raises:
        WeightsError: it is another model, or incomplete.
    """
    folder = extras / "text_encoder"
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind != "qwen3":
        raise WeightsError(
            Problem(str(folder / "config.json"), f"is a {kind}, not a Qwen3", "check model.extras", "other-model")
        )
    tensors = read_sharded(folder, "model")
    expected = _qwen3_tensors(folder / "config.json", config)
    actual = {name.removeprefix("model."): info.shape for name, info in tensors.items()}
    # The file also holds the last layer, the final norm and the head, which are not used and may be anything.
    used = {name: actual[name] for name in actual.keys() & expected.keys()}
    arch.require_same_shapes(str(folder), used, expected, "Qwen3")
    return config, tensors


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


def tokenizer_folder(extras: Path) -> Path:
    """Return the folder of the tokenizer.

    Raises:
        WeightsError: it has no tokenizer.json, a damaged tokenizer, or no chat template.
    """
    folder = extras / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        raise WeightsError(Problem(str(folder), "has no tokenizer.json", "get the folder again", "missing-file"))
    if not isinstance(read_json(folder / "tokenizer.json").get("model"), dict):
        raise WeightsError(
            Problem(str(folder / "tokenizer.json"), "is not a tokenizer", "get the folder again", "damaged-file")
        )
    settings = read_json(folder / "tokenizer_config.json")
    if not (folder / "chat_template.jinja").exists() and not settings.get("chat_template"):
        raise WeightsError(Problem(str(folder), "has no chat template", "get the folder again", "missing-template"))
    return folder


def read_vae(extras: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return the config and the tensor headers of an AutoencoderKL with 16 channels and stride 8.

    Raises:
        WeightsError: it is another model, or incomplete.
    """
    folder = extras / "vae"
    config = read_json(folder / "config.json")
    kind, channels = config.get("_class_name"), config.get("latent_channels")
    blocks = config.get("block_out_channels")
    stride = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else None
    if kind != "AutoencoderKL" or channels != LATENT_CHANNELS or stride != LATENT_STRIDE:
        what = f"is a {kind} with {channels} channels and stride {stride}"
        raise WeightsError(
            Problem(str(folder), what, "Z-Image needs an AutoencoderKL with 16 channels and stride 8", "other-model")
        )
    return config, read_sharded(folder, "diffusion_pytorch_model")
