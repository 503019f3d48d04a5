"""How arguments are held against their annotations in tests: an int may stand for a float, as everywhere in Python."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

MODULES = [
    "zimage_train.flow",
    "zimage_train.lora.attach",
    "zimage_train.lora.files",
    "zimage_train.model.text",
    "zimage_train.model.transformer",
    "zimage_train.model.vae",
    "zimage_train.sampling.turbo",
    "zimage_train.training.objectives",
]
