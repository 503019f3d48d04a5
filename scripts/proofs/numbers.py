"""The numbers that the rows of the proof table look at."""

import math
from pathlib import Path

from safetensors.torch import load_file

from zimage_train.planning import flops

from proofs.rows import Number
from proofs.trials import H100, LARGE, Trial


def of_files(name: str, pattern: str) -> Number:
    """Return the names of the files of the run folder that match a pattern."""
    return Number(name, lambda trial: trial.files(pattern))


def of_preview(name: str, key: str) -> Number:
    """Return a sampling setting of the first preview."""
    return Number(name, lambda trial: trial.texts()[key])


def _samples(trial: Trial) -> list[str]:
    return trial.records[0]["samples"]


def _sigmas(trial: Trial) -> list[float]:
    sigmas: list[float] = []
    for record in trial.records:
        sigmas += record["sigma"]
    return sigmas


def _odds(trial: Trial) -> list[float]:
    return [sigma / (1.0 - sigma) for sigma in _sigmas(trial)]


def _logits(trial: Trial) -> list[float]:
    return [math.log(odds) for odds in _odds(trial)]


def _epoch_prompts(trial: Trial) -> list[str]:
    return [trial.spec.order.sample(item, 0).prompt for item in trial.spec.items]


def _captions(trial: Trial) -> list[str]:
    return [item.image.prompts[0] for item in trial.spec.items if item.repeat == 0]


def _parameters(trial: Trial) -> int:
    return sum(math.prod(shape) for name, shape in trial.shapes.items() if not name.endswith(".alpha"))


def _modules(trial: Trial) -> int:
    return len({name.partition(".lora_")[0] for name in trial.shapes if ".lora_" in name})


def _change(trial: Trial) -> float:
    tensors = load_file(trial.lora)
    squares = 0.0
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")].double()
            squares += float((b @ a.double()).square().sum())
    return math.sqrt(squares)


def _change_of_b(trial: Trial) -> float:
    tensors = load_file(trial.lora)
    return math.sqrt(sum(float(tensor.double().square().sum()) for name, tensor in tensors.items() if "lora_B" in name))


def _folder(trial: Trial) -> str:
    return trial.folder.parent.name


def _metadata(trial: Trial) -> list[str]:
    return sorted(trial.metadata)


def _preview_count(trial: Trial) -> int:
    return len(trial.previews)


def _preview_steps(trial: Trial) -> list[int]:
    return sorted({int(name.split("-")[0]) for name in trial.files("samples/*-*.png")})


def _validation(trial: Trial) -> list[int]:
    return [event["step"] for event in trial.events if event.get("event") == "validation"]


def _validation_sizes(trial: Trial) -> list[int]:
    return sorted({math.prod(item.size) for item in trial.spec.held_out})


def _order_seconds(trial: Trial) -> float:
    if not trial.config.train.reproducible:
        return 0.0
    return flops.reproducible_seconds(trial.plan.workload, LARGE, H100)


def _cached(trial: Trial) -> bool:
    folder = trial.config.cache.folder
    return folder is not None and any(Path(folder).rglob("*.safetensors"))


