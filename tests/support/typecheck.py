"""How arguments are held against their annotations in tests: an int may stand for a float, as everywhere in Python."""

from importlib.abc import MetaPathFinder
from typing import Any

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

MODULES = [
    "zimage_train.diffusion.flow",
    "zimage_train.lora.deltas",
    "zimage_train.lora.layers",
    "zimage_train.lora.lora_file",
    "zimage_train.models.text_encoder",
    "zimage_train.models.transformer",
    "zimage_train.models.vae",
    "zimage_train.diffusion.sampler",
    "zimage_train.training.batches",
    "zimage_train.training.loss",
]


class LibrariesFirst(MetaPathFinder):
    """Imports the libraries before the first of `MODULES`.

    Jaxtyping keeps its bytecode under another name, and whatever a checked module imports too, so that thousands of
    modules would be compiled once more.
    """

    def __init__(self) -> None:
        self.are_imported = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname in MODULES and not self.are_imported:
            self.are_imported = True
            import diffusers.models.autoencoders.autoencoder_kl
            import peft
            import transformers.models.qwen3.modeling_qwen3

            assert all((diffusers, peft, transformers))
