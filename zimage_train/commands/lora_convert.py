"""The command `lora convert`."""

from pathlib import Path

from zimage_train.commands.lora_edit import OutputFile
from zimage_train.errors import ConfigError, Problem
from zimage_train.io import atomic, tensorfile
from zimage_train.io.safetensors_format import read_header
from zimage_train.io.units import format_bytes
from zimage_train.lora import adapter_config, formats, inspect, keys, lora_file, readers


def convert_command(path: Path, target: str, output: OutputFile) -> list[str]:
    """Write an adapter's file in another layout; converting back restores the same file.

    Raises:
        ConfigError: the layout does not exist.
        WeightsError: the file is none of these kinds, or the layout cannot hold it.
    """
    if target not in formats.LAYOUTS:
        raise ConfigError(
            Problem("--to", f"is {target!r}", f"give one of {', '.join(formats.LAYOUTS)}", "bad-argument")
        )
    is_folder = target == "peft"
    if is_folder:
        output.require_free_folder(path)
    else:
        output.require_free(path)
    content = lora_file.read_changes(path)
    changes = content.changes
    tensors, header = formats.to_layout(path, changes, content.metadata, target)
    if output.dtype != "auto":
        torch_dtype = tensorfile.TORCH_DTYPES[output.dtype]
        for key, tensor in tensors.items():
            if not key.endswith((".alpha", ".dora_scale")):  # bf16 would round a magnitude by more than it changes
                tensors[key] = tensor.to(torch_dtype)
    header |= lora_file.renewed_hashes(tensors, header, content.metadata)
    file = output.path
    if is_folder:
        config = formats.peft_config(path, changes)
        file = output.path / adapter_config.FOLDER_FILE
        tensorfile.save(file, tensors, header)
        # Last: a folder without it would be read as another LoRA.
        atomic.write_json(output.path / adapter_config.CONFIG_FILE, config)
    else:
        tensorfile.save(file, tensors, header)
    kinds = ", ".join(sorted({str(lora_file.kind_of(change)) for change in changes.values()}))
    size = format_bytes(file.stat().st_size)
    place = {"header": "header", "config": "config"}.get(formats.LAYOUTS[target].alpha, "tensors")
    traits = inspect.traits_of(changes, tensors, frozenset([place]))
    names_before = {key.rpartition(".")[2] for key in read_header(path).tensors}
    names = {key.rpartition(".")[2] for key in tensors}
    notes: list[str] = []
    if "DoRA" in kinds and ("dora_scale" in names_before) != ("dora_scale" in names):
        notes = ["note: magnitudes are carried over as they are; ComfyUI divides by ||W||, and peft by ||W + B A||"]
    return [
        f"{path}: {keys.layout_of(read_header(path).tensors)}, alpha / rank {content.scales_from}",
        f"{output.path}: {keys.layout_of(tensors)}, {kinds}, {len(changes)} modules, {size}",
        f"read by {', '.join(readers.readers_of(target, traits)) or 'no program that was tried'}",
        *notes,
    ]
