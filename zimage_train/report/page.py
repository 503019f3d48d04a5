"""report.html: one self-contained page with the curves, previews and settings of a run."""

import base64
import io
from collections.abc import Mapping
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
    all_previews: PreviewTable,
    config_text: str,
    warnings: list[str],
) -> None:
    """Write the page at `path` from the files of the run folder; `all_previews` include those on a second model."""
    records = metrics.read_records(metrics_path)
    events = metrics.read_records(events_path)
    validations = [event for event in events if event.get("event") == "validation"]
    # Losses on other images cannot be compared: if the validation set has changed, only the last one counts.
    validations = [event for event in validations if event["of"] == validations[-1]["of"]]
    page = template.render_html(
        "page.html",
        name=name,
        facts=facts,
        last=records[-1] if records else None,
        skipped=sum(record.get("loss") is None for record in records),
        loss_chart=chart(_curve(records, "loss"), is_noisy=True),
        validation_chart=chart(_curve(validations, "loss"), is_noisy=False, from_zero=False),
        lowest=min(validations, key=lambda event: event["loss"], default=None),
        drift_chart=chart(_curve(events, "drift"), is_noisy=False),
        preservation_chart=chart(_curve(records, "preservation"), is_noisy=True),
        lr_chart=chart(_curve(records, "lr"), is_noisy=False),
        rows=_preview_rows(all_previews),
        prompts=all_previews.labels,
        config=config_text,
        warnings=warnings,
    )
    atomic.write_text(path, page)


def _curve(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def _preview_rows(table: PreviewTable) -> list[tuple[int, list[tuple[str, float | None] | None]]]:
    """Return each step with its images, as (data URI, distance from step 0), or None where there is no image."""
    distances = preview_shift.distances(table)
    rows = []
    for step, paths in table.rows.items():
        cells: list[tuple[str, float | None] | None] = []
        for path, distance in zip(paths, distances.get(step, [None] * len(paths)), strict=True):
            cells.append((_data_uri(path), distance) if path else None)
        rows.append((step, cells))
    return rows


def chart(points: list[tuple[int, float]], is_noisy: bool, from_zero: bool = True) -> dict[str, Any] | None:
    """Return polylines in chart coordinates and axis labels for the template's SVG, or None for less than two points.

    A noisy curve is drawn between its extremes with its running mean; any other starts at zero if `from_zero`.
    """
    if len(points) < 2:
        return None
    reduced = _average_groups(points, SMOOTHING_POINTS)
    first, last = reduced[0][0], reduced[-1][0]
    low = min(value for _, value in reduced) if is_noisy or not from_zero else 0.0
    high = max(value for _, value in reduced)
    span = high - low or 1.0

    def line(values: list[tuple[int, float]]) -> str:
        width = max(last - first, 1)
        coordinates = []
        for step, value in values:
            x = (step - first) / width * CHART_WIDTH
            y = (high - value) / span * CHART_HEIGHT  # SVG counts y from the top
            coordinates.append(f"{x:.1f},{y:.1f}")
        return " ".join(coordinates)

    return {
        "raw": line(reduced),
        "smooth": line(_running_mean(reduced)) if is_noisy else None,
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "first": first,
        "last": last,
    }


def _average_groups(points: list[tuple[int, float]], max_points: int) -> list[tuple[int, float]]:
    """Reduce `points` to at most `max_points` means of neighbours, each at the last step of its group."""
    size = -(-len(points) // max_points)
    means = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        means.append((group[-1][0], sum(value for _, value in group) / len(group)))
    return means


def _running_mean(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    window = max(len(points) // 15, 1)
    result = []
    for index, (step, _) in enumerate(points):
        neighbours = points[max(0, index - window) : index + window + 1]
        result.append((step, sum(value for _, value in neighbours) / len(neighbours)))
    return result


def _data_uri(path: Path) -> str:
    with Image.open(path) as image:
        thumbnail = image.convert("RGB")
        if max(thumbnail.size) < THUMBNAIL_PX // 2:
            factor = THUMBNAIL_PX // max(thumbnail.size)
            size = (thumbnail.width * factor, thumbnail.height * factor)
            thumbnail = thumbnail.resize(size, Image.Resampling.NEAREST)
        thumbnail.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        buffer = io.BytesIO()
        thumbnail.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
