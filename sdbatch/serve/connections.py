"""Time limits of connections for uvicorn's server, which Ray's proxy runs.

uvicorn waits for the headers of a request and for a client that reads its response as long as the
client likes. A body has its limits in bodies.py.
"""

import asyncio
import json
import secrets

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sdbatch.serve.bodies import MIN_BYTES_PER_SECOND
from sdbatch.serve.errors import ApiError
from sdbatch.serve.exchange import REQUEST_ID

HEADERS_SECONDS = 20.0  # from the first byte of a request, or from the connection, to its headers
MAX_HEADERS_BYTES = 64 * 1024  # of a request, its first line included
RESPONSE_SECONDS = 20.0  # to read a response, in addition to what MIN_BYTES_PER_SECOND gives


class Connection(HttpToolsProtocol):
    """A client's connection; it ends if headers take too long or a response is not read."""

    _headers_timer: asyncio.TimerHandle | None = None
    _response_timer: asyncio.TimerHandle | None = None
    _headers_begun = False
    _headers_bytes = 0  # that arrived of the request whose headers are not complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request."""
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the time limits with the connection."""
        super().connection_lost(exc)
        for timer in (self._headers_timer, self._response_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Limit the size of headers, and the time of data that begins no request."""
        if self.transport.is_closing():
            return
        self._headers_bytes += len(data)
        super().data_received(data)
        if self._headers_begun and self._headers_bytes > MAX_HEADERS_BYTES:
            text = f"The headers are larger than {MAX_HEADERS_BYTES} bytes. Send smaller ones."
            self._answer(ApiError(431, text, code="headers_too_large"))
            return
        if not self._is_answering and self.timeout_keep_alive_task is None:
            self._expect_headers()

    def on_message_begin(self) -> None:
        """Limit the time of the headers that begin."""
        super().on_message_begin()
        self._headers_begun = True
        self._expect_headers()

    def on_headers_complete(self) -> None:
        """Leave the rest of the request to bodies.py."""
        self._headers_begun = False
        self._headers_bytes = 0
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """Limit the time in which the client must read what is sent already."""
        super().pause_writing()
        size = self.transport.get_write_buffer_size()
        seconds = RESPONSE_SECONDS + size / MIN_BYTES_PER_SECOND
        self._response_timer = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """End the limit: the client has read."""
        super().resume_writing()
        if self._response_timer is not None:
            self._response_timer.cancel()
            self._response_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._answer(ApiError(400, "The request is no valid HTTP.", code="invalid_http"))

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_headers(self) -> None:
        if self._headers_timer is None and not self.transport.is_closing():
            self._headers_timer = self.loop.call_later(HEADERS_SECONDS, self._end_headers)

    def _end_headers(self) -> None:
        """End the connection because no headers came in time."""
        self._headers_timer = None
        if self._is_answering:  # the next request begins early; its limit follows the response
            self._expect_headers()
        elif self._headers_begun:
            text = f"The headers took longer than {HEADERS_SECONDS:g} s. Send the request again."
            self._answer(ApiError(408, text, code="request_timeout"))
        else:
            self.transport.close()

    def _answer(self, error: ApiError) -> None:
        """Send an error without the application, and close the connection."""
        content = json.dumps(error.body).encode()
        lines = [
            STATUS_LINE[error.status],
            b"content-type: application/json\r\n",
            b"content-length: %d\r\n" % len(content),
            b"%s: %s\r\n" % (REQUEST_ID, secrets.token_hex(16).encode()),
            b"connection: close\r\n\r\n",
            content,
        ]
        self.transport.write(b"".join(lines))
        self.transport.close()
