"""Compiles every Triton kernel for GPUs that are not there, as the full model calls it; a program of its own.

Prints the kernels with the bytes of their machine code, by compute capability.
"""

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zimage_train.models import triton_kernels

CAPABILITIES = (80, 86, 89, 90, 120)
FP8_KERNELS = (triton_kernels.to_fp8,)
"""For GPUs that have fp8."""
FP8_CAPABILITY = 89
SIZES = {"N": 4096, "H": 32, "D": 64}
KERNELS = (
    triton_kernels.modulated_norm,
    triton_kernels.modulated_norm_backward,
    triton_kernels.residual_norm,
    triton_kernels.residual_norm_backward,
    triton_kernels.rotated_norm,
    triton_kernels.rotated_norm_backward,
    triton_kernels.swiglu,
    triton_kernels.swiglu_backward,
    triton_kernels.unpack,
    triton_kernels.transpose,
)


def compile_kernel(kernel, capability: int, flags: dict[str, bool]) -> int:
    """Return the bytes of the machine code."""
    signature, constants = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[(parameter.num,)] = flags.get(name, SIZES.get(name))
            if kernel is triton_kernels.transpose:
                constants[(parameter.num,)] = 64
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if "inverse" in name or "rope" in name else "*bf16"
            if kernel is triton_kernels.transpose:
                signature[name] = "*u8"
            if kernel is triton_kernels.to_fp8:
                signature[name] = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "out_ptr": "*fp8e4nv"}[name]
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    return len(compiled.asm["cubin"])


for capability, kernel in itertools.product(CAPABILITIES, KERNELS + FP8_KERNELS):
    if kernel in FP8_KERNELS and capability < FP8_CAPABILITY:
        continue
    names = [parameter.name for parameter in kernel.params if parameter.name.startswith("HAS_")]
    for values in itertools.product((True, False), repeat=len(names)):
        size = compile_kernel(kernel, capability, dict(zip(names, values, strict=True)))
        print(capability, kernel.__name__, *values, size)
