"""API keys and their limits; without any key, only clients on this machine have access."""

import base64
import hashlib
import hmac
import ipaddress
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from sdbatch.errors import JobError, one_line
from sdbatch.job import Limits, Section, Serve, strict_yaml
from sdbatch.serve.errors import ApiError, invalid_value

VARIABLE = "SDBATCH_API_KEYS"
METRICS = "/metrics"
MIN_CHARACTERS = 16  # of a key: a shorter one can be guessed
_LENGTH = (
    f"must have at least {MIN_CHARACTERS}, with commas between keys. Create one with: "
    f"openssl rand -hex 32"
)
_PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-real-ip")


class _KeyEntry(Section):
    """An entry of the key file with limits of its own."""

    key: str = Field(min_length=MIN_CHARACTERS)
    limits: dict[str, Any] = Field({})
    only: Literal["metrics"] | None = None


@dataclass(frozen=True)
class KeyEntry:
    """What the service knows of a key, besides its hash."""

    name: str
    limits: Limits
    only: Literal["metrics"] | None = None  # all that the key may read


@dataclass
class ApiKey:
    """A key's name for logs, its limits, and how many images it has left this minute."""

    name: str
    limits: Limits
    only: Literal["metrics"] | None = None
    remaining: float = 0.0
    updated_at: float = field(default_factory=time.monotonic)
    is_only: bool = False  # there is no other key, so it may use the whole queue

    def __post_init__(self) -> None:
        self.remaining = float(self.limits.images_per_minute or 0)

    def spend(self, images: int) -> None:
        """Count images against images_per_minute; raise an ApiError if they are too many."""
        limit = self.limits.images_per_minute
        if limit is None:
            return
        if images > limit:
            raise invalid_value(
                "n", f"{images}: must be {limit} at most, this key's limit a minute"
            )
        now = time.monotonic()
        self.remaining = min(limit, self.remaining + (now - self.updated_at) * limit / 60)
        self.updated_at = now
        if images > self.remaining:
            raise ApiError(
                429,
                f"This key's limit of {limit} images a minute is reached. Retry later.",
                code="rate_limit_exceeded",
                retry_after=(images - self.remaining) * 60 / limit,
            )
        self.remaining -= images


Digests = Mapping[bytes, KeyEntry]  # by the sha256 of a key


def read_keys(serve: Serve) -> Digests:
    """Read the keys of the job's key file and of SDBATCH_API_KEYS; only their hashes are kept.

    Raises:
        JobError: the file cannot be read, or a key in it cannot be used.
    """
    digests: dict[bytes, KeyEntry] = {}
    for text in filter(None, os.environ.get(VARIABLE, "").split(",")):
        key = text.strip()
        if len(key) < MIN_CHARACTERS:
            raise JobError(f"{VARIABLE} = a key of {len(key)} characters: {_LENGTH}")
        digest = _digest(key)
        digests[digest] = KeyEntry(f"key-{digest.hex()[:6]}", serve.limits)
    if serve.keys is not None:
        digests |= _read_key_file(serve.keys, serve.limits)
    if digests and all(entry.only for entry in digests.values()):
        raise JobError(
            f"serve.keys = {serve.keys}: must hold a key that may draw. All of its keys have "
            f"`only: metrics`."
        )
    return digests


def _read_key_file(path: str, limits: Limits) -> Digests:
    digests: dict[bytes, KeyEntry] = {}
    for name, value in _parse_key_file(path).items():
        try:
            entry = _KeyEntry.model_validate({"key": value} if isinstance(value, str) else value)
            own_limits = Limits.model_validate({**limits.model_dump(), **entry.limits})
        except ValidationError as error:
            # never show the error's input: it can be the key
            first = error.errors()[0]
            where = ".".join(map(str, (name, *first["loc"])))
            raise JobError(f"{path}: {where} cannot be used: {first['msg']}.") from None
        digest = _digest(entry.key)
        if digest in digests:
            raise JobError(
                f"{path}: {name} has the same key as {digests[digest].name}. Give each name a key "
                f"of its own."
            )
        digests[digest] = KeyEntry(str(name), own_limits, entry.only)
    return digests


