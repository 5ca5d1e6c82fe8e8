"""What a request may ask of the router, checked once, and the error that names what is wrong with it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Policy = Literal["auto", "scores", "examples", "weights"]


class RouterError(ValueError):
    """A request to the router that cannot be carried out. `field` names the option at fault; the message the remedy."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """How one query is routed.

    `policy` names a rung, or leaves the choice to the ladder. The set is the best candidate; or the `top_k` best; or
    the smallest set of best candidates whose softmax probability reaches `top_p` (at most `top_k` of them where both
    are given). `threshold` is the least score of a member, in the units of the rung's scores, and takes the place of
    the calibrated one; None leaves that in force. `candidates` restricts the choice among those the caller may use.
    `temperature` divides the scores before the softmax; None is the rung's own.

    Raises RouterError naming the option for values that no decision could follow.
    """

    policy: Policy = "auto"
    top_k: int | None = None
    top_p: float | None = None
    threshold: float | None = None
    candidates: tuple[str, ...] | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise RouterError("policy", f"must be one of {', '.join(get_args(Policy))}, got {self.policy!r}")
        if self.top_k is not None and not (_is_whole(self.top_k) and self.top_k >= 1):
            raise RouterError("top_k", f"must be a whole number of at least 1, got {self.top_k!r}")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise RouterError("top_p", f"must be above 0 and at most 1, got {self.top_p!r}")
        if self.threshold is not None and not _is_number(self.threshold):
            raise RouterError("threshold", f"must be a finite number, got {self.threshold!r}")
        if self.temperature is not None and not (_is_number(self.temperature) and self.temperature > 0):
            raise RouterError("temperature", f"must be a finite number above 0, got {self.temperature!r}")
        if self.candidates is not None:
            if not self.candidates:
                raise RouterError("candidates", "names no candidate; leave it out to choose among all you may use")
            if not all(isinstance(key, str) and key for key in self.candidates):
                raise RouterError("candidates", "must be a list of adapters; the base needs no mention")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "RouteOptions":
        """Options from plain values (parsed JSON, command line). Raises RouterError, also for unknown names."""
        known = tuple(cls.__dataclass_fields__)
        for name in values:
            if name not in known:
                raise RouterError(name, f"is no option of the router; there are {', '.join(known)}")
        given = dict(values)
        candidates = given.get("candidates")
        if candidates is not None:
            if not isinstance(candidates, list | tuple):
                raise RouterError("candidates", "must be a list of adapters")
            given["candidates"] = tuple(candidates)
        return cls(**given)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
