"""Decides `re.match(rf"(.*\\.)?({key})$", module)`, PEFT's rule for `alpha_pattern`, in bounded time.

The keys are regular expressions chosen by whoever uploads, and `re` backtracks. Here they are compiled to an automaton
that reads each character once (Thompson, 1968), so a match costs at most len(module) times the number of states, and
every step is counted. Understood are literals, `.`, escapes, `[...]`, groups, `|`, `*`, `+`, `?`, `{m,n}` (lazy forms
too: only whether it matches is asked), `^` and `$`. Look-around, back-references and flags are refused.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

_MAX_STATES = 4_000
_STEPS_PER_STATE = 20
_MAX_REPEAT = 200
_MAX_KEY_CHARS = 1_000
_MAX_DEPTH = 20
_LITERAL = re.compile(r"(?:[A-Za-z0-9_.-]|\\\.)*")
_COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}(?<!\{\})")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}

Test = Callable[[str], bool]


class PatternError(ValueError):
    """A key that is not understood, or that takes too much work; the message says which."""


@dataclass(slots=True)
class Budget:
    """Steps that may still be spent."""

    steps: int

    def spend(self, steps: int) -> None:
        """Raises `PatternError` when the budget is used up."""
        self.steps -= steps
        if self.steps < 0:
            raise PatternError("matching it takes too long")


@dataclass(slots=True)
class _State:
    """One automaton state: `test` consumes a character; without it `nexts` are free moves, guarded by `anchor`."""

    test: Test | None = None
    anchor: str = ""
    nexts: list[int] = field(default_factory=list)


class Pattern:
    """One key. `matches(module)` says whether PEFT would apply the key to that module."""

    def __init__(self, key: str, budget: Budget) -> None:
        """Raises `PatternError` for what is not understood; every state costs, as it takes memory."""
        self.key = key
        self._literal = key.replace("\\.", "\0") if _LITERAL.fullmatch(key) else None
        if self._literal is None:
            self._states, self._start, self._final = _Compiler(key).compile()
            budget.spend(_STEPS_PER_STATE * len(self._states))

    def matches(self, module: str, budget: Budget) -> bool:
        """Whether `(.*\\.)?(key)$` matches the module path."""
        if self._literal is not None:
            return self._matches_literal(self._literal, module, budget)
        budget.spend(1)
        starts = [0, *(i + 1 for i, c in enumerate(module) if c == ".")]
        return self._run(module, starts, budget)

    @staticmethod
    def _matches_literal(literal: str, module: str, budget: Budget) -> bool:
        """A key of plain characters: `.` stands for any character, NUL for a dot that was escaped."""
        budget.spend(1)
        start = len(module) - len(literal)
        if start < 0 or (start and module[start - 1] != "."):
            return False
        tail = module[start:]
        return all(k == "." or k == c or (k == "\0" and c == ".") for k, c in zip(literal, tail, strict=True))

    def _run(self, text: str, starts: Sequence[int], budget: Budget) -> bool:
        """Simulates the automaton from every start at once; True when it is final at the end of the text."""
        begin_at = set(starts)
        current: set[int] = set()
        for position in range(len(text) + 1):
            if position in begin_at:
                current.add(self._start)
            current = self._free_moves(current, position, len(text), budget)
            if position == len(text):
                return self._final in current
            budget.spend(len(current) + 1)
            moved: set[int] = set()
            for number in current:
                state = self._states[number]
                if state.test is not None and state.test(text[position]):
                    moved.update(state.nexts)
            current = moved
        return False

    def _free_moves(self, current: set[int], position: int, length: int, budget: Budget) -> set[int]:
        seen = set(current)
        stack = list(current)
        while stack:
            budget.spend(1)
            state = self._states[stack.pop()]
            if state.test is not None:
                continue
            if (state.anchor == "^" and position != 0) or (state.anchor == "$" and position != length):
                continue
            fresh = [n for n in state.nexts if n not in seen]
            seen.update(fresh)
            stack.extend(fresh)
        return seen


class _Compiler:
    """Recursive descent over the key; every method returns the (entry, exit) states of the piece it read."""

    def __init__(self, key: str) -> None:
        if len(key) > _MAX_KEY_CHARS:
            raise PatternError(f"it is longer than {_MAX_KEY_CHARS} characters")
        self._key = key
        self._at = 0
        self._depth = 0
        self._states: list[_State] = []

    def compile(self) -> tuple[list[_State], int, int]:
        start, final = self._alternatives()
        if self._at < len(self._key):
            self._refuse("an unmatched `)`")
        return self._states, start, final

    def _refuse(self, what: str) -> NoReturn:
        raise PatternError(f"{what} at character {self._at + 1}")

    def _new(self, test: Test | None = None, anchor: str = "") -> int:
        if len(self._states) >= _MAX_STATES:
            raise PatternError("it is too complex")
        self._states.append(_State(test, anchor))
        return len(self._states) - 1

    def _link(self, source: int, target: int) -> None:
        self._states[source].nexts.append(target)

    def _peek(self) -> str:
        return self._key[self._at] if self._at < len(self._key) else ""

    def _take(self) -> str:
        char = self._peek()
        if not char:
            self._refuse("an unfinished expression")
        self._at += 1
        return char

    def _alternatives(self) -> tuple[int, int]:
        start, end = self._new(), self._new()
        while True:
            first, last = self._sequence()
            self._link(start, first)
            self._link(last, end)
            if self._peek() != "|":
                return start, end
            self._at += 1

    def _sequence(self) -> tuple[int, int]:
        start = end = self._new()
        while self._peek() not in ("", "|", ")"):
            first, last = self._repeated()
            self._link(end, first)
            end = last
        return start, end

    def _repeated(self) -> tuple[int, int]:
        begin = self._at
        first, last = self._atom()
        bounds = self._bounds()
        if bounds is None:
            return first, last
        low, high = bounds
        if self._peek() == "?":
            self._at += 1  # lazy: the same set of strings
        if self._peek() in ("*", "+", "?") or _COUNTED.match(self._key, self._at):
            self._refuse("a repeat of a repeat")
        resume = self._at
        start = end = self._new()
        for index in range(max(low, 1) if high is None else high):
            if index:
                self._at = begin  # a copy of the piece is the piece read again
                first, last = self._atom()
            step = self._new()
            self._link(end, first)
            self._link(last, step)
            if index >= low:
                self._link(end, step)
            end = step
        if high is None:
            self._link(end, first)
        self._at = resume
        return start, end

    def _bounds(self) -> tuple[int, int | None] | None:
        char = self._peek()
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if char in simple:
            self._at += 1
            return simple[char]
        match = _COUNTED.match(self._key, self._at)
        if match is None:
            return None
        low = int(match[1] or 0)
        high = (int(match[3]) if match[3] else None) if match[2] else low
        if low > _MAX_REPEAT or (high is not None and not low <= high <= _MAX_REPEAT):
            self._refuse("a repeat that is too large")
        self._at = match.end()
        return low, high

    def _atom(self) -> tuple[int, int]:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return self._consume(self._char_class())
        if char in "^$":
            state = self._new(anchor=char)
            end = self._new()
            self._link(state, end)
            return state, end
        if char in "*+?":
            self._at -= 1
            self._refuse("nothing to repeat")
        if char == ".":
            return self._consume(lambda c: c != "\n")
        if char == "\\":
            return self._consume(self._escape())
        return self._consume(lambda c: c == char)

    def _consume(self, test: Test) -> tuple[int, int]:
        state, end = self._new(test), self._new()
        self._link(state, end)
        return state, end

    def _group(self) -> tuple[int, int]:
        if self._peek() == "?":
            if self._key[self._at : self._at + 2] != "?:":
                self._refuse("look-around, a named group or a flag")
            self._at += 2
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._refuse("groups nested too deeply")
        piece = self._alternatives()
        self._depth -= 1
        if self._take() != ")":
            self._refuse("an unmatched `(`")
        return piece

    def _escape(self) -> Test:
        char = self._take()
        if char.lower() in _CLASSES:
            inside = _CLASSES[char.lower()]
            return inside if char.islower() else lambda c: not inside(c)
        if char.isalnum():
            self._refuse(f"the escape \\{char}")
        return lambda c: c == char

    def _char_class(self) -> Test:
        negated = self._peek() == "^"
        if negated:
            self._at += 1
        tests: list[Test] = []
        while not tests or self._peek() != "]":
            low = self._take()
            if low == "\\":
                tests.append(self._escape())
            elif self._peek() == "-" and self._key[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._take()
                if high == "\\" or high < low:
                    self._refuse("a character range that is out of order")
                tests.append(lambda c, low=low, high=high: low <= c <= high)  # type: ignore[misc]
            else:
                tests.append(lambda c, low=low: c == low)  # type: ignore[misc]
        self._at += 1
        return (lambda c: not any(t(c) for t in tests)) if negated else (lambda c: any(t(c) for t in tests))
