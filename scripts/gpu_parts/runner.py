"""Runs parts in processes of their own, each for so long at most, and records what came of them.

The process that watches never imports torch: it would take memory of the GPU from those that measure.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_parts.parts import Part, Variables
from gpu_parts.records import TOLD, Records, Stamp, failure

LOST_DEVICE = 75
"""Exit code: the case is recorded, and after it the GPU takes no more orders from this process."""


@dataclass(frozen=True)
class Watch:
    """Whoever starts the processes of parts and waits for them."""

    script: Path
    """Run again as `script --measure PART`."""
    folder: Path
    stamp: Stamp

    def run(self, name: str, part: Part) -> bool:
        """Every case of a part that has no result yet; whether all have a result in the end."""
        cases = part.dry_cases if self.stamp.dry else part.cases
        records = Records(self.folder / f"{name}.json")
        records.forget_failures()
        left = records.missing(cases)
        if not left:
            print(f"{name}: skipped, {len(cases)} of {len(cases)} cases are in {records.path}", flush=True)
            return True
        print(f"{name}: {len(left)} of {len(cases)} cases, {part.limit_s:g} s at most", flush=True)
        end = time.monotonic() + part.limit_s
        while left and time.monotonic() < end:
            asked = left if part.case_limit_s is None else left[:1]
            self._ask(name, part, asked, end, records)
            left = records.missing(left)
        if left:
            print(f"{name}: no time was left for {len(left)} cases; the same command goes on with them", flush=True)
        known = records.read()
        failed = [case for case in cases if "error" in known.get(case, {})]
        return not left and not failed

    def _ask(self, name: str, part: Part, cases: list[str], end: float, records: Records) -> None:
        """Start a process for `cases`; if it does not answer all, that is an error of the case that it was at."""
        began = time.monotonic()
        limit = end - began if part.case_limit_s is None else min(end - began, part.case_limit_s)
        try:
            done = self._start(name, cases, part.environment.get(cases[0], {}), limit)
            if done.returncode == LOST_DEVICE:
                return
            error = f"exit code {done.returncode}: {done.stderr[-TOLD:].strip()}"
        except subprocess.TimeoutExpired as late:
            error = f"time limit of {limit:.0f} s: {_text(late.stderr)[-TOLD:].strip()}"
        unanswered = records.missing(cases)
        if unanswered:
            found = {"error": error, "seconds": round(time.monotonic() - began, 1)}
            records.note(unanswered[0], found, self.stamp)
            tell(name, unanswered[0], found)

    def _start(
        self, name: str, cases: list[str], variables: Variables, limit: float
    ) -> subprocess.CompletedProcess[str]:
        words = ["--measure", name, "--cases", json.dumps(cases), "--stamp", json.dumps(asdict(self.stamp))]
        command = [sys.executable, str(self.script), *words, "--out", str(self.folder)]
        environment = child_environment(variables, self.stamp.dry)
        return subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, timeout=limit, check=False)


def ask_stamp(script: Path, dry: bool) -> Stamp | None:
    """What records will name, asked of a process that sees what the others will; None: no GPU, and not dry."""
    command = [sys.executable, str(script), "--identify"]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=child_environment({}, dry), check=True)
    found = json.loads(told.stdout)
    if found["card"] is None and not dry:
        return None
    return Stamp(found["torch"], found["triton"], found["card"] or "cpu", dry)


def child_environment(variables: Variables, dry: bool) -> dict[str, str]:
    """This process's environment with `variables`; a dry process sees no GPU."""
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ}  # as zimage_train.__main__ does
    changes = {**variables, "CUDA_VISIBLE_DEVICES": ""} if dry else variables
    for key, value in changes.items():
        if value is None:
            environment.pop(key, None)
        else:
            environment[key] = value
    return environment


def measure(name: str, part: Part, cases: Sequence[str], records: Records, stamp: Stamp) -> int:
    """Answer `cases` in this process, each recorded as soon as it is known; the exit code."""
    try:
        work = part.measure()
    except Exception as error:  # a package is missing: no case can be answered
        for case in cases:
            records.note(case, failure(error), stamp)
            tell(name, case, failure(error))
        return 0
    for case in cases:
        began = time.monotonic()
        try:
            found = work(case, stamp.dry)
        except Exception as error:  # whatever it is, it is what was found of this case
            found = failure(error)
        found["seconds"] = round(time.monotonic() - began, 1)
        records.note(case, found, stamp)
        tell(name, case, found)
        if "error" in found and not _device_answers():
            return LOST_DEVICE
    return 0


def tell(name: str, case: str, found: dict[str, Any]) -> None:
    """Show what was found, on a single line."""
    print(f"{name}, {case}: {json.dumps(found, ensure_ascii=False)}", flush=True)


def _device_answers() -> bool:
    """Whether the GPU still takes orders from this process: after an illegal access it takes none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _text(given: bytes | str | None) -> str:
    """What a process said before its time was over: bytes, whatever was asked for."""
    return given.decode(errors="replace") if isinstance(given, bytes) else given or ""
