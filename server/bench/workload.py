"""The workload of the multi-adapter papers: which adapter each request wants, when it comes, and how long it is.

S-LoRA's generator (Sheng et al. 2023, `benchmarks/trace.py`), with n adapters, skew alpha, burstiness cv and rate r:

    adapter = floor(n * X),  X ~ Power(alpha): density alpha x^(alpha-1) on [0, 1)    (1 uniform, smaller: more skewed)
    gap     ~ Gamma(shape 1/cv^2, scale cv^2/r): mean 1/r, coefficient of variation cv        (cv 1: Poisson arrivals)
    input, output ~ uniform integers in [low, high)

The draws come from NumPy's legacy generator in S-LoRA's order, whose numbers are frozen by NumPy's own policy: a seed
gives the trace that S-LoRA's script gives. Punica's mixes (Chen et al. 2023, `benchmarks/benchmark_utils.py`) replace
the adapters only, so that mixes of one seed differ in nothing else. With N requests, group k using adapter k mod n:

    distinct    every request an adapter of its own: request i uses adapter i mod n
    uniform     ceil(sqrt(N)) groups whose sizes differ by one at most
    skewed      groups of floor(1.5^k) requests, the last one what remains; the largest is adapter 0
    identical   one group

Groups are shuffled over the requests. Everything here is a pure function of its arguments.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Mix = Literal["slora", "distinct", "uniform", "skewed", "identical"]
MIXES: tuple[Mix, ...] = get_args(Mix)
GEOMETRIC_RATIO = 1.5

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea body back parent face level office door"
).split()


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace. `at` is in seconds from the start; `adapter` is an index, None for the base."""

    index: int
    at: float
    adapter: int | None
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What a trace is drawn from. `rate` is in requests per second, 0 for all at once; lengths are [low, high).

    Raises ValueError, which names the field, for what no trace can be drawn from.
    """

    requests: int
    adapters: int
    rate: float = 2.0
    cv: float = 1.0
    alpha: float = 1.0
    input: tuple[int, int] = (8, 512)
    output: tuple[int, int] = (8, 512)
    mix: Mix = "slora"
    seed: int = 42

    def __post_init__(self) -> None:
        for name, low in (("requests", 1), ("adapters", 0), ("rate", 0), ("seed", 0)):
            if not low <= getattr(self, name) < 2**32:
                raise ValueError(f"{name} must be at least {low} and below 2^32, not {getattr(self, name)}")
        for name in ("cv", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}")
        for name in ("input", "output"):
            low, high = getattr(self, name)
            if not 1 <= low < high < 2**31:
                raise ValueError(f"{name} must be low:high with 1 <= low < high, not {low}:{high}")
        if self.mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}, not {self.mix}")


def generate(workload: Workload) -> list[Request]:
    """The trace: requests in order of `at`. Equal workloads give equal traces."""
    w = workload
    draws = np.random.RandomState(w.seed)
    # S-LoRA's order of draws; the first happens for every mix so that the later ones agree
    shares = draws.power(w.alpha, w.requests)
    inputs = draws.randint(*w.input, w.requests)
    outputs = draws.randint(*w.output, w.requests)
    if w.rate > 0:
        times = np.cumsum(draws.gamma(1 / (w.cv * w.cv), w.cv * w.cv / w.rate, w.requests))
    else:
        times = np.zeros(w.requests)
    adapters: Sequence[int | None]
    if w.adapters == 0:
        adapters = [None] * w.requests
    elif w.mix == "slora":
        adapters = np.minimum((shares * w.adapters).astype(int), w.adapters - 1).tolist()
    elif w.mix == "distinct":
        adapters = [i % w.adapters for i in range(w.requests)]
    else:
        sizes = group_sizes(w.requests, w.mix)
        groups = np.repeat(np.arange(len(sizes)) % w.adapters, sizes)
        np.random.RandomState(w.seed).shuffle(groups)
        adapters = groups.tolist()
    columns = zip(times.tolist(), adapters, inputs.tolist(), outputs.tolist(), strict=True)
    return [Request(index, *row) for index, row in enumerate(columns)]


def group_sizes(requests: int, mix: Mix) -> list[int]:
    """How many requests share an adapter, largest group first; the sizes add up to `requests`.

    Raises ValueError for a mix that is not made of groups.
    """
    if mix == "identical":
        return [requests]
    if mix == "uniform":
        groups = math.isqrt(requests - 1) + 1  # ceil(sqrt(requests)) without rounding
        size, rest = divmod(requests, groups)
        return [size + 1] * rest + [size] * (groups - rest)
    if mix == "skewed":
        sizes: list[int] = []
        growing = 1.0
        while sum(sizes) + math.floor(growing) < requests:
            sizes.append(math.floor(growing))
            growing *= GEOMETRIC_RATIO
        return sorted([*sizes, requests - sum(sizes)], reverse=True)
    raise ValueError(f"{mix} is not made of groups")


def prompt_ids(seed: int, request: Request, low: int, high: int) -> list[int]:
    """`input_tokens` random token ids in [low, high), so that prefix caches find nothing worth reusing."""
    return random.Random(f"{seed}/{request.index}").choices(range(low, high), k=request.input_tokens)


def prompt_words(seed: int, request: Request) -> str:
    """`input_tokens` random short English words, about one token each in the tokenizers of today's models."""
    return " ".join(random.Random(f"{seed}/{request.index}").choices(WORDS, k=request.input_tokens))
