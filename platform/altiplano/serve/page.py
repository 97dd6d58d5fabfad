"""The page at `/`: a playground with two columns and the service's state. Files of ours only, under a policy that allows no others."""

import hashlib
from importlib.resources import files

from fastapi import FastAPI, Request, Response

from altiplano.serve.errors import ApiError

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add / and /page/… to `app`. The files are read once; a name that is not among them is a 404."""
    found = {entry.name: entry.read_bytes() for entry in files("altiplano.serve").joinpath("page").iterdir() if entry.is_file()}

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _file(request, "index.html", found["index.html"])

    @app.get("/page/{path:path}", include_in_schema=False)
    async def asset(request: Request, path: str) -> Response:
        if path not in found:
            raise ApiError(404, f"the page has no file {path!r}")
        return _file(request, path, found[path])


def _file(request: Request, name: str, content: bytes) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = HEADERS | {"etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=TYPES[name[name.rindex(".") :]], headers=headers)
