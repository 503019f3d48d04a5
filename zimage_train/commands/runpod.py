"""Rented machines: what they say of themselves, and how a file gets home from one (torch-free)."""

import shlex
from collections.abc import Mapping
from pathlib import Path


def copy_command(path: Path, environment: Mapping[str, str]) -> str | None:
    """The command that copies `path` from this pod, to be typed at home; None where this is no pod.

    RunPod sets these variables. From a pod without a public address `runpodctl send` sends, and says what to type.
    """
    if not environment.get("RUNPOD_POD_ID"):
        return None
    address, port = environment.get("RUNPOD_PUBLIC_IP"), environment.get("RUNPOD_TCP_PORT_22")
    if address and port:
        return f"scp -P {port} {shlex.quote(f'root@{address}:{path}')} ."
    return f"runpodctl send {shlex.quote(str(path))}   # here; it prints what to type at home"
