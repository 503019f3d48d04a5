"""The documented API of the page, for programs; `/openapi.json` describes it.

With a token, programs send `Authorization: Bearer TOKEN`. Mistakes are answered with 422 and `problems`, each
with `where`, `found` and `todo`.
"""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from PIL import Image

from zimage_train.errors import ConfigError, DataError, Problem
from zimage_train.ui import run_state, submitted_config
from zimage_train.ui.api_models import (
    Gpu,
    Machine,
    MemoryState,
    Problems,
    ProblemValues,
    Records,
    RunDetails,
    RunInfo,
    SampleState,
)
from zimage_train.ui.lora_files import loras_of_run
from zimage_train.ui.media import FOREVER, whole_url
from zimage_train.ui.run_state import RunState
from zimage_train.ui.sample_request import Drawing, SampleRequest, invalid_request, resolve
from zimage_train.ui.sampling import Sample
from zimage_train.ui.sampling_memory import memory_needs
from zimage_train.ui.site import Site

TICK_SECONDS = 2.0
MAX_RECORDS = 2000
Side = Annotated[
    int | None, Query(ge=64, le=2048, description="Longer side of a smaller JPEG in its place, without metadata.")
]
YAML_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/yaml": {
                "schema": {"type": "string", "description": "The config, as in a file for `zimage-train train`."},
                "example": "name: my_run\ndata:\n  - folder: /path/to/images\n    trigger: zorb\n",
            }
        },
    }
}


class ProblemRoute(APIRoute):
    """A route that answers a body of the wrong form with `problems`, like every other mistake."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_problems(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise invalid_request(error.errors()) from None

        return handle_problems


def api_router(site: Site) -> APIRouter:
    """Return the routes of the API; while they are served, the sampler works."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(_look_after_sampler(site))
        yield
        working.cancel()
        await asyncio.to_thread(site.sampler.close)

    router = APIRouter(prefix="/api", route_class=ProblemRoute, lifespan=lifespan, responses={422: {"model": Problems}})
    _add_samples(router, site)
    _add_runs(router, site)
    _add_changes_of_runs(router, site)
    return router


async def _look_after_sampler(site: Site) -> None:
    while True:
        await asyncio.sleep(TICK_SECONDS)
        await asyncio.to_thread(site.sampler.tick)


def _add_samples(router: APIRouter, site: Site) -> None:
    sampler = site.sampler

    # Not async: these run in threads, since they read files.
    @router.post("/sample", tags=["images"], status_code=202)
    def draw(asked: SampleRequest) -> SampleState:
        """Draw an image with a model and any number of LoRAs. It waits for those before it."""
        sample = sampler.submit(asked)
        return state_of(site, sample, memory=_memory_of(site, sample.drawing))

    @router.post("/sample/memory", tags=["images"])
    def ask_memory(asked: SampleRequest) -> MemoryState:
        """Return the memory that an image would need and the runs that train beside it, without drawing it."""
        return _memory_of(site, resolve(asked, site.workspace))

    @router.get("/sample", tags=["images"])
    def list_samples(count: Annotated[int, Query(ge=1, le=50)] = 20) -> list[SampleState]:
        """Return the images that are drawn or wait now, and then the last ones."""
        return [state_of(site, sample) for sample in (*sampler.active(), *sampler.finished(count))]

    @router.get("/sample/{sample_id}", tags=["images"])
    def get_sample(sample_id: str) -> SampleState:
        """Return the state of an image, its place in the queue, its progress, and its address when it is done."""
        return state_of(site, sampler.get(sample_id))

    @router.delete("/sample/{sample_id}", tags=["images"])
    def cancel(sample_id: str) -> SampleState:
        """Cancel an image that waits or is being drawn. One that has ended stays."""
        return state_of(site, sampler.cancel(sample_id))

    @router.get("/sample/{sample_id}/image", tags=["images"], response_class=FileResponse)
    def image(sample_id: str, side: Side = None) -> Response:
        """Return the image as PNG."""
        return _image(site, sample_id, is_base=False, side=side)

    @router.get("/sample/{sample_id}/base", tags=["images"], response_class=FileResponse)
    def base_image(sample_id: str, side: Side = None) -> Response:
        """Return the image without LoRAs as PNG."""
        return _image(site, sample_id, is_base=True, side=side)


