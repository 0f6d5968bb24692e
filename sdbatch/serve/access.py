"""Who may ask, and for how much: API keys, their limits, and none at all on this machine alone."""

import base64
import hashlib
import hmac
import ipaddress
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from sdbatch.errors import JobError
from sdbatch.job import Limits, Section, Serve, strict_yaml
from sdbatch.serve.errors import Refusal

VARIABLE = "SDBATCH_API_KEYS"
SHORTEST = 16  # characters of a key: what is shorter can be guessed


class _Entry(Section):
    key: str = Field(min_length=SHORTEST)
    limits: dict[str, Any] = Field({})


@dataclass
class Key:
    """One who may ask: a name for logs, limits, and how many images are left this minute."""

    name: str
    limits: Limits
    left: float = 0.0
    counted_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = float(self.limits.images_per_minute or 0)

    def spend(self, images: int) -> None:
        """Count images against images_per_minute; raise a Refusal if they are too many."""
        most = self.limits.images_per_minute
        if most is None:
            return
        if images > most:
            raise Refusal(
                400,
                f"n = {images}: this key has {most} images a minute.",
                code="invalid_value",
                param="n",
            )
        now = time.monotonic()
        self.left = min(most, self.left + (now - self.counted_at) * most / 60)
        self.counted_at = now
        if images > self.left:
            raise Refusal(
                429,
                f"images_per_minute = {most}: this key has no more for now. Wait, then try again.",
                code="rate_limit_exceeded",
                retry_after=(images - self.left) * 60 / most,
            )
        self.left -= images


Digests = Mapping[bytes, tuple[str, Limits]]  # sha256 of a key -> its name and limits


def read(serve: Serve) -> Digests:
    """Read the keys of the job's key file and of SDBATCH_API_KEYS, of which only hashes are kept.

    Raises:
        JobError: the file cannot be read, or a key in it cannot be used.
    """
    found: dict[bytes, tuple[str, Limits]] = {}
    for key in filter(None, os.environ.get(VARIABLE, "").split(",")):
        if len(key.strip()) < SHORTEST:
            raise JobError(f"{VARIABLE} = a key of {len(key.strip())} characters: {_LENGTH}")
        digest = _digest(key.strip())
        found[digest] = (f"key-{digest.hex()[:6]}", serve.limits)
    if serve.keys is not None:
        found |= _from_file(serve.keys, serve.limits)
    return found


_LENGTH = f"must have {SHORTEST} at least, commas between keys. Make one: openssl rand -hex 32"


def _from_file(path: str, limits: Limits) -> Digests:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"serve.keys = {path} ({error}): must be a readable file.") from error
    try:
        entries = strict_yaml.parse(text, path)
    except JobError:  # whose text shows the line, and so the key
        raise JobError(f"serve.keys = {path}: is no YAML in which each name stands once.") from None
    if not isinstance(entries, dict) or not entries:
        raise JobError(f"serve.keys = {path}: must hold a line `name: key` for each key.")
    found: dict[bytes, tuple[str, Limits]] = {}
    for name, entry in entries.items():
        try:
            one = _Entry.model_validate({"key": entry} if isinstance(entry, str) else entry)
            own = Limits.model_validate({**limits.model_dump(), **one.limits})
        except ValidationError as error:
            # the error's input is never told: it can be the key
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            must = error.errors()[0]["msg"]
            raise JobError(f"{path}: {name}.{where} cannot be used: {must}.") from None
        digest = _digest(one.key)
        if digest in found:
            raise JobError(f"{path}: {name} has the key of {found[digest][0]}: give it its own.")
        found[digest] = (str(name), own)
    return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Access:
    """Tells who asks.

    Args:
        digests: the keys; with none, only this machine is answered, without one.
        limits: of those without a key.
    """

    def __init__(self, digests: Digests, limits: Limits) -> None:
        self._keys = {digest: Key(name, own) for digest, (name, own) in digests.items()}
        self._here = Key("here", limits)

    def who(self, headers: Mapping[str, str], client: str | None) -> Key:
        """Return whose request this is.

        Args:
            headers: of the request, their names in lower case.
            client: the address it came from.

        Raises:
            Refusal: 401 without a key that is known; 403 from elsewhere where there are no keys.
        """
        if not self._keys:
            _refuse_elsewhere(headers, client)
            return self._here
        digest = _digest(_given(headers.get("authorization", "")))
        found = None
        for known, key in self._keys.items():  # all of them: time tells nothing
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise Refusal(
                401,
                "api_key = none that is known: send `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                challenge=True,
            )
        return found


def _given(authorization: str) -> str:
    """Return the key: a bearer's token, or basic authentication's password as A1111 clients do."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value).decode().partition(":")[2]
        except ValueError:
            return ""
    return value.strip() if scheme.lower() == "bearer" else ""


def is_loopback(host: str | None) -> bool:
    """Tell whether `host`, a name or an address, is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address((host or "").strip("[]")).is_loopback
    except ValueError:
        return False


_PROXIES = ("forwarded", "via", "x-forwarded-for", "x-real-ip")  # headers that they add


def _refuse_elsewhere(headers: Mapping[str, str], client: str | None) -> None:
    """Refuse other machines, and other sites' pages in a browser of this one."""
    try:
        host = headers.get("host", "")
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != host
        named = is_loopback(urlsplit(f"//{host}").hostname)  # else a name made to point here
    except ValueError:
        foreign, named = True, False
    passed_on = any(name in headers for name in _PROXIES)
    if foreign or passed_on or not named or not is_loopback(client):
        raise Refusal(
            403,
            "api_key = none: without keys only programs on this machine are answered. "
            f"Give the service keys: serve.keys in the job, or {VARIABLE}.",
            code="no_keys",
        )
