"""The constraint that a request names, tried where it can do no harm.

That is one process apart (`engine.grammar_worker`), started when it is first needed, killed and replaced when a job
takes too much time, memory or stack. What was found is kept, refusals too, so that a schema that recurs costs nothing,
and neither does a bomb. Jobs are done one at a time, and no tenant has two in the line.
"""

import asyncio
import hashlib
import json
import signal
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from weakref import WeakValueDictionary

from loramux.server.engine.grammar_worker import EXIT_FAILED, Setup
from loramux.server.engine.grammars import ConstraintError
from loramux.server.engine.protocol import Constraint

JOB_SECONDS = 2.0
JOB_BYTES = 256 << 20
WAIT_SECONDS = 30.0
MAX_KEPT = 256
MAX_ANSWER_BYTES = 4 << 20


class WorkerLostError(Exception):
    """The process ended, or did not answer, for a reason that is not the constraint's: the same may work later."""


@dataclass(frozen=True, slots=True)
class Model:
    """What constraints depend on besides their own text: see `engine.grammars.make_tokenizer`."""

    definition: bytes
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class GrammarCheck:
    """One per server. A job gets `seconds` of processor time and `memory` bytes; `kept` results are remembered.

    A caller waits `wait` seconds for its turn, and as long for the answer.

    `process` does the jobs while there is one, `jobs` is how many it was given.
    """

    def __init__(
        self,
        *,
        seconds: float = JOB_SECONDS,
        memory: int = JOB_BYTES,
        wait: float = WAIT_SECONDS,
        kept: int = MAX_KEPT,
    ) -> None:
        self._seconds, self._memory, self._wait, self._max_kept = seconds, memory, wait, kept
        self._kept: OrderedDict[bytes, Constraint | str] = OrderedDict()
        self.process: asyncio.subprocess.Process | None = None
        self.jobs = 0
        self._turn = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._unsupported: str | None = None
        too_large = "it needs too much memory, or is nested too deeply; send a smaller one"
        self._reasons = {
            -signal.SIGPROF: f"it takes more than {seconds:g} s to compile; send a simpler one",
            **dict.fromkeys((-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, EXIT_FAILED), too_large),
        }

    async def check(self, constraint: Constraint, model: Model, tenant: str = "") -> Constraint:
        """The constraint as the engine takes it (a grammar in GBNF has become one in Lark).

        Raises ConstraintError when it cannot be compiled within the bounds, and `WorkerLostError`.
        """
        key = hashlib.blake2b(f"{constraint.kind}:{constraint.text}".encode(), digest_size=16).digest()
        found = self._known(key)
        if found is None:
            async with self._in_turn(tenant):
                found = self._known(key) or await self._job(constraint, model)
                self._kept[key] = found
                while len(self._kept) > self._max_kept:
                    self._kept.popitem(last=False)
        if isinstance(found, str):
            raise ConstraintError(found)
        return found

    async def stop(self) -> None:
        """Ends the process."""
        process, self.process = self.process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _known(self, key: bytes) -> Constraint | str | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    @asynccontextmanager
    async def _in_turn(self, tenant: str) -> AsyncIterator[None]:
        """The process is the caller's: after what the tenant asked for before, then after one job of each other.

        Raises `WorkerLostError` when that takes too long.
        """
        own = self._turns.setdefault(tenant, asyncio.Lock())
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(self._wait):
                    await held.enter_async_context(own)
                    await held.enter_async_context(self._turn)
            except TimeoutError:
                raise WorkerLostError(f"others were tried for {self._wait:g} s") from None
            yield

    async def _job(self, constraint: Constraint, model: Model) -> Constraint | str:
        """The constraint as the engine takes it, or why it does not. A job that is given up ends the process."""
        self.jobs += 1
        async with AsyncExitStack() as unless_done:
            unless_done.push_async_callback(self.stop)
            if self.process is None and self._unsupported is None:
                await self._start(model)
            if self._unsupported is not None:
                return self._unsupported
            process = self.process
            assert process is not None
            answer = await self._ask(process, json.dumps([constraint.kind, constraint.text]).encode() + b"\n")
            if answer is None:
                code = await process.wait()
                if code not in self._reasons:
                    raise WorkerLostError(f"the process that compiles grammars ended with status {code}")
                return self._reasons[code]
            unless_done.pop_all()
        error, text = answer
        if error is not None:
            return error
        return constraint if text is None else Constraint(constraint.kind, text)

    async def _start(self, model: Model) -> None:
        """A process that knows the tokenizer, unless it says that it can do nothing with it."""
        process = self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "loramux.server.engine.grammar_worker", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,  # a panic's words are a client's
            start_new_session=True, limit=MAX_ANSWER_BYTES,
        )  # fmt: skip
        setup = Setup(len(model.definition), model.vocab_size, model.eos_token_ids, self._seconds, self._memory)
        answer = await self._ask(process, setup.encode() + model.definition)
        if answer is None:
            raise WorkerLostError(f"the process that compiles grammars ended with status {await process.wait()}")
        self._unsupported, _ = answer

    async def _ask(self, process: asyncio.subprocess.Process, request: bytes) -> tuple[str | None, str | None] | None:
        """The answer's error and text; None when the process ended instead. Raises `WorkerLostError` for silence."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._wait):
                with suppress(BrokenPipeError, ConnectionResetError):
                    process.stdin.write(request)
                    await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError:
            raise WorkerLostError(f"no answer in {self._wait:g} s") from None
        if not line.endswith(b"\n"):
            return None
        answer = json.loads(line)
        return answer["error"], answer["text"]
