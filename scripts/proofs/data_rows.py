"""Rows of images and captions."""

from proofs import numbers
from proofs.rows import ANOTHER, EQUAL, Row, becomes, same_as, such_that, times
from proofs.trials import LEFT_OUT

CLASS = {"data.1.folder": "{class}", "data.1.resolution": [64]}
TAGS = "zorb, red, big, on the left, drawn, plain background"


def _is_reordered(without: list[str], with_it: list[str]) -> bool:
    same = [sorted(one.split(", ")) == sorted(other.split(", ")) for one, other in zip(without, with_it, strict=True)]
    return all(same) and without != with_it and all(not text or text.startswith("zorb") for text in with_it)


def _keeps_the_first(without: list[str], with_it: list[str]) -> bool:
    tagged = [text for text in with_it if "," in text]
    return bool(tagged) and all(text.startswith("zorb, red") for text in tagged) and without != with_it


def _has_fewer_tags(without: list[str], with_it: list[str]) -> bool:
    return sum(text.count(",") for text in with_it) < sum(text.count(",") for text in without)


SOURCES = [
    Row("data.0.folder", "{class}", numbers.CAPTIONS, ANOTHER, neutral="{images}"),
    Row("data.0.metadata", "{table}", numbers.EPOCH, becomes(3, 8), beside={"data.0.folder": LEFT_OUT}),
    Row(
        "data.0.prompts",
        "{prompts}",
        numbers.EPOCH,
        becomes(2, 8),
        beside={"data.0.folder": LEFT_OUT, "train.method": "de_distill", "model.adapter": None},
    ),
    Row("data.0.resolution", [64, 48], numbers.EPOCH, times(2)),
    Row("data.0.repeat_equal_sizes", True, numbers.EPOCH, times(2), given={"data.0.resolution": [512, 768]}),
    Row(
        "data.0.max_pixels",
        48 * 48,
        numbers.SIZES,
        such_that("at most 2304", lambda _, with_it: max(with_it) <= 2304),
        beside={"data.0.resolution": LEFT_OUT},
        neutral={"data.0.max_pixels": 64 * 64, "data.0.resolution": LEFT_OUT},
    ),
    Row("data.0.repeats", 3, numbers.EPOCH, times(3)),
    Row("data.0.repeats", "by_folder", numbers.EPOCH, times(2)),
    Row(
        "data.0.batch_size",
        3,
        numbers.BATCH,
        becomes(3, 2),
        neutral={"data.0.batch_size": 2, "train.batch_size": 1},
    ),
    Row("data.0.weight", 2.0, numbers.GRADIENT, times(2.0)),
    Row("data.0.weight", 0.5, numbers.GRADIENT, times(0.5), given={"train.grad_accumulation": 2}),
    Row("data.1.regularization", True, numbers.REGULARIZED, becomes(8, 0), given=CLASS),
    Row(
        "data.1.regularization",
        "prior",
        numbers.GRADIENTS,
        ANOTHER,
        given=CLASS | {"data.1.regularization": True, "train.regularization_share": 0.75},
    ),
    Row("data.0.flip", True, numbers.EPOCH, times(2)),
]

CAPTIONS = [
    Row(
        "data.0.trigger",
        "blorb",
        numbers.CAPTIONS,
        such_that("each begins with it", lambda _, with_it: all(text.startswith("blorb") for text in with_it)),
    ),
    Row(
        "data.0.default_caption",
        "a toy",
        numbers.FIRST_CAPTION,
        becomes("zorb a toy", "zorb"),
        given={"train.epochs": 1.0},
    ),
    Row(
        "data.0.caption_ext",
        ".caption",
        numbers.FIRST_CAPTION,
        becomes("a zorb, number 0\na drawing of a zorb, number 0", "zorb"),
    ),
    Row(
        "data.0.caption_lines",
        True,
        numbers.FIRST_CAPTION,
        becomes("a zorb, number 0"),
        given={"data.0.caption_ext": ".caption"},
    ),
    Row("data.0.caption_lines", True, numbers.FIRST_CAPTION, EQUAL, neutral=True, lora="same"),
    Row("data.0.caption_dropout", 1.0, numbers.EPOCH_PROMPTS, becomes([""] * 8)),
    Row(
        "data.0.dropout_keeps_trigger",
        True,
        numbers.EPOCH_PROMPTS,
        becomes(["zorb"] * 8),
        given={"data.0.caption_dropout": 1.0},
    ),
    Row("data.0.shuffle_tags", True, numbers.EPOCH_PROMPTS, such_that("other order, trigger first", _is_reordered)),
    Row(
        "data.0.keep_tags",
        1,
        numbers.EPOCH_PROMPTS,
        such_that("zorb, red first", _keeps_the_first),
        given={"data.0.shuffle_tags": True},
    ),
    Row("data.0.tag_dropout", 0.5, numbers.EPOCH_PROMPTS, such_that("fewer tags", _has_fewer_tags)),
]

MASKS = [
    Row(
        "data.0.mask",
        "{half}",
        numbers.LOSS,
        ANOTHER,
        neutral={"data.0.mask": "{white}", "data.0.mask_floor": 0.5, "data.0.mask_prior": 1.0},
    ),
    Row(
        "data.0.mask",
        "alpha",
        numbers.LOSS,
        same_as({"data.0.mask": "{half}"}, "that of masks with the same values"),
        given={"data.0.folder": "{transparent}"},
    ),
    Row("data.0.mask_floor", 0.5, numbers.LOSS, ANOTHER, given={"data.0.mask": "{half}"}),
    Row(
        "data.0.mask_prior",
        1.0,
        numbers.GRADIENTS,
        such_that(
            "another from step 2 on: in step 1 the LoRA is zero",
            lambda without, with_it: without[0] == with_it[0] and without[1] != with_it[1],
        ),
        given={"data.0.mask": "{half}", "data.0.mask_floor": 0.0},
    ),
]

TABLE = [*SOURCES, *CAPTIONS, *MASKS]
