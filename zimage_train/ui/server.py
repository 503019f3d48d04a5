"""The server of the page."""

import asyncio
import contextlib
import logging
import socket
import webbrowser
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from nicegui import ui
from starlette.types import ASGIApp

from zimage_train import __version__
from zimage_train.errors import ConfigError, Problem, ZImageTrainError
from zimage_train.ui import api
from zimage_train.ui.guard import LOOPBACK, RequestGuard, new_token
from zimage_train.ui.jobs import JobQueue
from zimage_train.ui.machine import list_gpus
from zimage_train.ui.media import media_router
from zimage_train.ui.pages import images, loras, new, run, runs, try_it
from zimage_train.ui.site import Site
from zimage_train.ui.workspace import Workspace

TICK_SECONDS = 1.0


def make_app(workspace: Workspace, token: str | None) -> ASGIApp:
    """Return the whole page with its guard; it works on the queue while it is served."""
    site = Site(workspace, JobQueue(workspace, [gpu.index for gpu in list_gpus()]))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(_work_on(site.queue))
        yield
        working.cancel()

    app = FastAPI(title="zimage-train", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.exception_handler(ZImageTrainError)
    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, ZImageTrainError)
        problems = [{"where": str(one.location), "found": one.message, "todo": one.hint} for one in error.problems]
        return JSONResponse({"problems": problems}, status_code=422)

    app.include_router(media_router(workspace))
    app.include_router(api.api_router(site))
    for page in (runs, run, new, images, try_it, loras):
        page.register(site)
    ui.run_with(app, title="zimage-train", dark=None, show_welcome_message=False, tailwind=True)
    return RequestGuard(app, token)


async def _work_on(queue: JobQueue) -> None:
    """Let the queue start jobs, as long as the page is served."""
    while True:
        try:
            await asyncio.to_thread(queue.tick)
        except Exception:
            logging.getLogger(__name__).exception("the queue could not go on; it tries again")
        await asyncio.sleep(TICK_SECONDS)


def serve(runs_folder: Path, folders: list[Path], host: str, port: int, opens_browser: bool) -> None:
    """Serve the page until it is interrupted.

    Raises:
        ConfigError: the port is in use, or the host is none of this machine.
    """
    token = None if host in LOOPBACK else new_token()
    app = make_app(Workspace(runs_folder.absolute(), tuple(folder.absolute() for folder in folders)), token)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}/" + (f"?token={token}" if token else "")
    # A page that restarts must not wait for browsers that keep their websocket open.
    config = uvicorn.Config(app, host, port, log_level="warning", timeout_graceful_shutdown=2)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        what = f"{host}:{port} cannot be opened ({error.strerror})"
        hint = "give another --port or --host, or stop what uses it"
        raise ConfigError(Problem("--port", what, hint, "port-in-use")) from None
    print(f"zimage-train {__version__}: {address}", flush=True)
    if opens_browser:
        webbrowser.open(address)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([listener])
