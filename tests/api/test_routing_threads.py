"""What is costly to score is not scored on the event loop."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from api.test_routing import QUERY, SPELL, TALK, ready, route, teach

from loramux.router.interface import BASE as BASE_KEY
from loramux.router.interface import Floats

pytestmark = pytest.mark.anyio


async def test_a_scorer_of_unknown_cost_scores_in_a_thread(make: Callable[..., Any]) -> None:
    threads = []

    class Scorer:
        candidates = (BASE_KEY, "spell")

        def score(self, embeddings: Floats) -> Floats:
            threads.append(threading.current_thread())
            return np.array([[0.0, 1.0]], np.float32)

    bench = await make(base_examples=TALK)
    await ready(bench)
    await teach(bench, "spell", SPELL, 1)
    bench.state.router._policy.use_scorer(Scorer(), bench.state.router._queries.name)
    (decision,) = await route(bench, QUERY)
    assert (decision["rung"], decision["chosen"][0]["name"]) == ("scores", "spell")
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()
