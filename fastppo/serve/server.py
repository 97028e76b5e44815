"""The HTTP side: a Starlette application, and the thread in which uvicorn runs it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from importlib.util import find_spec
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from fastppo.serve.answer import Answer, event
from fastppo.serve.request import RequestError, read_request
from fastppo.serve.ticket import Begun, Done, Piece, Ticket

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LOOPBACK = "127.0.0.1"
START_SECONDS = 10.0  # that a server may take to listen
CLOSE_SECONDS = 1  # that open connections may take to end when it closes

Admit = Callable[[str], Any]
"""The API key of a request ("" where it has none) -> whose it is, None where it is nobody's."""


class ChatServer:
    """Listens from `open` to `close` and puts what is asked into `inbox`; whoever takes a ticket from there tells it `Begun` and what follows, or
    a RequestError.

    Args:
        model: the name of the policy.
        inbox: where tickets go.
        admit: called in the server's thread.

    Raises ImportError where starlette or uvicorn is missing.
    """

    def __init__(self, model: str, inbox: SimpleQueue[Any], admit: Admit) -> None:
        if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
            raise ImportError(f"serving needs {' and '.join(missing)}: pip install fastppo[serve]")
        self._model, self._inbox, self._admit = model, inbox, admit
        self._started = int(time.time())
        self._server: Any = None
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def open(self, host: str = LOOPBACK, port: int = 0) -> str:
        """Begin to listen. Returns the base URL. port: 0 takes a free one.

        Raises OSError where the address cannot be had.
        """
        import uvicorn

        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((host, port), family=family, backlog=1024)
        config = uvicorn.Config(
            self.application(),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="fastppo server", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        if not self._server.started:
            self.close()
            raise OSError(f"the server at {host} did not begin within {START_SECONDS:g} s")
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self._socket.getsockname()[1]}/v1"

    def close(self) -> None:
        """Stop to listen, and end the thread."""
        if self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self._server = self._thread = self._socket = None

    def application(self) -> Starlette:
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        handlers = {RequestError: self._refused, 404: self._no_such_path, 405: self._no_such_path}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _models(self, request: Request) -> Response:
        self._owner(request)
        model = {"id": self._model, "object": "model", "created": self._started, "owned_by": "fastppo"}
        return _json({"object": "list", "data": [model]})

    async def _chat(self, request: Request) -> Response:
        owner = self._owner(request)
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON that can be read: {error}") from error
        ticket = Ticket(read_request(body), owner, asyncio.get_running_loop())
        self._inbox.put(ticket)
        answer = Answer(ticket.request, self._model)
        watch = asyncio.create_task(_wait_for_end(request))
        try:
            await _next(ticket, watch)  # an error comes as its status, also where a stream was asked for
            if ticket.request.stream:
                from starlette.responses import StreamingResponse

                return StreamingResponse(_stream(ticket, answer), media_type="text/event-stream")
            while not isinstance(said := await _next(ticket, watch), Done):
                pass
            return _json(answer.whole(said))
        finally:
            watch.cancel()

    def _owner(self, request: Request) -> Any:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = self._admit(key.strip() if scheme.lower() == "bearer" else "")
        if owner is None:
            raise RequestError("the API key is not valid here", code="invalid_api_key", status=401)
        return owner

    async def _refused(self, request: Request, error: RequestError) -> Response:
        return _json(error.body(), error.status)

    async def _no_such_path(self, request: Request, error: Exception) -> Response:
        known = "GET /v1/models and POST /v1/chat/completions"
        refused = RequestError(f"there is no {request.method} {request.url.path}, only {known}", status=404)
        return _json(refused.body(), refused.status)


async def _next(ticket: Ticket, watch: asyncio.Task[None]) -> Begun | Piece | Done:
    """What the ticket is told next. Raises RequestError where it is refused, or the client has gone."""
    heard = asyncio.create_task(ticket.events.get())
    try:
        await asyncio.wait({heard, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not heard.done():
            heard.cancel()
            ticket.gone = True
    if ticket.gone:
        raise RequestError("the client has closed the connection", status=499)
    if isinstance(said := heard.result(), RequestError):
        raise said
    return said


async def _wait_for_end(request: Request) -> None:
    """Until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(ticket: Ticket, answer: Answer) -> AsyncIterator[str]:
    """Server-sent events. Starlette cancels it when the client closes the connection."""
    whole = False
    try:
        for chunk in answer.first_chunks():
            yield chunk
        while not whole:
            said = await ticket.events.get()
            if isinstance(said, Piece):
                yield answer.chunk(said)
            elif isinstance(said, Done):
                whole = True
                for chunk in answer.last_chunks(said):
                    yield chunk
            elif isinstance(said, RequestError):
                whole = True
                yield event(said.body())
    finally:
        ticket.gone = ticket.gone or not whole


def _json(body: dict[str, Any], status: int = 200) -> Response:
    """Errors say that the same request would fail again: clients repeat those of the server's by default."""
    from starlette.responses import JSONResponse

    return JSONResponse(body, status, headers={"x-should-retry": "false"} if status >= 400 else None)
