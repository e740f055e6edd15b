"""The HTTP application: OpenAI's chat completions over one model."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from evlgen.common.errors import EVLGenError
from evlgen.serving import protocol
from evlgen.serving.answering import Answer, Answerer, Ask
from evlgen.serving.batching import Batcher
from evlgen.serving.bodies import BodyReader, drain
from evlgen.serving.errors import Refusal
from evlgen.serving.fetching import Fetcher
from evlgen.serving.limits import Limits
from evlgen.serving.metrics import Metrics
from evlgen.serving.uploads import decode, from_data_url

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_BEAMS = 5  # as `evlgen caption` has them
DEFAULT_TOKENS = 30
_LEFT = 499  # nginx's status of a client that left before its answer
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class Service:
    """One model behind a queue.

    Args:
        answerer: the model.
        name: what clients call the model.
        limits: see `Limits`.
        api_key: what clients have to send; None: nothing.
        fetcher: for http(s) addresses of images; None: those are refused.
        num_beams: of the search where a request does not say.
        local_only: requests must be addressed to this machine by name, so that no web page open in a
            browser here reaches the server under a name of its own.
    """

    def __init__(
        self,
        answerer: Answerer,
        name: str,
        limits: Limits | None = None,
        api_key: str | None = None,
        fetcher: Fetcher | None = None,
        num_beams: int = DEFAULT_BEAMS,
        local_only: bool = False,
    ) -> None:
        self.answerer, self.name, self.api_key, self.fetcher = answerer, name, api_key, fetcher
        self.limits = limits or Limits()
        self.num_beams, self.local_only = num_beams, local_only
        self.metrics = Metrics(lambda: self.batcher.num_waiting)
        self.batcher = Batcher(
            answerer.answer, self.limits.max_batch, self.limits.max_wait, self.metrics.observe_batch
        )
        self.bodies = BodyReader(self.limits)
        self._decoders = ThreadPoolExecutor(self.limits.decoders, "images")
        self._admitted = 0
        self._started = int(time.time())

    async def check_access(self, request: Request) -> None:
        """Raises `Refusal` for a request without the key, or addressed to another host."""
        if self.local_only:
            host = request.headers.get("host", "")
            if host.rpartition(":")[0] not in _LOCAL_HOSTS and host not in _LOCAL_HOSTS:
                raise Refusal(403, "this server answers requests to localhost only.", "wrong_host")
        if self.api_key is None:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            raise Refusal(401, "send the API key: Authorization: Bearer KEY.", "invalid_api_key")

    def models(self) -> list[dict[str, Any]]:
        """The entry of ``/v1/models``."""
        return [{"id": self.name, "object": "model", "created": self._started, "owned_by": "evlgen"}]

    def check_name(self, name: str) -> None:
        """Raises `Refusal` for a model that is not served."""
        if name != self.name:
            raise Refusal(
                404,
                f"the model '{name[:80]}' is not served here: '{self.name}' is.",
                "model_not_found",
                "model",
            )

    async def complete(self, request: Request) -> Response:
        """Answers one request for texts."""
        started = time.monotonic()
        try:
            with contextlib.ExitStack() as place:
                place.enter_context(self._counting())
                place.enter_context(self._admission())
                asked, ask = await self._receive(request)
                if asked.stream:
                    return await self._stream(request, asked, ask, started, place.pop_all())
                answer = await self._answer(request, ask, started)
            name = _new_name()
            content = (name, self.name, answer.prompt_tokens, answer.texts, asked.stops)
            return JSONResponse(protocol.completion(*content))
        except Refusal as refusal:
            if refusal.code == "queue_full":
                await drain(request, self.limits)
            raise

    async def _answer(self, request: Request, ask: Ask, started: float) -> Answer:
        answer = await self._while_there(request, self.batcher.answer(ask), self.limits.seconds)
        self.metrics.seconds.observe(time.monotonic() - started)
        self.metrics.tokens.labels("read").inc(answer.prompt_tokens)
        self.metrics.tokens.labels("written").inc(sum(text.num_tokens for text in answer.texts))
        return answer

    async def _stream(
        self,
        request: Request,
        asked: protocol.ChatRequest,
        ask: Ask,
        started: float,
        place: contextlib.ExitStack,
    ) -> Response:
        """The answer as server-sent events, as it is written. What fails before its first words is refused as
        without a stream, what fails later is its last event.

        Args:
            place: in the server, and in its counts; it is held until the answer is there.
        """
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        chunks = protocol.Chunks(_new_name(), self.name, ask.decoding.num_captions, asked.stops, with_usage)
        written: asyncio.Queue[list[dict[str, Any]] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def write(so_far: list[str]) -> None:
            written.put_nowait(list(chunks.more(so_far)))

        async def answer_it() -> Answer:
            with place:
                try:
                    answer = await self._answer(request, ask, started)
                    if not chunks.continue_to(answer.texts):
                        raise Refusal(500, "the text was begun anew: ask again.", "internal_error")
                    return answer
                finally:
                    written.put_nowait(None)

        ask = dataclasses.replace(ask, on_texts=lambda so_far: _call_threadsafe(loop, write, so_far))
        work = asyncio.ensure_future(answer_it())
        work.add_done_callback(_retrieve_error)
        first = await written.get()
        if first is None:
            await work

        async def pieces() -> AsyncIterator[dict[str, Any]]:
            for piece in chunks.begin():
                yield piece
            more = first
            while more is not None:
                for piece in more:
                    yield piece
                more = await written.get()
            try:
                answer = await work
            except ClientDisconnect:
                raise
            except (Refusal, EVLGenError) as error:
                refusal = _as_refusal(error)
                self.metrics.refusals.labels(refusal.code).inc()
                yield refusal.body()
            except Exception:
                logger.exception("a stream failed")
                yield _failure().body()
            else:
                for piece in chunks.end(answer.prompt_tokens, answer.texts):
                    yield piece

        async def events() -> AsyncIterator[str]:
            with contextlib.suppress(ClientDisconnect):
                async for piece in pieces():
                    yield f"data: {json.dumps(piece)}\n\n"
                yield "data: [DONE]\n\n"

        return StreamingResponse(
            events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Counts a request by the status that the block ends with."""
        status = 500
        try:
            yield
            status = 200
        except (Refusal, EVLGenError) as error:
            status = _as_refusal(error).status
            raise
        except ClientDisconnect:
            status = _LEFT
            raise
        finally:
            self.metrics.requests.labels(str(status)).inc()

    @contextlib.contextmanager
    def _admission(self) -> Iterator[None]:
        """A place in the server, for as long as the block runs."""
        if self._admitted >= self.limits.queue + self.limits.max_batch:
            raise Refusal(429, "too many requests are waiting: try again.", "queue_full", retry_after=1)
        if not self.batcher.is_alive:
            raise Refusal(503, "the server is stopping.", "stopping", retry_after=5)
        self._admitted += 1
        self.metrics.admitted.inc()
        try:
            yield
        finally:
            self._admitted -= 1
            self.metrics.admitted.dec()

    async def _receive(self, request: Request) -> tuple[protocol.ChatRequest, Ask]:
        """What a request asks for, its image as pixels. Its bytes are gone afterwards."""
        with self.bodies.holding() as held:
            asked = protocol.read_request(await held.read(request), self.limits)
            self.check_name(asked.model)
            what = protocol.what_is_asked(asked.messages, self.limits, self.answerer.only_turns)
            asked.messages.clear()
            decoding, seed = self._how(asked, what)
            loop = asyncio.get_running_loop()
            images = []
            for url in what.images:
                data, media_type = await self._bytes_of(request, url)
                decoding_it = loop.run_in_executor(self._decoders, self._pixels, data, media_type)
                images.append(await self._while_there(request, decoding_it, self.limits.seconds))
        is_caption = what.text is None and what.turns is None
        consensus = self.answerer.consensus(decoding) if is_caption else 0
        return asked, Ask(images, what.text, decoding, seed, what.turns, consensus=consensus)

    def _pixels(self, data: bytes, media_type: str):
        return self.answerer.pixels(decode(data, media_type, self.limits.image_pixels))

    async def _bytes_of(self, request: Request, url: str) -> tuple[bytes, str]:
        if url[:5].lower() == "data:":
            return from_data_url(url)
        if url[:5].lower().startswith("http"):
            if self.fetcher is None:
                raise Refusal(
                    400,
                    "this server reads no images from addresses: send data:image/jpeg;base64,....",
                    "image_url_refused",
                    "messages",
                )
            return await self._while_there(request, self.fetcher.fetch(url), self.limits.seconds)
        raise Refusal(
            400, "image_url.url must be a data URL or an http(s) address.", "invalid_image_url", "messages"
        )

    def _how(self, asked: protocol.ChatRequest, what: protocol.Asked):
        """How the texts are chosen, and the seed: by search, or by sampling where a request sets a
        temperature above 0 (or ``top_p`` and no temperature)."""
        count = asked.n or 1
        samples = asked.temperature > 0 if asked.temperature is not None else asked.top_p is not None
        options: dict[str, Any] = {
            "num_captions": count,
            "max_length": asked.max_new_tokens or self._most(what),
        }
        if samples:
            options |= {
                "use_nucleus_sampling": True,
                "num_beams": 1,
                "top_p": asked.top_p or 1.0,
                "temperature": asked.temperature or 1.0,
            }
        else:
            options["num_beams"] = max(asked.num_beams or self.num_beams, count)
        decoding = self.answerer.decoding(
            what.text is not None,
            repetition_penalty=asked.repetition_penalty,
            length_penalty=asked.length_penalty if options["num_beams"] > 1 else 1.0,
            **options,
        )
        return decoding, asked.seed if samples else None

    def _most(self, what: protocol.Asked) -> int:
        """New tokens at most, where a request does not say."""
        most = DEFAULT_TOKENS if what.turns is None else self.answerer.most_tokens
        return min(most, self.limits.max_tokens)

    async def _while_there(self, request: Request, work: Awaitable[T], seconds: float) -> T:
        """The result of ``work``, which is cancelled when the client leaves or the time is over.

        Raises:
            ClientDisconnect: the client left.
            Refusal: the time is over.
        """
        task = asyncio.ensure_future(work)
        left = asyncio.ensure_future(_leaving(request))
        both: set[asyncio.Future[Any]] = {task, left}
        try:
            done, _ = await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task in done:
                return task.result()
            if left in done:
                raise ClientDisconnect
            raise Refusal(504, f"no answer within {seconds:g} seconds.", "timeout")
        finally:
            task.cancel()
            left.cancel()