def _parse_key_file(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(
            f"serve.keys = {path} ({one_line(error)}): must be a readable file."
        ) from error
    try:
        entries = strict_yaml.parse(text, path)
    except JobError:  # its text shows the line, and with it the key
        raise JobError(f"serve.keys = {path}: must be YAML that has each name once.") from None
    if not isinstance(entries, dict) or not entries:
        raise JobError(f"serve.keys = {path}: must hold a line `name: key` for each key.")
    return entries


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Access:
    """Identifies clients.

    Args:
        digests: the keys; if there are none, clients on this machine need no key.
        serve: the limits of clients without a key, and the pages that may use the service.
    """

    def __init__(self, digests: Digests, serve: Serve) -> None:
        is_only = sum(entry.only is None for entry in digests.values()) == 1
        self._keys = {
            digest: ApiKey(entry.name, entry.limits, entry.only, is_only=is_only)
            for digest, entry in digests.items()
        }
        self._local = ApiKey("here", serve.limits, is_only=True)
        self._origins = serve.cors_origins
        self._metrics_apart = any(entry.only == "metrics" for entry in digests.values())

    def authenticate(self, headers: Mapping[str, str], client: str | None) -> ApiKey:
        """Return the key of a request.

        Args:
            headers: of the request, their names in lower case.
            client: the address that the request came from.

        Raises:
            ApiError: 401 if its key is missing or unknown; 403 if the service has no keys and the
                client is not on this machine.
        """
        if not self._keys:
            _check_local(headers, client, self._origins)
            return self._local
        digest = _digest(_sent_key(headers.get("authorization", "")))
        match = None
        for known, key in self._keys.items():  # compare with all of them: time must reveal nothing
            if hmac.compare_digest(known, digest):
                match = key
        if match is None:
            raise ApiError(
                401,
                "The API key is missing or unknown. Send `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                challenge=True,
            )
        return match

    def check_route(self, key: ApiKey, path: str) -> None:
        """Raise an ApiError if the key may not use the route at `path`."""
        if key.only == "metrics" and path != METRICS:
            text = f"This API key may read {METRICS} and nothing else. Use another key."
            raise ApiError(403, text, code="key_not_allowed")
        if path == METRICS and self._metrics_apart and key.only != "metrics":
            text = f"This API key may not read {METRICS}. Use one with `only: metrics`."
            raise ApiError(403, text, code="key_not_allowed")


def is_loopback(host: str | None) -> bool:
    """Tell whether `host`, a name or an address, can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address((host or "").strip("[]")).is_loopback
    except ValueError:
        return False


def _sent_key(authorization: str) -> str:
    """Return a bearer token, or the password of basic authentication, as A1111 clients send it."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value).decode().partition(":")[2]
        except ValueError:
            return ""
    return value.strip() if scheme.lower() == "bearer" else ""


def _check_local(headers: Mapping[str, str], client: str | None, origins: Collection[str]) -> None:
    """Reject other machines, and pages in a browser on this machine but those of `origins`."""
    try:
        host = headers.get("host", "")
        origin = headers.get("origin")
        same_site = origin is None or origin in origins or urlsplit(origin).netloc == host
        local_host = is_loopback(urlsplit(f"//{host}").hostname)  # else a name that points here
    except ValueError:
        same_site = local_host = False
    forwarded = any(name in headers for name in _PROXY_HEADERS)
    if forwarded or not same_site or not local_host or not is_loopback(client):
        raise ApiError(
            403,
            "Without API keys the service answers only programs on this machine. Set serve.keys "
            f"in the job, or {VARIABLE}.",
            code="no_keys",
        )
