"""`zimage-train lora ...` from within a test."""

from pathlib import Path

from safetensors import safe_open
from typer.testing import CliRunner

from zimage_train.cli.app import app


def lora_command(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["lora", *map(str, arguments)])
    return (getattr(done.exception, "exit_code", 1) if done.exception else 0), done.output + str(done.exception or "")


def converted(path: Path, to: str, output: Path) -> Path:
    """Convert a file; peft's layout is a folder, and its file in there is returned."""
    if to == "peft":
        output = output.with_suffix("")
    code, said = lora_command("convert", path, "--to", to, "-o", output)
    assert code == 0, said
    return output / "adapter_model.safetensors" if to == "peft" else output


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
