"""Rows of the run itself, the model, its memory and the cache."""

from typing import Any

from zimage_train.config.types import RECOMPUTE_MODES

from proofs import numbers
from proofs.rows import ANOTHER, EQUAL, LESS, Row, becomes, same_as, such_that, times

BF16 = {"model.dtype": "bf16"}
SMALL_CARD = {"memory.budget_gb": 7.0}
PREVIEWED = {
    "sample.every": 2,
    "sample.first": False,
    "sample.prompts": ["a zorb"],
    "sample.width": 64,
    "sample.height": 64,
}


def _share(low: float, high: float) -> Any:
    """Return an expectation: the number is this part of that without the setting."""
    return such_that(f"x {low:g} to {high:g}", lambda without, with_it: low < with_it / without < high)


RUN = [
    Row("name", "other", numbers.NAME, becomes("other.safetensors", "proof.safetensors"), neutral="proof", lora="same"),
    Row("output_dir", "{elsewhere}", numbers.FOLDER, becomes("elsewhere"), neutral="runs", lora="same"),
    Row("seed", 8, numbers.SIGMAS, ANOTHER),
    Row("cache.folder", "{elsewhere}", numbers.CACHE_FOLDER, becomes("elsewhere", "cache"), lora="same"),
]

MODEL = [
    Row(
        "model.variant",
        "base",
        numbers.ODDS,
        times(2.0, 1e-3),
        given={"timesteps.type": "uniform_shift", "model.adapter": None},
    ),
    Row(
        "model.variant",
        "deturbo",
        numbers.of_preview("sampling steps", "steps"),
        becomes("25", "8"),
        given=PREVIEWED | {"model.adapter": None},
        lora="same",
    ),
    Row("model.path", "{base}", numbers.LOSS, ANOTHER, neutral={"model.path": "{other}", "model.extras": "{turbo}"}),
    Row("model.extras", "{other}", numbers.LOSS, ANOTHER, neutral="{turbo}"),
    Row("model.text_encoder", "{other}", numbers.LOSS, ANOTHER, neutral="{turbo}"),
    Row("model.tokenizer", "{other}", numbers.LOSS, ANOTHER, neutral="{turbo}"),
    Row("model.vae", "{other}", numbers.LOSS, ANOTHER, neutral="{turbo}"),
    Row("model.adapter", None, numbers.ADAPTER, becomes("none", "48/48"), neutral="{adapter_v1}"),
    Row("model.adapter", "{adapter_v2}", numbers.LOSS, ANOTHER, neutral="{adapter_v1}"),
    Row("model.adapter_strength", 0.0, numbers.LOSS, same_as({"model.adapter": None}, "that without an adapter")),
    Row("model.dtype", "bf16", numbers.WEIGHTS_GB, times(0.5)),
    Row("model.quantize", "int8", numbers.WEIGHTS_GB, _share(0.5, 0.55), given=BF16),
    Row("model.quantize", "fp8", numbers.WEIGHTS_GB, _share(0.5, 0.55), given=BF16),
    Row("model.quantize", "nf4", numbers.WEIGHTS_GB, _share(0.25, 0.31), given=BF16),
    Row(
        "model.quantize",
        "fp8_fast",
        numbers.STEP_SECONDS,
        LESS,
        given=BF16,
        gpu="products in fp8",
    ),
    Row("model.quantize", "auto", numbers.QUANTIZATION, becomes("int8", None), given=BF16 | SMALL_CARD, lora="same"),
]

ATTENTION = [
    *(
        Row(
            "model.attention",
            name,
            numbers.STEP_SECONDS,
            ANOTHER,
            given={"train.reproducible": False},
            refused="needs an NVIDIA GPU",
            gpu="FlashAttention 3 and 4, and cuDNN's attention",
        )
        for name in ("flash3", "flash4", "cudnn")
    ),
    Row("model.attention", "sdpa", numbers.LOSSES, EQUAL, lora="same"),
]

MEMORY = [
    Row(
        "memory.budget_gb",
        12.0,
        numbers.PEAK_GB,
        such_that("at most 12", lambda without, with_it: with_it <= 12.0 < without),
        given=BF16,
        lora="same",
    ),
    *(
        Row(
            "memory.checkpointing",
            value,
            numbers.MODE,
            becomes([mode]),
            given={"memory.checkpointing": "full" if mode == "none" else "none"},
            lora="same",
        )
        for value, mode in (*((mode, mode) for mode in RECOMPUTE_MODES), (False, "none"), (True, "full"))
    ),
    Row("memory.offload", 0.5, numbers.STREAMED, becomes(3, 0), lora="same", neutral=0.0),
]

TABLE = [*RUN, *MODEL, *ATTENTION, *MEMORY]
