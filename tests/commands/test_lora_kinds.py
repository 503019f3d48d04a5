"""Every `lora` command on a file of every kind: it works, or refuses it in a line with the kind and a remedy."""

from pathlib import Path

import pytest
import torch

from zimage_train import mini
from zimage_train.errors import WeightsError
from zimage_train.lora import lora_file
from zimage_train.lora.deltas import Delta, Dora, Factors, Hadamard, Kronecker, Rotation
from zimage_train.models import locate
from zimage_train.planning.preflight import check_run

from lora_commands import lora_command

MODULE, SIZE = "layers.0.attention.to_q", 96


def drawn(*shape: int) -> torch.Tensor:
    return 0.01 * torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


PLAIN = Factors(drawn(2, SIZE), drawn(SIZE, 2), 1.0)
DELTAS: dict[str, Delta] = {
    "LoRA": PLAIN,
    "LoKr": Kronecker((drawn(4, 4),), (drawn(24, 24),)),
    "LoHa": Hadamard((drawn(SIZE, 2), drawn(2, SIZE)), (drawn(SIZE, 2), drawn(2, SIZE))),
    "DoRA": Dora(PLAIN, 1.0 + drawn(SIZE)),
    "OFT": Rotation(drawn(SIZE // 8, 8, 8)),
}
COMMANDS: dict[str, tuple[list[str], set[str]]] = {
    "verify": (["verify", "{file}", "--model", "{model}"], {"LoRA", "LoKr", "LoHa", "DoRA", "OFT"}),
    "inspect": (["inspect", "{file}"], {"LoRA", "LoKr", "LoHa", "DoRA", "OFT"}),
    "diff": (["diff", "{file}", "{plain}"], {"LoRA", "LoKr", "LoHa"}),
    "weight": (["weight", "{file}", "--scale", "layers.0=0.5", "-o", "{out}"], {"LoRA"}),
    "merge": (["merge", "{file}=1", "{plain}=1", "-o", "{out}"], {"LoRA"}),
    "stack": (["stack", "{file}", "{plain}"], {"LoRA", "LoKr", "LoHa"}),
    "resize": (["resize", "{file}", "--rank", "1", "-o", "{out}"], {"LoRA", "LoKr", "LoHa"}),
    "convert": (["convert", "{file}", "--to", "comfyui", "-o", "{out}"], {"LoRA", "LoKr", "LoHa", "DoRA", "OFT"}),
    "bake": (
        ["bake", "{model}", "--lora", "{file}", "--to", "diffusers", "-o", "{folder}"],
        {"LoRA", "LoKr", "LoHa", "DoRA", "OFT"},
    ),
}
"""Command -> its arguments, and the kinds that it takes."""


@pytest.fixture
def written(tmp_path: Path):
    """`written(kind)`: a file of this kind."""

    def write(kind: str) -> Path:
        path = tmp_path / f"{kind}.safetensors"
        lora_file.export_lora(path, {MODULE: DELTAS[kind]}, "fp32", {"format": "pt"})
        return path

    return write


@pytest.mark.slow
@pytest.mark.parametrize("kind", DELTAS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_on_every_kind(written, tmp_path: Path, command: str, kind: str):
    arguments, takes = COMMANDS[command]
    places = {"file": written(kind), "plain": written("LoRA"), "out": tmp_path / "out.safetensors"}
    places |= {"model": mini.TURBO, "folder": tmp_path / "baked"}
    code, said = lora_command(*(word.format(**places) for word in arguments))
    if kind in takes:
        assert code == 0, said
        return
    assert code == 4 and f"is a {kind} (1 modules, such as {MODULE}), and this takes a LoRA" in said
    assert "zimage-train lora " in said and not places["out"].exists()


@pytest.mark.parametrize("kind", DELTAS)
def test_beside_takes_what_adds(make_config, written, kind: str):
    """A LoRA of `train.beside` whose change depends on the weights is refused before the run."""
    config = make_config(train={"beside": str(written(kind))})
    if kind in ("DoRA", "OFT"):
        with pytest.raises(WeightsError, match=rf"is a {kind} .* and this takes a LoRA or LoKr or LoHa"):
            check_run(config, locate.cached_only)
    else:
        check_run(config, locate.cached_only)