NAME = Number("name of the LoRA", lambda trial: trial.lora.name)
FOLDER = Number("folder that holds the run", _folder)
CACHE_FOLDER = Number(
    "folder of the cache", lambda trial: Path(trial.config.cache.folder or "").name if _cached(trial) else ""
)
LOSS = Number("loss of step 1", lambda trial: trial.records[0]["loss"])
LOSSES = Number("losses", lambda trial: [record["loss"] for record in trial.records])
PRESERVATION = Number("preservation loss of step 2", lambda trial: trial.records[1].get("preservation") or 0.0)
GRADIENT = Number("gradient norm of step 1", lambda trial: trial.records[0]["grad_norm"])
GRADIENTS = Number("gradient norms", lambda trial: [record["grad_norm"] for record in trial.records])
SECOND_GRADIENT = Number("gradient norm of step 2", lambda trial: trial.records[1]["grad_norm"])
RATES = Number("learning rates", lambda trial: [record["lr"] for record in trial.records])
STEPS = Number("steps", lambda trial: len(trial.records))
SIGMAS = Number("noise levels", _sigmas)
ODDS = Number("odds of the noise levels, sigma / (1 - sigma)", _odds)
LOGITS = Number("logits of the noise levels", _logits)
BATCH = Number("samples of step 1", lambda trial: len(_samples(trial)))
EPOCH = Number("samples of an epoch", lambda trial: len(trial.spec.order.concept.items))
SIZES = Number("sizes of the images, px", lambda trial: sorted({math.prod(item.size) for item in trial.spec.items}))
REGULARIZED = Number("regularization images", lambda trial: trial.facts["dataset"]["regularisation"])
SHARE = Number("share of passes on them", lambda trial: trial.spec.order.effective_regularization_share)
CAPTIONS = Number("captions", _captions)
FIRST_CAPTION = Number("caption of the image without one, or the first of it", lambda trial: _captions(trial)[0])
EPOCH_PROMPTS = Number("prompts of the first epoch", _epoch_prompts)
PARAMETERS = Number("numbers in the LoRA", _parameters)
MODULES = Number("modules", _modules)
CHANGE_OF_B = Number("size of B, which begins at zero", _change_of_b)
RANKS = Number("ranks", lambda trial: sorted({shape[0] for name, shape in trial.shapes.items() if "lora_A" in name}))
CHANGE = Number("size of the change, |B A|", _change)
KEYS = Number(
    "tensors of a module",
    lambda trial: sorted({name.rpartition("to_q.")[2] for name in trial.shapes if "to_q." in name}),
)
TENSOR_BYTES = Number("bytes of the LoRA without its header", lambda trial: len(trial.numbers))
METADATA = Number("keys of the LoRA's header", _metadata)
EXPORTS = of_files("exported LoRAs", "lora/*.safetensors")
CHECKPOINTS = of_files("checkpoints", "checkpoints/step-*.safetensors")
AVERAGES = of_files("exported averages", "lora/ema/*.safetensors")
BOARD = Number("event files of TensorBoard", lambda trial: len([*trial.folder.rglob("events.out.tfevents*")]))
WANDB = Number("runs of Weights & Biases", lambda trial: len([*trial.folder.rglob("*.wandb")]))
PREVIEWS = Number("previews of a step", _preview_count)
PREVIEW_STEPS = Number("steps with previews", _preview_steps)
PREVIEW_PIXELS = Number("pixels of the last previews", lambda trial: [path.read_bytes() for path in trial.previews])
SECOND_PREVIEWS = of_files("previews on the second model", "samples/also/*.png")
WEIGHT_FOLDERS = of_files("folders of previews at other weights", "samples/weight_*")
VALIDATIONS = Number("steps with a validation", _validation)
VALIDATION_SIZES = Number("sizes of held-out images, px", _validation_sizes)
ADAPTER = Number(
    "tensors that the adapter changes", lambda trial: (trial.facts["adapter"] or {}).get("matched", "none")
)
WEIGHTS_GB = Number("frozen weights on the GPU, GB (plan)", lambda trial: round(trial.plan.peak.weights / 1e9, 3))
PEAK_GB = Number("peak on the GPU, GB (plan)", lambda trial: round(trial.plan.peak.total / 1e9, 3))
STEP_SECONDS = Number(
    "seconds of a step at 1024 px on an H100 (plan)", lambda trial: round(trial.plan.step_seconds(LARGE, H100), 4)
)
ORDER_SECONDS = Number("seconds that the order of sums costs in a step on an H100 (plan)", _order_seconds)
MODE = Number("recomputation", lambda trial: list(trial.facts["plan"]["recomputes"]))
STREAMED = Number("streamed blocks", lambda trial: trial.facts["plan"]["streamed"])
QUANTIZATION = Number("format of the weights (plan)", lambda trial: trial.plan.placement.quantization)