def _new_name() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _failure() -> Refusal:
    return Refusal(500, "the server failed; its log says why.", "internal_error")


def _as_refusal(error: Refusal | EVLGenError) -> Refusal:
    """An error of the model is one of the request: it does not fit the model."""
    return error if isinstance(error, Refusal) else Refusal(400, str(error), "invalid_request")


def _retrieve_error(work: asyncio.Future[Any]) -> None:
    """Keeps asyncio from logging the error of work whose client has left."""
    if not work.cancelled():
        work.exception()


def _call_threadsafe(loop: asyncio.AbstractEventLoop, call: Callable[[T], None], argument: T) -> None:
    """Calls in the thread of a loop, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(call, argument)


async def _leaving(request: Request) -> None:
    """Returns when the client leaves. The body has been read: nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(service: Service) -> FastAPI:
    """The application of a service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, service.batcher.stop)

    app = FastAPI(title="EVLGen", openapi_url=None, lifespan=lifespan)
    private = [Depends(service.check_access)]

    @app.get("/health")
    async def health() -> Response:
        is_alive = service.batcher.is_alive
        return JSONResponse({"status": "ok" if is_alive else "stopping"}, 200 if is_alive else 503)

    @app.get("/metrics", dependencies=private)
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=service.metrics.content_type)

    @app.get("/v1/models", dependencies=private)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": service.models()})

    @app.get("/v1/models/{name:path}", dependencies=private)
    async def model(name: str) -> Response:
        service.check_name(name)
        return JSONResponse(service.models()[0])

    @app.post("/v1/chat/completions", dependencies=private)
    async def chat_completions(request: Request) -> Response:
        try:
            return await service.complete(request)
        except EVLGenError as error:
            raise _as_refusal(error) from error
        except ClientDisconnect:
            return Response(status_code=_LEFT)

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        service.metrics.refusals.labels(refusal.code).inc()
        headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if refusal.status in (408, 413):  # the rest of the request may still come
            headers["Connection"] = "close"
        return JSONResponse(refusal.body(), refusal.status, headers)

    @app.exception_handler(HTTPException)
    async def not_found(_: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, f"{error.detail}.", "not_found")
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse(_failure().body(), 500)

    return app
