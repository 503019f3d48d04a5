"""The guard of the page: names, other sites, tokens."""

import asyncio
from typing import Any

import pytest
from httpx import ASGITransport, AsyncClient, Response
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from zimage_train.ui.guard import COOKIE, RequestGuard


async def answer(request: Any) -> PlainTextResponse:
    return PlainTextResponse(f"inside {request.url.query}")


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("inside")
    await websocket.close()


def guarded(token: str | None) -> RequestGuard:
    routes = [WebSocketRoute("/socket", echo), Route("/{path:path}", answer, methods=["GET", "POST", "DELETE"])]
    return RequestGuard(Starlette(routes=routes), token)


def ask(
    token: str | None, method: str = "GET", path: str = "/", base: str = "http://127.0.0.1:7860", **more: Any
) -> Response:
    async def send() -> Response:
        async with AsyncClient(transport=ASGITransport(guarded(token)), base_url=base) as client:
            return await client.request(method, path, **more)

    return asyncio.run(send())


OWN = {"origin": "http://127.0.0.1:7860"}
FOREIGN = {"origin": "http://evil.example"}


@pytest.mark.parametrize("base", ["http://127.0.0.1:7860", "http://localhost:9000", "http://[::1]:7860"])
def test_this_machine_may_ask(base: str):
    for method in ("GET", "POST", "DELETE"):
        assert ask(None, method, base=base).text == "inside "
        assert ask(None, method, base=base, headers={"origin": base}).status_code == 200


@pytest.mark.parametrize("base", ["http://evil.example:7860", "http://127.0.0.1.evil.example", "http://10.0.0.3:7860"])
def test_names_of_others_are_refused(base: str):
    """A name that leads to 127.0.0.1 (DNS rebinding) is none of this page."""
    for method in ("GET", "POST"):
        assert ask(None, method, base=base).status_code == 403


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", OWN, 200),
        ("POST", FOREIGN, 403),
        ("DELETE", FOREIGN, 403),
        ("POST", {"origin": "null"}, 403),
        ("POST", {"origin": "http://127.0.0.1:9999"}, 403),
        ("POST", {"sec-fetch-site": "cross-site"}, 403),
        ("POST", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ("GET", {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
    ],
)
def test_other_sites_change_nothing(method: str, headers: dict[str, str], status: int):
    assert ask(None, method, headers=headers).status_code == status


def test_answers_cannot_be_framed():
    headers = ask(None).headers
    assert headers["x-frame-options"] == "DENY" and "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin" and headers["referrer-policy"] == "no-referrer"


def test_a_network_needs_the_token():
    """The first link puts the token into a cookie and leads to the same page without it."""
    base = "http://10.0.0.3:7860"
    for given in ({}, {"headers": {"authorization": "Bearer wrong"}}, {"headers": {"cookie": f"{COOKIE}=wrong"}}):
        assert ask("secret", base=base, **given).status_code == 401
    assert ask("secret", path="/?token=wrong", base=base).status_code == 401
    assert ask("secret", "POST", "/?token=secret", base=base).status_code == 401, "only a link may bring it"
    first = ask("secret", path="/run/a?x=1&token=secret", base=base)
    assert first.status_code == 303 and first.headers["location"] == "/run/a?x=1"
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    for headers in ({"cookie": cookie.split(";")[0]}, {"authorization": "Bearer secret"}):
        assert ask("secret", "POST", base=base, headers=headers).status_code == 200
    stolen = {"cookie": cookie.split(";")[0], **FOREIGN}
    assert ask("secret", "POST", base=base, headers=stolen).status_code == 403
    assert ask("secret", path="/%2Fevil.example/?token=secret", base=base).headers["location"] == "/evil.example/"


@pytest.mark.parametrize(("headers", "passes"), [({}, True), (OWN, True), (FOREIGN, False), ({"host": "evil"}, False)])
def test_sockets_are_guarded(headers: dict[str, str], passes: bool):
    client = TestClient(guarded(None), base_url="http://127.0.0.1:7860")
    if passes:
        with client.websocket_connect("ws://127.0.0.1:7860/socket", headers=headers) as websocket:
            assert websocket.receive_text() == "inside"
        return
    with (
        pytest.raises((WebSocketDisconnect, WebSocketDenialResponse)),
        client.websocket_connect("ws://127.0.0.1:7860/socket", headers=headers) as websocket,
    ):
        websocket.receive_text()


def test_a_socket_needs_the_token():
    client = TestClient(guarded("secret"), base_url="http://10.0.0.3:7860")
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("ws://10.0.0.3/socket") as websocket:
        websocket.receive_text()
    with client.websocket_connect("ws://10.0.0.3/socket", headers={"cookie": f"{COOKIE}=secret"}) as websocket:
        assert websocket.receive_text() == "inside"
