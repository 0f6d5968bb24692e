"""Why a request is not answered as it was asked, as OpenAI's API says such things."""

from typing import Any

_KINDS = {429: "rate_limit_error", 404: "not_found_error"}


class Refusal(Exception):
    """Ends a request.

    Args:
        status: of HTTP; 429 and 5xx may be tried again, the others not as they are.
        message: one line for whoever asked.
        code: a word for programs.
        param: the parameter that is at fault.
        retry_after: seconds until another try makes sense.
        challenge: says how to send a key (RFC 9110, sec. 11.6.1).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
        challenge: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {
            "error": {
                "message": message,
                "type": _KINDS.get(
                    status, "server_error" if status >= 500 else "invalid_request_error"
                ),
                "param": param,
                "code": code,
            }
        }
        self.headers = {"WWW-Authenticate": "Bearer"} if challenge else {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))


def internal() -> Refusal:
    """Return what is told of a fault that only the log explains."""
    return Refusal(500, "service = a fault of its own: see its log.", code="internal")


def lost() -> Refusal:
    """Return what those are told whose replica died: nothing is wrong with what they asked."""
    return Refusal(
        503,
        "replica = lost while it drew: nothing was wrong with the request. Send it again.",
        code="replica_lost",
        retry_after=1,
    )
