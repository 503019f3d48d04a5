"""report.html: one self-contained page that shows what a run did and proves its settings."""

import base64
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from zimage_train.io import atomic
from zimage_train.report import metrics, preview_shift, template
from zimage_train.report.preview_images import PreviewTable

THUMBNAIL_PX = 320
CHART_WIDTH, CHART_HEIGHT = 860, 240
SMOOTHING_POINTS = 400


def write_report_page(
    path: Path,
    name: str,
    facts: Mapping[str, Any],
    metrics_path: Path,
    events_path: Path,
    own: PreviewTable | None,
    shown: PreviewTable,
    config_text: str,
    warnings: list[str],
    triggers: Collection[str],
    steps: int,
) -> None:
    """Write the page at `path` from what the run folder holds now."""
    records = metrics.read_records(metrics_path)
    validated = [one for one in metrics.read_records(events_path) if one.get("event") == "validation"]
    validated = [one for one in validated if one["of"] == validated[-1]["of"]]  # the folder may have changed
    rows, labels = _preview_rows(shown)
    found = preview_shift.preview_shifts(own, triggers) if own else []
    remark = preview_shift.shift_remark(found[-1], steps) if found else None
    page = template.render_html(
        "page.html",
        name=name,
        facts=facts,
        last=records[-1] if records else None,
        skipped=sum(record.get("loss") is None for record in records),
        loss_chart=chart(_curve(records, "loss"), is_noisy=True),
        validation_chart=chart(_curve(validated, "loss"), is_noisy=False, from_zero=False),
        lowest=min(validated, key=lambda one: one["loss"], default=None),
        drift_chart=chart(_curve(metrics.read_records(events_path), "drift"), is_noisy=False),
        preservation_chart=chart(_curve(records, "preservation"), is_noisy=True),
        lr_chart=chart(_curve(records, "lr"), is_noisy=False),
        rows=rows,
        prompts=labels,
        config=config_text,
        warnings=[*warnings, remark] if remark else warnings,
    )
    atomic.write_text(path, page)


def _curve(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def _preview_rows(shown: PreviewTable) -> tuple[list[tuple[int, list[Any]]], list[str]]:
    """Each step with its images and how far they are from step 0, and what stands above the columns."""
    far = preview_shift.distances(shown) | {0: [None] * len(shown.recipes)}
    rows = [
        (step, [path and (_data_uri(path), how_far) for path, how_far in zip(paths, far[step], strict=True)])
        for step, paths in shown.rows.items()
    ]
    return rows, shown.labels


def chart(points: list[tuple[int, float]], is_noisy: bool, from_zero: bool = True) -> dict[str, Any] | None:
    """What the template draws as SVG: polylines in chart coordinates, and the labels of the axes.

    A noisy curve is drawn with its running mean and between its extremes, another one from zero up unless told.
    """
    if len(points) < 2:
        return None
    shown = _averaged(points, SMOOTHING_POINTS)
    first, last = shown[0][0], shown[-1][0]
    low = min(value for _, value in shown) if is_noisy or not from_zero else 0.0
    high = max(value for _, value in shown)
    high = high if high > low else low + 1.0

    def line(values: list[tuple[int, float]]) -> str:
        width = max(last - first, 1)
        return " ".join(
            f"{(step - first) / width * CHART_WIDTH:.1f},{(high - value) / (high - low) * CHART_HEIGHT:.1f}"
            for step, value in values
        )

    return {
        "raw": line(shown),
        "smooth": line(_running_mean(shown)) if is_noisy else None,
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "first": first,
        "last": last,
    }


def _averaged(points: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _running_mean(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    window = max(len(points) // 15, 1)
    result = []
    for index, (step, _) in enumerate(points):
        near = points[max(0, index - window) : index + window + 1]
        result.append((step, sum(value for _, value in near) / len(near)))
    return result


def _data_uri(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
        if max(small.size) < THUMBNAIL_PX // 2:
            factor = THUMBNAIL_PX // max(small.size)
            small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
        small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
