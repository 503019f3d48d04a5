"""The guard before the whole page: it refuses requests of other machines and of other sites.

A server on one's own machine is reached by every site that its user has open, in two ways: by requests that a site
makes the browser send, which come with its `Origin` or are marked `cross-site`, and by a name of the site that leads to
127.0.0.1, which comes as another `Host`. Both are refused, for websockets too. With a token, a name may be anything.
"""

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
COOKIE = "zimage_train_token"
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
HEADERS = {
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def new_token() -> str:
    """Return a token that cannot be guessed."""
    return secrets.token_urlsafe(24)


class RequestGuard:
    """Refuses requests that may not pass, and gives all others to `app`.

    Args:
        token: the token of the first link and of programs; None for a page of this machine alone.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(scope, receive, send, refusal)
            return
        if self._token is not None and not self._is_known(scope):
            await self._ask_for_token(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)  # a page of a run has a stricter policy
            await send(message)

        await self.app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> str | None:
        """Return why the request of another site is refused, or None if it is of this page or of a program."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._token is None and _hostname(f"//{host}") not in LOOPBACK:
            return f"the page of this machine has no name {host!r}"
        origin = headers.get("origin")
        changes_state = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        if origin is not None and changes_state and urlsplit(origin).netloc != host:
            return f"{origin} may not change anything here"
        is_link = headers.get("sec-fetch-mode") == "navigate" and not changes_state
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_link:
            return "another site may not ask for this"
        return None

    def _is_known(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        return self._is_token(_cookie(headers)) or (scheme.lower() == "bearer" and self._is_token(bearer))

    def _is_token(self, given: str | None) -> bool:
        return given is not None and hmac.compare_digest(given.encode(), str(self._token).encode())

    async def _ask_for_token(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Put a token that the link has into a cookie, and lead to the same page without it; else refuse."""
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(pairs).get("token")
        if scope["type"] == "websocket" or scope["method"] != "GET" or not self._is_token(given):
            await _refuse(scope, receive, send, "open the link that `zimage-train ui` has printed", 401)
            return
        rest = urlencode([(name, value) for name, value in pairs if name != "token"])
        # Only the path, which begins with a single slash: `//host` would lead to another site.
        target = "/" + scope["path"].lstrip("/")
        response = RedirectResponse(f"{target}?{rest}" if rest else target, status_code=303)
        response.set_cookie(COOKIE, str(given), httponly=True, samesite="strict", max_age=30 * 86_400)
        response.headers["Referrer-Policy"] = "no-referrer"
        await response(scope, receive, send)


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _cookie(headers: Headers) -> str | None:
    cookies = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


async def _refuse(scope: Scope, receive: Receive, send: Send, why: str, status: int = 403) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": why[:100]})
        return
    await PlainTextResponse(f"refused: {why}\n", status_code=status, headers=HEADERS)(scope, receive, send)
