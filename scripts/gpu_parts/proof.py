"""`zimage-train prove --quick` on the model of full size with random weights that the part `product` makes."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from gpu_parts import product

SECONDS = 440.0
"""Less than the time limit of the part; what is measured by then is kept, and the same command continues."""


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Return what prove.json holds, and the exit code: 0 if all claims hold, 1 if some do not."""
    name = "zimage-dry" if dry else "zimage-full-size"
    work = Path(os.environ.get("ZIMAGE_WORK") or tempfile.gettempdir()) / name
    product.prepare(work, dry)
    log, config, output = work / "logs" / "prove.txt", work / "prove.yaml", work / "proof"
    log.parent.mkdir(exist_ok=True)
    values = product.config(product.Trial("proof"), work, dry)
    config.write_text(yaml.safe_dump(values))
    code, seconds = product.run(
        ["prove", str(config), *(["--quick"] if case == "quick" else []), "-o", str(output)], log, SECONDS
    )
    if not (output / "prove.json").exists():
        raise RuntimeError(f"exit code {code}: {log.read_text()[-600:]}")
    return {"exit_code": code, "seconds": seconds, "proof": json.loads((output / "prove.json").read_text())}
