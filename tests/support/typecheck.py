"""How arguments are held against their annotations in tests: an int may stand for a float, as everywhere in Python."""

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
