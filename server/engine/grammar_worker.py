"""A process that tries constraints and may be killed: no thread that compiles a grammar can be stopped.

Started as `python -m loramux.server.engine.grammar_worker`. Standard input brings one line of JSON (`Setup`), so many
bytes of a tokenizer, and then a constraint as [kind, text] per line; each, the tokenizer included, is answered by a
line {"error": text or null, "text": a grammar in Lark where it came in GBNF}. A job that needs more processor time than
`seconds` ends the process by SIGPROF, one that needs more memory than `memory` or more stack than the engine's threads
have ends it, too. It ends when standard input closes.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from loramux.server.engine.grammars import ConstraintError, compile_constraint, lark_of, make_tokenizer
from loramux.server.engine.protocol import Constraint

STACK_BYTES = 4 << 20
"""Half of what a thread of the engine has: what is compiled here does not overflow the stack there."""
NICENESS = 5
EXIT_FAILED = 3
"""The process's status when a job fails in a way that nobody foresaw: no memory for a Python object, a panic."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The size of the tokenizer's definition in bytes, what else it depends on, and what a job may use.

    `seconds` of processor time, `memory` bytes of address space beyond what the process has before its first job.
    """

    definition_bytes: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    seconds: float
    memory: int

    def encode(self) -> bytes:
        """The line that opens the conversation."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> "Setup":
        """The inverse of `encode`."""
        values: dict[str, Any] = json.loads(line)
        return cls(**{**values, "eos_token_ids": tuple(values["eos_token_ids"])})


def bound_memory(extra: int) -> None:
    """Allows the process so many bytes of address space more, where the system can say what it has now."""
    with contextlib.suppress(ImportError, OSError):  # no such limit outside Unix, no such file outside Linux
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + extra
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answers until the requests end."""

    def answer(error: str | None, text: str | None = None) -> None:
        answers.write(json.dumps({"error": error, "text": text}).encode() + b"\n")
        answers.flush()

    setup = Setup.decode(requests.readline())
    definition = requests.read(setup.definition_bytes).decode()
    try:
        tokenizer = make_tokenizer(definition, setup.vocab_size, setup.eos_token_ids)
    except ConstraintError as error:
        answer(str(error))
        return
    del definition
    bound_memory(setup.memory)
    answer(None)
    for line in requests:
        constraint = Constraint(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, setup.seconds)
        try:
            lark = lark_of(constraint.text) if constraint.kind == "lark" else constraint.text
            compile_constraint(tokenizer, replace(constraint, text=lark))
        except ConstraintError as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            answer(str(error))
        else:
            signal.setitimer(signal.ITIMER_PROF, 0)
            answer(None, None if lark == constraint.text else lark)


def _serve_or_exit() -> None:
    """What the thread does: an exception in it would end the thread alone."""
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except BaseException:
        os._exit(EXIT_FAILED)


def main() -> None:
    """The process's body."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to the whole group by terminals; the API ends this process
    os.nice(NICENESS)
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve_or_exit)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
