"""Which implementation of attention a run uses: torch's own choice, cuDNN, or FlashAttention 3 or 4 where installed."""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zimage_train.config.types import AttentionName
from zimage_train.errors import ConfigError, Location, Problem

FLASH_PACKAGES: dict[AttentionName, tuple[str, str]] = {
    "flash4": ("FA4", "flash_attn.cute"),
    "flash3": ("FA3", "flash_attn_interface"),
}
"""Name -> the name that torch knows it by, and the module that it comes in; in the order in which `auto` tries them."""
LARGEST_ERROR = 0.02
"""Largest relative distance of result and gradients from those in fp32; rounding to bf16 makes about 0.005."""


def resolve_attention(name: AttentionName, device: torch.device) -> AttentionName:
    """Return what `model.attention` stands for on `device`; never "auto".

    FlashAttention 3 and 4 are tried on a small example, and `auto` takes the first that works.

    Raises:
        ConfigError: `name` cannot be used there.
    """
    if name == "auto":
        for candidate in FLASH_PACKAGES:
            if _failure(candidate, device) is None:
                return candidate
        return "sdpa"
    failure = _failure(name, device)
    if failure is not None:
        raise ConfigError(Problem(Location(key="model.attention"), f"{name} {failure}", "take auto", "no-attention"))
    return name


@contextlib.contextmanager
def attention_by(name: AttentionName) -> Iterator[None]:
    """Compute attention by `name`, as `resolve_attention` returned it, within the block."""
    if name == "cudnn":
        # What cuDNN does not serve, such as masks, is left to the others.
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(backends, set_priority=True):
            yield
    elif name in FLASH_PACKAGES:
        torch.nn.attention.activate_flash_attention_impl(FLASH_PACKAGES[name][0])
        try:
            yield
        finally:
            torch.nn.attention.restore_flash_attention_impl()
    else:
        yield


def _failure(name: AttentionName, device: torch.device) -> str | None:
    """Return why `name` cannot be used on `device`, or None."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return "needs an NVIDIA GPU"
    if name in FLASH_PACKAGES and not _is_installed(FLASH_PACKAGES[name][1]):
        return f"needs the package {FLASH_PACKAGES[name][1].partition('.')[0].replace('_', '-')}"
    if name in FLASH_PACKAGES and not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"needs a newer PyTorch than {torch.__version__}"
    try:
        with attention_by(name):
            error = error_on(device)
    except Exception as failure:  # noqa: BLE001  a package of another version may fail in any way
        return f"failed on a small example ({type(failure).__name__}: {str(failure).partition(chr(10))[0][:120]})"
    return None if error <= LARGEST_ERROR else f"is off by {error:.2g} on a small example"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


def error_on(device: torch.device) -> float:
    """Return the largest relative distance of attention's result and gradients in bf16 from those in fp32."""
    draw = torch.Generator().manual_seed(1)
    q, k, v, g = (torch.randn(1, 2, 256, 128, generator=draw).to(device, torch.bfloat16) for _ in range(4))
    found = _with_gradients(q, k, v, g)
    with sdpa_kernel([SDPBackend.MATH]):
        expected = _with_gradients(q.float(), k.float(), v.float(), g.float())
    distances = [(one.float() - other).norm() / other.norm() for one, other in zip(found, expected, strict=True)]
    return float(torch.stack(distances).max())


def _with_gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    with torch.enable_grad():
        result = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2])
    return [result.detach(), *torch.autograd.grad(result, leaves, g)]
