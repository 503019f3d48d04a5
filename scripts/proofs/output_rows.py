"""Rows of averages, previews, validation, files and logs: all leave the training as it is, byte for byte."""

from proofs import numbers
from proofs.rows import ANOTHER, Row, becomes, such_that, times

PREVIEWED = {
    "sample.every": 1,
    "sample.prompts": ["a zorb"],
    "sample.width": 64,
    "sample.height": 64,
    "sample.steps": 2,
}
UNPREVIEWED = {key: value for key, value in PREVIEWED.items() if key != "sample.every"}
GUIDED = PREVIEWED | {"sample.guidance": 2.0}
ONE = "sample.prompts.0."
LISTED = {key: value for key, value in GUIDED.items() if key != "sample.prompts"} | {f"{ONE}prompt": "a zorb"}
EXTRA = PREVIEWED | {"sample.extra_loras.0.file": "{distillpatch}"}
HELD_OUT = {"validation.folder": "{few}", "validation.resolution": 64}


def drawn(key: str):
    """Return the number of the sampling setting `key` of the first preview."""
    return numbers.of_preview(f"{key} of a preview", key)


PREVIEWS = [
    Row("sample.every", 1, numbers.PREVIEW_STEPS, becomes([0, 1, 2], []), given=UNPREVIEWED, lora="same"),
    Row("sample.first", False, numbers.PREVIEW_STEPS, becomes([1, 2], [0, 1, 2]), given=PREVIEWED, lora="same"),
    Row("sample.prompts", ["a zorb", "a circle"], numbers.PREVIEWS, becomes(2, 1), given=PREVIEWED, lora="same"),
    Row(
        f"{ONE}prompt",
        "a circle",
        drawn("prompt"),
        becomes("a circle", "a zorb"),
        given=LISTED,
        lora="same",
        neutral="a zorb",
    ),
    Row(f"{ONE}negative", "blurry", drawn("negative"), becomes("blurry", ""), given=LISTED, lora="same"),
    Row(f"{ONE}seed", 5, drawn("seed"), becomes("5", "42"), given=LISTED, lora="same"),
    Row(f"{ONE}width", 80, drawn("width"), becomes("80", "64"), given=LISTED, lora="same"),
    Row(f"{ONE}height", 80, drawn("height"), becomes("80", "64"), given=LISTED, lora="same"),
    Row("sample.negative", "blurry", drawn("negative"), becomes("blurry", ""), given=GUIDED, lora="same"),
    Row("sample.width", 80, drawn("width"), becomes("80", "64"), given=PREVIEWED, lora="same"),
    Row("sample.height", 80, drawn("height"), becomes("80", "64"), given=PREVIEWED, lora="same"),
    Row("sample.steps", 3, drawn("steps"), becomes("3", "2"), given=PREVIEWED, lora="same"),
    Row("sample.guidance", 2.0, drawn("guidance"), becomes("2.0", "0.0"), given=PREVIEWED, lora="same"),
    Row("sample.seed", 5, drawn("seed"), becomes("5", "42"), given=PREVIEWED, lora="same"),
    Row("sample.weights", "ema", numbers.PREVIEW_PIXELS, ANOTHER, given=PREVIEWED | {"ema.decay": 0.9}, lora="same"),
    Row(
        "sample.lora_weights",
        [-1.0, 1.0, 2.0],
        numbers.WEIGHT_FOLDERS,
        becomes(["weight_-1", "weight_2"], []),
        given=PREVIEWED,
        lora="same",
        neutral=[1.0],
    ),
    Row("sample.extra_loras", ["{distillpatch}"], numbers.PREVIEW_PIXELS, ANOTHER, given=PREVIEWED, lora="same"),
    Row(
        "sample.extra_loras.0.file",
        "{trained}",
        numbers.PREVIEW_PIXELS,
        ANOTHER,
        given=EXTRA,
        lora="same",
        neutral="{distillpatch}",
    ),
    Row("sample.extra_loras.0.weight", 0.5, numbers.PREVIEW_PIXELS, ANOTHER, given=EXTRA, lora="same"),
    Row(
        "sample.compare_on",
        "{other}",
        numbers.SECOND_PREVIEWS,
        such_that("those of three steps", lambda a, b: len(b) == 3 and not a),
        given=PREVIEWED,
        lora="same",
    ),
]

OUTPUTS = [
    Row("ema.decay", 0.9, numbers.AVERAGES, becomes(["proof.safetensors"], []), lora="same"),
    Row(
        "validation.folder",
        "{few}",
        numbers.VALIDATIONS,
        becomes([0, 2], []),
        given={"validation.resolution": 64},
        lora="same",
    ),
    Row("validation.every", 1, numbers.VALIDATIONS, becomes([0, 1, 2], [0, 2]), given=HELD_OUT, lora="same"),
    Row(
        "validation.resolution",
        48,
        numbers.VALIDATION_SIZES,
        such_that("at most 48 x 48", lambda a, b: max(b) <= 48 * 48 < max(a)),
        given=HELD_OUT,
        lora="same",
    ),
    Row(
        "save.every",
        1,
        numbers.EXPORTS,
        becomes(["proof-000001.safetensors", "proof.safetensors"], ["proof.safetensors"]),
        lora="same",
    ),
    Row(
        "save.keep",
        1,
        numbers.EXPORTS,
        becomes(["proof-000002.safetensors", "proof.safetensors"]),
        given={"save.every": 1, "train.steps": 3},
        lora="same",
    ),
    Row(
        "save.checkpoint_minutes",
        1e-6,
        numbers.CHECKPOINTS,
        becomes(["step-000001.safetensors", "step-000002.safetensors"], ["step-000002.safetensors"]),
        lora="same",
    ),
    Row("save.dtype", "bf16", numbers.TENSOR_BYTES, times(0.5, 2e-3)),
    Row(
        "save.metadata", "none", numbers.METADATA, such_that("format alone", lambda a, b: set(b) < set(a)), lora="same"
    ),
    Row("save.metadata", "full", numbers.METADATA, such_that("more", lambda a, b: set(b) > set(a)), lora="same"),
    Row("log.tensorboard", True, numbers.BOARD, becomes(1, 0), lora="same"),
    Row("log.wandb", "proofs", numbers.WANDB, becomes(1, 0), lora="same"),
]

TABLE = [*PREVIEWS, *OUTPUTS]
