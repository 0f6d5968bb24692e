"""What the Front and Ray's proxy in front of it agree on: header names, ids, addresses.

proxy.py runs in the proxy's process and middleware.py in the Front's.
"""

import re
import secrets
from collections.abc import Iterable

from starlette.types import Scope

Headers = list[tuple[bytes, bytes]]

REQUEST_ID = b"x-request-id"
OURS = b"x-sdbatch"  # the Front's responses have it, those of Ray's proxy do not
ANSWERED, WITH_KEY = b"answered", b"key"  # its values; WITH_KEY: the request had a valid API key
# A message by which the Front says at once that it has the request; an ASGI extension, sent only to
# a server that offers it. Without it, a request that waits for an image looks like one that waits
# for a Front.
ACCEPTED = "sdbatch.accepted"
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._-]{1,64}")


def read_header(scope: Scope, name: bytes) -> str:
    """Return a header of a request; empty if it has none."""
    value: bytes = dict(scope["headers"]).get(name, b"")
    return value.decode("latin-1")


def request_id_of(scope: Scope) -> str:
    """Return the id that the client gave its request, or a new one if it has none of that form."""
    sent = read_header(scope, REQUEST_ID)
    return sent if _REQUEST_ID_FORM.fullmatch(sent) else secrets.token_hex(16)


def address_of(scope: Scope) -> str:
    """Return the address of the client, or that of a proxy which does not tell it."""
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def replaced(headers: Iterable[tuple[bytes, bytes]], values: Headers) -> Headers:
    """Return headers in which each of `values` is the only one of its name."""
    names = {name for name, _ in values}
    return [*((name, value) for name, value in headers if name.lower() not in names), *values]
