"""The files of the model: digests, tensors, and the training adapter merged into the weights."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from accelerate import init_empty_weights
from diffusers import ZImageTransformer2DModel
from safetensors import safe_open
from torch import Tensor

from zimage_train.io.digests import DigestCache
from zimage_train.io.json_text import parse_json
from zimage_train.lora import training_adapter
from zimage_train.lora.training_adapter import MergeCount
from zimage_train.measure.proofs.claims import Claim, largest, not_tried
from zimage_train.measure.proofs.subject import Subject
from zimage_train.models import locate, transformer

MERGED = 10
"""Modules whose merge is calculated anew."""
KNOWN_DIGESTS: dict[str, str] = parse_json(Path(__file__).with_name("digests.json").read_bytes())
"""sha256 of a file -> its name and who reported it: a proof in docs/bench/proofs, or the hub's own API.

`scripts/collect_proofs.py` writes it.
"""
ADAPTER = "every module of the training adapter is merged"


def weight_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on the files, the tensors of the transformer, and the adapter that is merged into them."""
    yield from digest_claims(subject)
    with init_empty_weights():
        reference = ZImageTransformer2DModel(**subject.shape.config())
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    shape, weights = locate.transformer_tensors(subject.paths.transformer)
    sizes = shape.parameters
    wrong = expected.items() ^ {name: tuple(size) for name, size in sizes.items()}.items()
    missing = expected.keys() ^ weights.keys()
    yield Claim(
        "the file has the tensors that diffusers' class of this shape has, by name and size",
        len(wrong) + len(missing),
        "tensors that differ",
        0,
        "equality",
        f"{len(weights)} tensors",
    )
    count = sum(math.prod(size) for size in sizes.values())
    yield Claim("parameters of the transformer", count, "parameters")
    yield from adapter_claims(subject)


def digest_claims(subject: Subject) -> Iterator[Claim]:
    """Yield the sha256 of each file of weights; one that nobody reported before is as good as any other."""
    extras = subject.paths.extras
    parts = {"transformer": subject.paths.transformer, "text encoder": extras.text_encoder, "VAE": extras.vae}
    if subject.paths.adapter is not None:
        parts["training adapter"] = subject.paths.adapter
    digests = DigestCache(subject.digest_file)
    for part, path in parts.items():
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        for number, file in enumerate(files, 1):
            digest = digests.of_content(file)
            which = f", file {number} of {len(files)}" if len(files) > 1 else ""
            known = KNOWN_DIGESTS.get(digest, "of the miniature" if subject.is_miniature else "not reported before")
            facts = {"sha256": digest, "file": f"{part}{which}", "is_published": subject.config.model.path is None}
            yield Claim(f"sha256 of the {part}{which}", None, note=f"{digest}: {known}", facts=facts)


def adapter_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on the training adapter: every module is matched, and the sum is that of a calculation in fp64."""
    if subject.paths.adapter is None:
        yield not_tried(ADAPTER, "this model has no training adapter")
        return
    strength = subject.config.model.adapter_strength
    adapter = training_adapter.load_adapter(subject.paths.adapter, strength, subject.shape)
    stored = stored_modules(subject)
    yield Claim(
        ADAPTER,
        len(stored.keys() ^ adapter.lora.keys()),
        "modules that are not",
        0,
        "equality",
        f"matched {len(adapter.lora)}/{len(stored)}",
    )
    chosen = sorted(stored)[:: max(len(stored) // MERGED, 1)][:MERGED]
    names = {f"{module}.weight" for module in chosen}
    read = partial(transformer.read_selected_weights, subject.paths.transformer, names)
    # The sums that a run makes while it reads the tensors; to the end, it would ask for all modules of the adapter.
    sums = training_adapter.merge_adapter(read(), adapter, subject.device, MergeCount())
    merged = dict(islice(sums, len(names)))
    errors: list[float] = []
    roundings: list[float] = []
    for name, before in read():
        a, b, scale = stored[name.removesuffix(".weight")]
        delta = strength * scale * (b.double() @ a.double())
        exact = before.double() + delta
        errors.append(float((merged[name].cpu().double() - exact).norm() / delta.norm()))
        roundings.append(float((exact.float().double() - exact).norm() / delta.norm()))
    yield Claim(
        "the merged weights are those of a calculation in fp64",
        largest(errors),
        "of the change",
        4 * largest(roundings) + 1e-6,
        "fp64",
        f"{len(chosen)} modules",
    )


def stored_modules(subject: Subject) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return A, B and the scale of each module of the adapter's file, read without the reader of this project."""
    assert subject.paths.adapter is not None
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    with safe_open(subject.paths.adapter, "pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            for down, up in (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")):
                if name.endswith(down):
                    stem = name.removesuffix(f".{down}")
                    a, b = file.get_tensor(name), file.get_tensor(f"{stem}.{up}")
                    alpha = f"{stem}.alpha"
                    scale = float(file.get_tensor(alpha)) / len(a) if alpha in names else 1.0
                    found[stem.removeprefix("diffusion_model.").removeprefix("transformer.")] = (a, b, scale)
    return found
