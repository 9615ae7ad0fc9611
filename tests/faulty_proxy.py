"""A TCP proxy on the loopback address that can be told to misbehave, to put between a client and a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\nConnection: close\r\n\r\noops"


class FaultyProxy:
    """`mode` holds for connections made after it was set; setting it ends those that are open.

    pass        hands everything on, each piece `latency_s` later
    refuse      nobody listens
    blackhole   takes the request and never answers
    reset       resets the connection at once
    500         answers every request with that
    cut         hands on the first `n_bytes` of a connection, then resets it
    lose        hands a request that contains `pattern` on and resets the connection instead of handing back the reply
    """

    def __init__(self, port: int) -> None:
        self.target = ("127.0.0.1", port)
        self.latency_s, self.n_bytes, self.pattern = 0.0, 0, b""
        self.lost = self.refused = 0
        self._mode = "pass"
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server: asyncio.Server | None = None
        self.port = 0
        self._do(self._listen())

    def set(self, mode: str, latency_s: float = 0.0, n_bytes: int = 0, pattern: bytes = b"") -> None:
        self.latency_s, self.n_bytes, self.pattern = latency_s, n_bytes, pattern
        self._do(self._change(mode))

    def close(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _do(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _change(self, mode: str) -> None:
        self._mode = mode
        for writer in list(self._open):
            writer.transport.abort()
        if mode == "refuse" and self._server:
            self._server.close()
            self._server = None
        elif mode != "refuse" and not self._server:
            await self._listen()

    async def _end(self) -> None:
        await self._change("refuse")
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        back: asyncio.StreamWriter | None = None
        try:
            if self._mode == "reset":
                return
            if self._mode == "blackhole":
                while await reader.read(65536):
                    pass
                return
            if self._mode == "500":
                self.refused += 1
                await reader.read(65536)
                writer.write(BROKEN)
                await writer.drain()
                writer.close()
                return
            answers, back = await asyncio.open_connection(*self.target)
            doomed = asyncio.Event()
            tasks = [asyncio.create_task(self._requests(reader, back, doomed))]
            tasks += [asyncio.create_task(self._replies(answers, writer, doomed))]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        except OSError:
            pass  # one of the two has gone: so does the other
        finally:
            self._open.discard(writer)
            for end in (writer, back):
                if end and not (end is writer and end.is_closing()):
                    end.transport.abort()

    async def _requests(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, doomed: asyncio.Event) -> None:
        seen = 0
        while piece := await reader.read(4096):
            await asyncio.sleep(self.latency_s)
            if self._mode == "cut" and seen + len(piece) > self.n_bytes:
                back.write(piece[: self.n_bytes - seen])
                await back.drain()
                return
            seen += len(piece)
            if self._mode == "lose" and self.pattern in piece:
                doomed.set()
            back.write(piece)
            await back.drain()

    async def _replies(self, answers: asyncio.StreamReader, writer: asyncio.StreamWriter, doomed: asyncio.Event) -> None:
        while piece := await answers.read(65536):
            await asyncio.sleep(self.latency_s)
            if doomed.is_set():
                self.lost += 1
                return
            writer.write(piece)
            await writer.drain()
