"""The error that ends a request, in the shape of OpenAI's API."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from sdbatch.errors import one_line
from sdbatch.job import describe_key, errors_by_key

MOST_FAULTS = 50  # that one answer names
_FAULTS = (400, 404)  # the statuses of what is wrong with a request itself
_TYPES = {429: "rate_limit_error", 404: "not_found_error"}
_PARAM = re.compile(r"([\w.]+) = ")  # how the text of an error about a parameter begins


class ApiError(Exception):
    """Ends a request with an error response.

    Args:
        status: HTTP's; with 429 and 5xx the client can retry, with others it must change something.
        message: one line for the client.
        code: a word for programs.
        param: the parameter that is at fault.
        retry_after: seconds until a retry makes sense.
        challenge: whether the response says how to send a key (RFC 9110, sec. 11.6.1).
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
        self.code = code
        self.param = param
        self.faults: tuple[ApiError, ...] = ()  # of an error that names several
        self.headers = {"WWW-Authenticate": "Bearer"} if challenge else {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))

    @property
    def parts(self) -> "tuple[ApiError, ...]":
        """Return one error for each fault that it names."""
        return self.faults or (self,)

    @property
    def body(self) -> dict[str, Any]:
        """Return the error response; of what is wrong with a request, with each fault."""
        default_type = "server_error" if self.status >= 500 else "invalid_request_error"
        error: dict[str, Any] = {
            "message": str(self),
            "type": _TYPES.get(self.status, default_type),
            "param": self.param,
            "code": self.code,
        }
        if self.status == 400:
            error["details"] = [
                {"message": str(each), "param": each.param, "code": each.code}
                for each in self.parts
            ]
        return {"error": error}


class Faults:
    """Collects what is wrong with a request, so that one answer names all of it."""

    def __init__(self) -> None:
        self.errors: list[ApiError] = []

    def add(self, *errors: ApiError) -> None:
        """Add errors; one that names several faults counts as several."""
        self.errors += [part for error in errors for part in error.parts]

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Add the fault that ends the block. Other errors than those of requests go on."""
        try:
            yield
        except ApiError as error:
            if error.status not in _FAULTS:
                raise
            self.add(error)

    def raise_any(self) -> None:
        """Raise the ApiError that names all faults, if there are any."""
        if self.errors:
            raise combined(self.errors)


def combined(errors: Sequence[ApiError]) -> ApiError:
    """Return the error that names the faults of one request, at least one."""
    first, *others = errors
    if not others:
        return first
    text = " ".join([f"The request has {len(errors)} faults.", *map(str, errors)])
    error = ApiError(400, text, code=first.code, param=first.param)
    error.faults = tuple(errors)
    return error


def sentence(text: BaseException | str) -> str:
    """Return the text of an error in one line that ends with one full stop."""
    return f"{one_line(text).rstrip('.')}."


def invalid_value(param: str, text: str) -> ApiError:
    """Return the error of a parameter; `text` says its value and what it must be."""
    return ApiError(400, sentence(f"{param} = {text}"), code="invalid_value", param=param)


def invalid_request(text: BaseException | str) -> ApiError:
    """Return the error of a request; a text such as `seed = -1: ...` names its parameter."""
    message = sentence(text)
    match = _PARAM.match(message)
    return ApiError(400, message, code="invalid_value", param=match[1] if match else None)


def invalid_body(error: ValidationError) -> ApiError:
    """Return the error of a body that pydantic rejected; it names all faults."""
    return combined(body_faults(error))


def body_faults(error: ValidationError) -> list[ApiError]:
    """Return the faults of a body that pydantic rejected: one for each parameter, or for all."""
    if error.error_count() > MOST_FAULTS:
        text = f"The body has more than {MOST_FAULTS} faults. See /docs for its fields."
        return [ApiError(400, text, code="invalid_value")]
    return [_body_fault(errors) for errors in errors_by_key(error)]


def _body_fault(errors: Sequence[Any]) -> ApiError:
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"] if not str(part).startswith("literal["))
    if first["type"] == "extra_forbidden":
        return unknown_parameter(param)
    if first["type"] == "value_error" and not param:
        return invalid_request(describe_key(errors))  # its text begins with a parameter
    if not param:
        detail = f" ({first['msg']})" if first["type"] == "json_invalid" else ""
        text = f"The body must be a JSON object{detail}."
        return ApiError(400, text, code="invalid_value")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, describe_key(errors), code=code, param=param)


def unknown_parameter(param: str) -> ApiError:
    """Return the error of a parameter that no route of this kind has."""
    text = f"{param or repr(param)}: unknown parameter. It would have no effect. Leave it out."
    return ApiError(400, text, code="unknown_parameter", param=param)


def model_not_found(key: str, name: str, served: Sequence[str]) -> ApiError:
    """Return the error of a request for another model than the served one.

    Args:
        key: the parameter.
        name: what it says.
        served: the names of the served model.
    """
    *others, last = served
    names = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    text = f"{key} = {name!r}: only {names} served here."
    return ApiError(404, text, code="model_not_found", param=key.partition(".")[0])


def internal_error() -> ApiError:
    """Return an internal error; details stay in the log."""
    text = "The service failed because of an internal error. Its log has the details."
    return ApiError(500, text, code="internal")


def replica_lost(text: str) -> ApiError:
    """Return the error of an image that no replica could draw; `text` says what to do."""
    return ApiError(503, text, code="replica_lost", retry_after=5)


def client_disconnected() -> ApiError:
    """Return the error of a request whose client closed the connection; it goes into the log."""
    return ApiError(499, "The client disconnected.", code="client_gone")


def shutting_down() -> ApiError:
    """Return the error of a request that comes after the service was stopped."""
    text = "The service is shutting down. Retry later."
    return ApiError(503, text, code="stopping", retry_after=5)
