"""Serves the files of the page. Apart: the policy that they are under is read in one place.

It lets the page load nothing and reach nobody but this server.
"""

from pathlib import Path

from aiohttp import hdrs, web

from slimoe.server.api_error import not_found

FILES = Path(__file__).with_name("files")
INDEX = "index.html"
PREFIX = "/page/"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A server of another version may stand at the same address tomorrow.
    hdrs.CACHE_CONTROL: "no-cache",
}


class Page:
    """The files, read once: a request names one of them or gets status 404, so that no path leads elsewhere."""

    def __init__(self) -> None:
        self._files = {path.name: path.read_bytes() for path in FILES.iterdir() if path.suffix in CONTENT_TYPES}

    def routes(self) -> list[web.RouteDef]:
        """The routes for aiohttp's router, which answer HEAD as well."""
        return [web.get("/", self.handle), web.get(PREFIX + "{name}", self.handle)]

    async def handle(self, request: web.Request) -> web.Response:
        """Answers with a file; raises ApiError for one that the page does not have."""
        name = request.match_info.get("name", INDEX)
        data = self._files.get(name)
        if data is None:
            raise not_found(f"The page has no file {name!r}. It begins at /.")
        content_type = CONTENT_TYPES[Path(name).suffix]
        return web.Response(body=data, headers={**HEADERS, hdrs.CONTENT_TYPE: content_type})
