"""Who may talk to the server: the key, the Host header, and the web pages that may call it.

Without a key every program on this machine may. A web page is no program on this machine: it is let in only from
a loopback address or a desktop app's own scheme, and not under a foreign host name that was made to point here.
"""

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import hdrs, web

from slimoe.server.api_error import ApiError, ErrorInfo, invalid

APP_SCHEMES = frozenset({"tauri", "app", "file", "vscode-webview"})
LOCAL_NAMES = frozenset({"localhost", "tauri.localhost"})
KEY_NAMES = frozenset({"key", "api_key", "apikey", "access_token", "token"})
"""Fields of a query in which clients of other services send their key."""
_SEND_KEY = "Send it as `Authorization: Bearer KEY` or `X-Api-Key: KEY`."
PUBLIC_PATHS = frozenset({"/", "/health", "/v1/health", "/openapi.json", "/docs"})
PUBLIC_FOLDER = "/page/"
"""The page's files, which hold nothing secret: the page asks for the key and sends it with what it asks the API."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_AUTHORITY = re.compile(r"(\[(?P<address>[^\[\]@/]+)\]|(?P<name>[^\s:/?#@\\\[\]]+))(:\d{0,5})?")
_ORIGIN = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)/?")
_OPAQUE_ORIGIN = "null"
_READING = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
"""Methods that change nothing, by which a link on any page may lead here."""


@dataclass(frozen=True, slots=True)
class AccessRules:
    """What was configured: the key that clients must send, None for none, and hosts and origins besides local ones."""

    key: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    def check(self, request: web.Request) -> None:
        """Raises ApiError for a request that may not be answered."""
        for name in request.query:
            if name.lower().replace("-", "_") in KEY_NAMES:
                raise invalid(f"A key does not belong into an address, which logs keep. {_SEND_KEY}", name)
        host, origin = _one(request, hdrs.HOST), _one(request, hdrs.ORIGIN)
        if origin is not None and not self.allows_origin(origin, host):
            raise _forbidden(f"Pages from {origin} may not use this server. Allow them with --allowed-origin.")
        if origin is None and request.method not in _READING and request.headers.get("Sec-Fetch-Site") == "cross-site":
            raise _forbidden("Pages of other sites may not use this server without telling their Origin.")
        if self.key is None:
            if host is None:
                raise invalid("The request names no host. Send a Host header.")
            if not self.allows_host(host):
                raise _forbidden(f"The server does not go by the name {host!r}. Allow it with --allowed-host.")
        elif request.method != hdrs.METH_OPTIONS and not is_public(request.path):
            _check_key(request, self.key)

    def allows_host(self, host: str) -> bool:
        """Whether a Host header names this machine: an address does, a name only if it is known."""
        name = host_name(host)
        return name is not None and (name in LOCAL_NAMES or name in self.hosts or _is_address(name))

    def allows_origin(self, origin: str, host: str | None) -> bool:
        """Whether a page from `origin` may call the server that it knows as `host`; raises ApiError for no origin."""
        if origin == _OPAQUE_ORIGIN or origin in self.origins:
            return origin in self.origins
        parts = _ORIGIN.fullmatch(origin)
        name = None if parts is None else host_name(parts["authority"])
        if parts is None or (name is None and parts["authority"]):
            raise invalid(f"The header Origin is {origin!r}, which is no web origin such as http://localhost:3000.")
        is_local = parts["scheme"].lower() in APP_SCHEMES or name in LOCAL_NAMES
        is_local = is_local or (name is not None and _is_address(name) and ipaddress.ip_address(name).is_loopback)
        # A page that this very server gave out.
        is_own = host is not None and parts["authority"] == host and self.allows_host(host)
        return is_local or is_own


@web.middleware
async def access_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses what the rules refuse and answers the questions browsers ask first."""
    request.app[RULES].check(request)
    if request.method == hdrs.METH_OPTIONS and hdrs.ORIGIN in request.headers:
        return web.Response()
    return await handler(request)


async def add_cors_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Lets the page that sent the request read the answer; credentials are never involved."""
    origin = request.headers.get(hdrs.ORIGIN)
    try:
        if origin is None or not request.app[RULES].allows_origin(origin, request.headers.get(hdrs.HOST)):
            return
    except ApiError:  # what is no origin gets no headers either
        return
    response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
    response.headers[hdrs.VARY] = hdrs.ORIGIN
    response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = "X-Request-Id"
    if request.method == hdrs.METH_OPTIONS:
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "Authorization, Content-Type")
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "GET, POST, OPTIONS"
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = asked
        response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = "600"


def host_name(authority: str) -> str | None:
    """The name or address in a Host header or origin, without port, brackets and last dot; None when there is none."""
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        return None
    if parts["address"] is None:
        return parts["name"].lower().removesuffix(".")
    return parts["address"].lower() if _is_address(parts["address"]) and ":" in parts["address"] else None


RULES = web.AppKey("rules", AccessRules)


def is_public(path: str) -> bool:
    """Whether everybody may ask for it, even where a key is asked for: nothing secret lies there."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER)


def _check_key(request: web.Request, key: str) -> None:
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")
    if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode()):
        info = ErrorInfo("The API key is missing or wrong.", "authentication_error", None, "invalid_api_key")
        raise ApiError(401, info, headers={"WWW-Authenticate": "Bearer"})


def _forbidden(message: str) -> ApiError:
    return ApiError(403, ErrorInfo(message, "permission_error", None, "forbidden"))


def _one(request: web.Request, header: str) -> str | None:
    """A header's value; raises ApiError when it is there more than once."""
    values = request.headers.getall(header, [])
    if len(values) > 1:
        raise invalid(f"The request has the header {header} {len(values)} times. Send it once.")
    return values[0] if values else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