def _image(site: Site, sample_id: str, is_base: bool, side: int | None) -> Response:
    sample = site.sampler.get(sample_id)
    path = site.sampler.image_path(sample, is_base)
    if sample.status != "done" or not path.is_file():
        raise DataError(Problem(f"sample {sample_id}", "has no such image", "ask for its state", "missing-file"))
    if side is not None and max(sample.drawing.sampling.width, sample.drawing.sampling.height) > side:
        with Image.open(path) as image:
            small = image.convert("RGB")
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=88)
        return Response(buffer.getvalue(), media_type="image/jpeg", headers=FOREVER)
    return FileResponse(
        path, media_type="image/png", filename=path.name, headers=FOREVER, content_disposition_type="inline"
    )


def _memory_of(site: Site, drawing: Drawing) -> MemoryState:
    needs = memory_needs(drawing, site.queue, site.machine(), site.sampler.slot)
    return MemoryState(
        needed_gb=_gb(needs.needed_bytes),
        free_gb=_gb(needs.free_bytes),
        training=list(needs.training),
        is_downloaded=needs.is_downloaded,
    )


def state_of(site: Site, sample: Sample, memory: MemoryState | None = None) -> SampleState:
    """Return the state of a sample for programs."""
    is_done, address = sample.status == "done", f"/api/sample/{sample.id}"
    return SampleState(
        id=sample.id,
        state=sample.status,
        place=site.sampler.place(sample),
        phase=sample.phase,
        done=sample.done,
        total=sample.total,
        image=f"{address}/image" if is_done else None,
        base_image=f"{address}/base" if is_done and sample.asked.base else None,
        asked=sample.asked,
        model=sample.drawing.settings.label,
        loras=sample.drawing.loras,
        request=sample.drawing.request,
        problems=[ProblemValues(**problem) for problem in sample.problems],
        memory=memory,
    )


def _add_runs(router: APIRouter, site: Site) -> None:
    @router.get("/runs", tags=["runs"])
    def list_runs() -> list[RunInfo]:
        """Return the jobs that wait, in their order, and then the runs, those that changed last first."""
        waiting = {job.name for job in site.queue.waiting()}
        runs = [info_of(state) for state in run_state.list_runs(site.workspace.runs) if state.name not in waiting]
        return [*[waiting_info(job.name) for job in site.queue.waiting()], *runs]

    @router.get("/runs/{name}", tags=["runs"])
    def get_run(name: str) -> RunDetails:
        """Return a run with its config, LoRAs, previews and last lines."""
        folder = site.workspace.run(name)
        config = site.queue.config_text(name)
        is_waiting = any(job.name == name for job in site.queue.waiting())
        if not run_state.is_run(folder):
            return RunDetails(**waiting_info(name).model_dump(), config=config, loras=[], previews={}, log=[])
        state = run_state.read_run(folder)
        info = info_of(state)
        if is_waiting:
            info.state = "waiting"
        previews: dict[int, list[str]] = {}
        for step, names in run_state.previews_of(folder).items():
            previews[step] = [whole_url(folder / "samples" / file) for file in names]
        return RunDetails(
            **info.model_dump(),
            config=config,
            loras=[str(path) for path in loras_of_run(folder)],
            previews=previews,
            log=run_state.log_tail(folder, state.output),
        )

    @router.get("/runs/{name}/metrics", tags=["runs"])
    def metrics(
        name: str,
        after: Annotated[int, Query(description="Only records of later steps.")] = -1,
        limit: Annotated[int, Query(ge=1, le=MAX_RECORDS)] = 500,
        events: Annotated[bool, Query(description="The events (previews, saves) instead of the steps.")] = False,
    ) -> Records:
        """Return the records of the steps of a run: loss, learning rate, gradient norm and others."""
        folder = _known_run(site, name).folder
        records = run_state.events_of(folder) if events else run_state.records_of(folder)
        later = [record for record in records if record["step"] > after]
        return Records(records=later[:limit], more=len(later) > limit)

    @router.get("/machine", tags=["machine"])
    def machine() -> Machine:
        """Return the GPUs with the runs on them, and the free disk space and main memory."""
        state, busy = site.machine(), site.queue.busy()
        gpus: list[Gpu] = []
        for gpu in state.gpus:
            used, total = _gb(gpu.used_bytes), _gb(gpu.total_bytes)
            gpus.append(
                Gpu(
                    index=gpu.index,
                    name=gpu.name,
                    temperature=gpu.temperature,
                    load=gpu.load,
                    used_gb=used,
                    total_gb=total,
                    run=busy.get(gpu.index),
                )
            )
        disk, memory = state.free_disk_bytes / 1e9, state.free_memory_bytes / 1e9
        return Machine(gpus=gpus, free_disk_gb=round(disk, 3), free_memory_gb=round(memory, 3))


