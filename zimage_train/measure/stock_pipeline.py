"""Draw an image with diffusers alone; run as a program, so that nothing of zimage_train is in the process.

Arguments: model folder, LoRA file or nothing, prompt, negative, seed, width, height, steps, guidance, output PNG, dtype
(float32), device (cpu; streamed: a GPU with less memory than the pipeline takes), shift of the noise levels (3.0) where
the folder has no scheduler.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

TURBO = [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]


def main(model: str, lora: str, prompt: str, negative: str, seed: str, *rest: str) -> None:
    width, height, steps, guidance, output = int(rest[0]), int(rest[1]), int(rest[2]), float(rest[3]), rest[4]
    dtype, device, shift = rest[5:] or ("float32", "cpu", "3.0")
    torch.set_num_threads(1)
    parts: dict[str, Any] = {}
    if not Path(model, "scheduler").is_dir():  # a run does not download it
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=float(shift))
    pipe: Any = ZImagePipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype), local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(str(Path(lora).parent), weight_name=Path(lora).name)
    if device == "streamed":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.to(device)
    drawn: Any = pipe(
        prompt=prompt,
        negative_prompt=negative,
        width=width,
        height=height,
        sigmas=[1 - i / steps for i in range(steps)],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(int(seed)),
    )
    image = drawn.images[0]
    if steps == 8:
        got = [round(sigma, 4) for sigma in pipe.scheduler.sigmas.tolist()[:8]]
        if any(abs(a - b) > 1e-4 for a, b in zip(got, TURBO, strict=True)):
            raise SystemExit(f"not Turbo's grid: {got}")
    if any(name.split(".")[0] == "zimage_train" for name in sys.modules):
        raise SystemExit("zimage_train was imported")
    image.save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
