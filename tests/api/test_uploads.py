"""The multipart parser: bytes reach the sinks as they come, whatever way the body is cut up."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters_store.errors import UploadTooLarge
from loramux.server.api.errors import APIError
from loramux.server.api.uploads import PIECE_BYTES, Form, receive_form

pytestmark = pytest.mark.anyio

TYPE = "multipart/form-data; boundary=cut"


class Memory:
    """A sink that keeps everything, up to a limit."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.data = b""
        self.limit = limit
        self.closed = 0

    def write(self, data: bytes) -> None:
        self.data += data
        if len(self.data) > self.limit:
            raise UploadTooLarge("too large", code="upload_too_large", field="files")

    def close(self) -> None:
        self.closed += 1


def body_of(files: dict[str, bytes], **fields: str) -> bytes:
    """A multipart body."""
    out = b""
    for name, value in fields.items():
        out += f'--cut\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    for name, data in files.items():
        out += (
            f'--cut\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
            + data
            + b"\r\n"
        )
    return out + b"--cut--\r\n"


async def receive(chunks: list[bytes], sinks: dict[str, Memory]) -> Form:
    """Feeds the chunks; files get a sink of their own unless there is one."""

    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    with ThreadPoolExecutor(1) as executor:
        return await receive_form(stream(), TYPE, lambda name: sinks.setdefault(name, Memory()), executor)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300).map(lambda raw: raw + b"\r\n--cu"), cuts=st.lists(st.integers(0, 600), max_size=12))
def test_any_way_of_cutting_gives_the_same(data: bytes, cuts: list[int]) -> None:
    whole = body_of({"a": data, "b": b""}, name="skill", description="é, ü")
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    sinks: dict[str, Memory] = {}
    form = asyncio.run(receive([whole[i:j] for i, j in pairwise(edges)], sinks))
    assert (form.name, form.description, form.examples) == ("skill", "é, ü", None)
    assert {name: sink.data for name, sink in sinks.items()} == {"a": data, "b": b""}
    assert all(sink.closed == 1 for sink in sinks.values())


async def test_files_are_not_buffered_whole() -> None:
    sink = Memory()
    piece = b"x" * (PIECE_BYTES // 4)
    behind: list[int] = []

    async def stream() -> AsyncIterator[bytes]:
        yield body_of({"w": b""}, name="skill").removesuffix(b"\r\n--cut--\r\n")
        for sent in range(1, 41):
            yield piece
            behind.append(sent * len(piece) - len(sink.data))
        yield b"\r\n--cut--\r\n"

    with ThreadPoolExecutor(1) as executor:
        form = await receive_form(stream(), TYPE, lambda name: sink, executor)
    assert form.files == ["w"]
    assert len(sink.data) == 40 * len(piece)
    assert max(behind) <= PIECE_BYTES + len(piece)


async def test_a_refusing_sink_ends_the_upload() -> None:
    sinks = {"w": Memory(limit=10)}
    with pytest.raises(UploadTooLarge):
        await receive([body_of({"w": b"x" * 100}, name="skill")], sinks)
    assert sinks["w"].closed == 1


async def test_a_body_that_breaks_off_closes_its_file() -> None:
    sinks: dict[str, Memory] = {}
    with pytest.raises(APIError, match="incomplete"):
        await receive([body_of({"w": b"x" * 100}, name="skill")[:-30]], sinks)
    assert sinks["w"].closed == 1


async def test_a_client_that_leaves_closes_its_file() -> None:
    sink = Memory()
    started = asyncio.Event()

    async def stream() -> AsyncIterator[bytes]:
        yield body_of({"w": b"x" * PIECE_BYTES}, name="skill")[:-30]
        started.set()
        await asyncio.sleep(3600)

    with ThreadPoolExecutor(1) as executor:
        task = asyncio.create_task(receive_form(stream(), TYPE, lambda name: sink, executor))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert sink.closed == 1