def _add_changes_of_runs(router: APIRouter, site: Site) -> None:
    @router.post("/runs", tags=["runs"], status_code=202, openapi_extra=YAML_BODY)
    async def add_run(
        request: Request,
        gpu: Annotated[str | None, Query(description="Index of the GPU to wait for; default: any.")] = None,
    ) -> RunInfo:
        """Check a config and put it at the end of the queue; a run of its name that was stopped continues.

        The body is YAML, or a job of AI Toolkit.
        """
        body = await request.body()
        try:
            text = body.decode()
        except UnicodeDecodeError:
            raise ConfigError(Problem("body", "is not UTF-8", "send the text of a config", "not-text")) from None
        if gpu is not None and gpu not in site.queue.slots:
            found = f"is {gpu!r}, and this machine has {', '.join(site.queue.slots)}"
            raise ConfigError(Problem("gpu", found, "leave it out for any", "bad-argument"))
        job = await asyncio.to_thread(submitted_config.check_submitted, text, site.workspace.runs)
        await asyncio.to_thread(site.queue.add, job.name, job.text, gpu)
        return waiting_info(job.name)

    @router.post("/runs/{name}/stop", tags=["runs"])
    def stop(name: str) -> RunInfo:
        """Ask a run to save and stop, or take a job that waits out of the queue."""
        site.queue.stop(name)
        folder = site.workspace.run(name)
        return info_of(run_state.read_run(folder)) if folder.exists() else waiting_info(name, "never started")

    @router.post("/runs/{name}/save", tags=["runs"], status_code=202)
    def save(name: str) -> RunInfo:
        """Ask a run to save its LoRA and a checkpoint after the step under way."""
        site.queue.ask(name, "save")
        return info_of(run_state.read_run(site.workspace.run(name)))

    @router.post("/runs/{name}/preview", tags=["runs"], status_code=202)
    def preview(name: str) -> RunInfo:
        """Ask a run to draw its previews after the step under way."""
        site.queue.ask(name, "preview")
        return info_of(run_state.read_run(site.workspace.run(name)))

    @router.post("/runs/{name}/continue", tags=["runs"], status_code=202)
    def resume(name: str) -> RunInfo:
        """Queue a run again; it continues from its last checkpoint."""
        site.queue.resume(name)
        return waiting_info(name)

    @router.delete("/runs/{name}", tags=["runs"])
    def delete(name: str) -> dict[str, str]:
        """Move a run to the trash, `.trash` in the folder of the runs; one that is training is refused."""
        return {"trash": str(site.queue.delete(name))}


def _known_run(site: Site, name: str) -> RunState:
    folder = site.workspace.run(name)
    if not run_state.is_run(folder):
        raise DataError(Problem(f"run {name}", "does not exist", "GET /api/runs lists those that do", "missing-file"))
    return run_state.read_run(folder)


def waiting_info(name: str, state: str = "waiting") -> RunInfo:
    return RunInfo(name=name, state=state, step=0, steps=0, loss=None, changed_at=0.0, note="")


def info_of(state: RunState) -> RunInfo:
    """Return the state of a run for programs."""
    note = ""
    if state.status == "failed":
        note = run_state.text_of(state.output.errors[-1]) if state.output.errors else "\n".join(state.output.lines[-1:])
    return RunInfo(
        name=state.name,
        state=state.status,
        step=state.step,
        steps=state.steps,
        loss=state.loss,
        changed_at=state.changed_at,
        note=note,
    )


def _gb(count: float | None) -> float | None:
    return None if count is None else round(count / 1e9, 3)
