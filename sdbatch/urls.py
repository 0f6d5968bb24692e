"""URLs of users: which may be shown, as a URL can hold secrets, and which name a folder.

A password, an access key or a signature belongs to the connection alone. All that is printed,
logged or written passes through `without_secrets`.
"""

import os
import re

FOLDER = "a folder, such as out/dogs, or a URL that fsspec writes to, such as s3://BUCKET/dogs"
# Protocols whose address begins with a bucket or a host.
_HOSTED = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https", "ftp", "sftp", "ssh")
# Protocols with a name before the @ that is no secret: a container, a login, `org:repo`.
_NAMED = ("abfs", "abfss", "az", "ftp", "sftp", "ssh", "smb", "hdfs", "webhdfs")
_REPOSITORIES = ("github", "git")
_PROTOCOL = re.compile(r"[a-z][a-z0-9+.]*$", re.IGNORECASE)
_ADDRESS = re.compile(r"\S*")
_HOST = re.compile(r"[^\s/?#]*")
_PORT = re.compile(r"(?:\[[^\]]*\]|[^:]*):\d*\W*|arn:.*", re.DOTALL)  # or a bucket's ARN
_QUERY = re.compile(r"\?([^\s?#]*[=][^\s?#]*)")
_SENTENCE = ":.,;)]}'\"`"  # what may follow a URL in a text
_SECRET = re.compile(
    r"(?:^|[^a-z])sig|signature|token|secret|passw|pwd|credential|auth(?!or)|session|jwt|policy"
    r"|(?:api|access|account|shared)[-_]?key|key-pair-id|x-amz-|x-goog-|^(?:code|key|sas)$",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """Return a URL, or a text with URLs, without passwords, access keys and signatures."""
    first, *others = text.split("://")
    parts = [first]
    for before, part in zip([first, *others], others, strict=False):
        protocol = _PROTOCOL.search(before[-20:])
        parts.append(_without_user(protocol[0].lower() if protocol else "", part))
    text = "://".join(parts)
    return _QUERY.sub(_without_signature, text) if "?" in text else text


def _without_user(protocol: str, rest: str) -> str:
    """Return what follows `protocol://`, without the user and password before the host."""
    if protocol in _REPOSITORIES:
        return rest
    host = _matched(_HOST, rest)
    if "@" in host:
        user = host.rpartition("@")[0]
    elif ":" in host and not _PORT.fullmatch(host):  # a password with a slash in it
        user, at, _ = _matched(_ADDRESS, rest).partition("@")
        if not at:
            return rest
    else:
        return rest
    name = f"{user.partition(':')[0]}@" if protocol in _NAMED else ""
    return f"{name}{rest[len(user) + 1 :]}"


def _matched(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.match(text)
    return match[0] if match else ""


def _without_signature(match: re.Match[str]) -> str:
    """Return a query without the values that are secrets, by their names."""
    values = match[1].split("&")
    shown = [value for value in values if not _SECRET.search(value.partition("=")[0])]
    if len(shown) == len(values):
        return match[0]
    last = values[-1]
    end = "" if last in shown else last[len(last.rstrip(_SENTENCE)) :]
    return f"?{'&'.join(shown)}{end}" if shown else end


def names_folder(url: str) -> bool:
    """Tell whether a path or URL names a folder or bucket, and not a protocol or the root alone."""
    protocol, separator, rest = url.rpartition("::")[2].partition("://")
    if not separator:
        below_root = os.path.abspath(os.path.expanduser(url)).strip("/")
        return bool(url.strip() and below_root) and not url.split("/")[0].endswith(":")
    if protocol in _HOSTED:
        rest = rest.partition("/")[0].rpartition("@")[2]
    return bool(rest.strip("/ "))
