"""Requests to `accelerate launch`, read from its environment variables, that do not apply to a run."""

from collections.abc import Mapping

from zimage_train.errors import Problem

SPLITTING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
"""Variables by which accelerate announces that it will split a model over the processes."""


def launch_problems(environment: Mapping[str, str]) -> list[Problem]:
    """Return a problem for each way of splitting the model that accelerate was configured for."""
    asked = [name for variable, name in SPLITTING.items() if environment.get(variable, "").lower() == "true"]
    if not asked:
        return []
    what = (
        f"accelerate is configured for {' and '.join(asked)}, which splits a model that is trained; here it is frozen, "
        "and each process streams or quantises its own copy to fit its card (model.quantize, memory.offload)"
    )
    return [Problem("launch", what, "launch with --multi_gpu, or with torchrun", "splits-model")]


def launch_warnings(environment: Mapping[str, str], dtype: str) -> list[str]:
    """Return a line for each request to `accelerate launch` that has no effect on a run in `dtype`."""
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return []  # another launcher, or none
    warnings = []
    # For several processes accelerate names a meeting place on this machine; torchrun, which then starts them, adds
    # their number. A cluster names other places, for a single process too.
    if environment.get("MASTER_ADDR") == "127.0.0.1" and "WORLD_SIZE" not in environment:
        warnings.append(
            "accelerate launch was asked for several processes and has started one; for several on a machine without a "
            "GPU, add --multi_gpu and leave out --cpu"
        )
    precision = environment["ACCELERATE_MIXED_PRECISION"]
    if precision not in ("no", dtype):
        warnings.append(f"accelerate's mixed_precision {precision} has no effect; the run is in model.dtype {dtype}")
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if backend.upper() != "NO":
        warnings.append(f"accelerate's dynamo_backend {backend.lower()} has no effect")
    return warnings
