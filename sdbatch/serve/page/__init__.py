"""The page at /: its files, and the routes that send them.

The address of all files but page.html has a hash of their content. A browser may store them for
good, and never mixes the files of two versions.
"""

import hashlib
from importlib.resources import files
from mimetypes import guess_type

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sdbatch.serve.errors import ApiError

HTML = "page.html"
FOLDER = "/page/"  # of the addresses of all other files
SUFFIXES = (".html", ".css", ".js")
_VERSION = b"VERSION"  # stands for the hash in page.html
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def routes() -> APIRouter:
    """Return the routes of the page."""
    router = APIRouter(include_in_schema=False)
    contents = _read_files()
    html = contents.pop(HTML)
    version = hashlib.sha256(b"".join(contents[name] for name in sorted(contents))).hexdigest()[:16]
    html = html.replace(_VERSION, version.encode())
    tag = f'"{hashlib.sha256(html).hexdigest()[:16]}"'

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        headers = {
            "Cache-Control": "no-cache",  # ask each time whether it changed
            "ETag": tag,
            "Content-Security-Policy": _CONTENT_POLICY,
        }
        if request.headers.get("if-none-match", "").removeprefix("W/") == tag:
            return Response(status_code=304, headers=headers)
        return Response(html, headers=headers, media_type="text/html")

    @router.get(f"{FOLDER}{{requested}}/{{name}}")
    async def file(requested: str, name: str) -> Response:
        if requested != version or name not in contents:
            text = "The page has no such file. Reload the page."
            raise ApiError(404, text, code="not_found")
        headers = {"Cache-Control": "public, max-age=31536000, immutable"}
        return Response(contents[name], headers=headers, media_type=guess_type(name)[0])

    return router


def _read_files() -> dict[str, bytes]:
    """Return the page's files by their names."""
    found = (each for each in files(__name__).iterdir() if each.name.endswith(SUFFIXES))
    return {each.name: each.read_bytes() for each in found}
