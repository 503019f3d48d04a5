"""Settings by which a run that does not fit its device is predicted to fit (torch-free)."""

import math
from collections import Counter
from dataclasses import dataclass, replace

from zimage_train.dataset.buckets import Bucket
from zimage_train.io.units import format_bytes
from zimage_train.planning.planner import AUTO_QUANTIZATIONS, PlanConstraints, choose_plan
from zimage_train.planning.workload import Workload


@dataclass(frozen=True)
class SettingChange:
    """A setting and its proposed value; the key `data.*.resolution` stands for that of every data entry."""

    key: str
    value: int | float | str

    def __str__(self) -> str:
        return f"{self.key}: {self.value:.3g}" if isinstance(self.value, float) else f"{self.key}: {self.value}"


@dataclass(frozen=True)
class Suggestion:
    """Settings by which a run is predicted to fit."""

    changes: list[SettingChange]
    """Empty if no settings are enough."""
    predicted_bytes: float
    """Peak with the changes, or the lowest peak that was found if they are not enough."""

    def __str__(self) -> str:
        predicted = format_bytes(self.predicted_bytes)
        if not self.changes:
            return f"a run takes {predicted} at the least (predicted), so more memory is needed"
        return f"set {', '.join(map(str, self.changes))} (predicted: {predicted})"


def suggest_settings(
    workload: Workload, constraints: PlanConstraints, limit_bytes: float, host_bytes: float
) -> Suggestion:
    """Return the settings by which `workload` is predicted to fit, changing as little of the training as possible.

    Recomputation and streaming come first, because they change no result: every plan below leaves both to the planner.
    Then come lighter workloads. Quantization is tried only if none of them is enough.
    """
    auto_changes: list[SettingChange] = []
    if constraints.mode is not None or constraints.streamed is not None:
        auto_changes = [SettingChange("memory.checkpointing", "auto"), SettingChange("memory.offload", "auto")]
    quantize_auto = SettingChange("model.quantize", "auto")
    workloads = [([], workload), *lighter_workloads(workload)]
    least_bytes = math.inf
    for quantize_changes, quantizations in (([], constraints.quantizations), ([quantize_auto], AUTO_QUANTIZATIONS)):
        for workload_changes, lighter in workloads:
            plan = choose_plan(lighter, PlanConstraints(quantizations, None, None), limit_bytes, host_bytes, None)
            predicted_bytes = plan.peak.total
            if plan.fits:
                changes = [*auto_changes, *quantize_changes, *workload_changes]
                # With no change to make, the run was planned for more than the limit: a budget makes it keep the limit.
                budget = SettingChange("memory.budget_gb", limit_bytes / 1e9)
                return Suggestion(changes or [budget], predicted_bytes)
            least_bytes = min(least_bytes, predicted_bytes)
    return Suggestion([], least_bytes)


LighterWorkload = tuple[list[SettingChange], Workload]
"""Changes of settings, and the workload that they lead to."""


def lighter_workloads(workload: Workload) -> list[LighterWorkload]:
    """Return workloads that take less memory, those that change least of the training first.

    Batches change in the innermost loop, so they are tried before smaller previews, and those before a smaller rank.
    """
    lighter: list[LighterWorkload] = []
    for rank_changes, ranked in [([], workload), *_with_smaller_rank(workload)]:
        for preview_changes, previewed in [([], ranked), *_with_smaller_previews(ranked)]:
            for batch_changes, changed in [([], previewed), *_with_smaller_batches(previewed)]:
                changes = [*rank_changes, *preview_changes, *batch_changes]
                if changes:
                    lighter.append((changes, changed))
    return lighter


def _with_smaller_rank(workload: Workload) -> list[LighterWorkload]:
    smaller_rank = 16
    if workload.rank <= smaller_rank:
        return []
    trained = workload.trained * smaller_rank // workload.rank
    changed = replace(workload, trained=trained, rank=smaller_rank)
    return [([SettingChange("lora.rank", smaller_rank)], changed)]


def _with_smaller_previews(workload: Workload) -> list[LighterWorkload]:
    lighter: list[LighterWorkload] = []
    for side in (1024, 512):
        if all(max(request.width, request.height) <= side for request in workload.previews):
            continue
        previews = []
        for request in workload.previews:
            previews.append(replace(request, width=min(request.width, side), height=min(request.height, side)))
        changes = [SettingChange("sample.width", side), SettingChange("sample.height", side)]
        lighter.append((changes, replace(workload, previews=tuple(previews))))
    return lighter


def _with_smaller_batches(workload: Workload) -> list[LighterWorkload]:
    """Return the workload with batches of a single sample, and then with a lower resolution as well."""
    lighter: list[LighterWorkload] = []
    changes: list[SettingChange] = []
    current = workload
    if workload.batch_size > 1:
        changes = [SettingChange("train.batch_size", 1)]
        current = replace(workload, batch_size=1, largest_batches=None, batch_weights=None)
        lighter.append((changes, current))
    for side in (768, 512):
        largest_area = max((size.width * size.height for size in current.sizes), default=0)
        if largest_area > side**2:
            square = Counter({Bucket(side, side): current.sizes.total()})
            current = replace(current, sizes=square, largest_batches=None, batch_weights=None)
            lighter.append(([*changes, SettingChange("data.*.resolution", side)], current))
    return lighter
