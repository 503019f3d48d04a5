"""Stages that are made once, and fits that go on where they were stopped."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SEED = 20260
SAVE_EVERY = 60.0
"""Seconds between two saved states of a fit."""

Loss = Callable[[random.Random], Tensor]


def stage(result: Path, make: Callable[[Path], None]) -> None:
    """Makes `result` unless it is there. It appears under its name only when it is whole."""
    if result.exists():
        print(f"{result.name}: there already", flush=True)
        return
    print(f"{result.name}: making it", flush=True)
    partial = result.with_name("partial." + result.name)
    if partial.is_dir():
        shutil.rmtree(partial)
    began = time.monotonic()
    torch.manual_seed(SEED)
    make(partial)
    partial.rename(result)
    print(f"{result.name}: made in {time.monotonic() - began:.0f} s", flush=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Fifty steps of warmup, then a cosine down to 1 % of the peak."""
    return peak * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Muon:
    """Momentum whose matrices are orthogonalised (Newton-Schulz) before they are applied (Jordan, 2024).

    After a few hundred steps the error of the VAE is a quarter of what AdamW alone reaches.
    """

    def __init__(self, matrices: list[Tensor], momentum: float = 0.95) -> None:
        self.matrices, self.momentum = matrices, momentum
        self.buffers = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """An update of every matrix; a convolution counts as a matrix of (outputs, all the rest)."""
        for matrix, buffer in zip(self.matrices, self.buffers, strict=True):
            buffer.mul_(self.momentum).add_(matrix.grad)
            update = matrix.grad.add(buffer, alpha=self.momentum).flatten(1)
            tall = update.shape[0] > update.shape[1]
            update = (update.T if tall else update) / (update.norm() + 1e-7)
            for _ in range(5):
                gram = update @ update.T
                update = 3.4445 * update + (2.0315 * gram @ gram - 4.775 * gram) @ update
            update = update.T if tall else update
            stretch = max(1, matrix.shape[0] / matrix[0].numel()) ** 0.5
            matrix.add_(update.reshape(matrix.shape), alpha=-rate * stretch)


class Fit:
    """AdamW for some parameters, Muon for their matrices unless its peak rate is 0, and a running average.

    Each step's randomness comes from its number alone, so a fit that goes on from its saved state ends where
    an undisturbed fit does.
    """

    def __init__(self, name: str, parameters: list[Tensor], steps: int, peak: float, muon: float = 0.0) -> None:
        self.name, self.parameters, self.steps, self.peak, self.muon = name, parameters, steps, peak, muon
        matrices = [p for p in parameters if muon and p.ndim > 1 and p.shape[0] > 1]
        self.orthogonal = Muon(matrices)
        taken = {id(matrix) for matrix in matrices}
        self.adamw = torch.optim.AdamW([p for p in parameters if id(p) not in taken], betas=(0.9, 0.98))
        self.averages = [p.detach().clone() for p in parameters]
        self.done = 0

    def run(self, loss: Loss, state: Path) -> None:
        """Takes all steps, from `state` if it is there, and leaves the running average in the parameters."""
        if state.exists():
            self._load(torch.load(state))
        began, first, saved, shown = time.monotonic(), self.done, time.monotonic(), math.nan
        while self.done < self.steps:
            torch.manual_seed(SEED + self.done)
            value = self._step(loss(random.Random(f"{SEED} {self.name} {self.done}")))
            shown = value if math.isnan(shown) else 0.98 * shown + 0.02 * value
            if self.done % 50 == 0 or self.done == self.steps:
                pace = (time.monotonic() - began) / (self.done - first)
                print(f"{self.name}: step {self.done}/{self.steps} loss {shown:.4f} {pace:.2f} s/step", flush=True)
            if time.monotonic() - saved > SAVE_EVERY:
                partial = state.with_name(state.name + ".partial")
                torch.save(self._state(), partial)
                partial.rename(state)
                saved = time.monotonic()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averages)
        state.unlink(missing_ok=True)

    def _step(self, value: Tensor) -> float:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.done, self.steps, self.peak)
        for parameter in self.parameters:
            parameter.grad = None
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.orthogonal.step(learning_rate(self.done, self.steps, self.muon))
        decay = min(0.99, (self.done + 1) / (self.done + 10))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        self.done += 1
        return value.item()

    def _state(self) -> dict:
        return {
            "done": self.done,
            "parameters": [p.detach() for p in self.parameters],
            "averages": self.averages,
            "buffers": self.orthogonal.buffers,
            "adamw": self.adamw.state_dict(),
        }

    def _load(self, state: dict) -> None:
        self.done = state["done"]
        self.adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, state["parameters"])
            torch._foreach_copy_(self.averages, state["averages"])
            torch._foreach_copy_(self.orthogonal.buffers, state["buffers"])


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float32 on the default device, with the values that its bf16 files will hold."""
    return model.to(torch.get_default_device(), torch.bfloat16).float().eval().requires_grad_(False)


def save_in_two_shards(model: torch.nn.Module, folder: Path) -> None:
    """Saves in bf16 as two files and an index, as the hub folders have them."""
    model.to(torch.bfloat16)
    total = sum(parameter.numel() * 2 for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=round(total * 0.6))
