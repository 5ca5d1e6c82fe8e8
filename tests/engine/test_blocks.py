"""The block manager keeps every block in one state and finds a prefix only under the same tokens, sets and salt."""

import random

import pytest
from support.engines import request

from loramux.server.engine.blocks import BlockManager
from loramux.server.engine.protocol import AdapterRef
from loramux.server.engine.sequence import Sequence


def sequence(tokens: list[int], adapters: list[tuple[str, float]] | None = None, salt: str = "") -> Sequence:
    return Sequence.from_request(request("r", tokens, 8, adapters or [], salt=salt))


def compute(blocks: BlockManager, seq: Sequence) -> None:
    assert blocks.grow(seq, len(seq.tokens))
    seq.num_computed = len(seq.tokens)
    blocks.register(seq, seq.num_computed)


def test_a_prefix_is_found_under_the_same_tokens() -> None:
    blocks = BlockManager(16, 4)
    compute(blocks, sequence(list(range(10))))
    again = sequence([*range(8), 99, 98])
    assert blocks.match_prefix(again) == 8
    assert blocks.num_used == 3


def test_at_least_one_token_is_left_to_compute() -> None:
    blocks = BlockManager(16, 4)
    compute(blocks, sequence(list(range(8))))
    assert blocks.match_prefix(sequence(list(range(8)))) == 4


@pytest.mark.parametrize(
    ("adapters", "salt"),
    [([("x", 1.0)], ""), ([("y", 1.0)], "s"), ([("x", 0.5)], "s"), ([("x", 1.0), ("y", 1.0)], "s"), ([], "s")],
)
def test_other_sets_and_salts_share_nothing(adapters: list[tuple[str, float]], salt: str) -> None:
    blocks = BlockManager(16, 4)
    compute(blocks, sequence(list(range(8)), [("x", 1.0)], "s"))
    assert blocks.match_prefix(sequence([*range(8), 9], adapters, salt)) == 0
    assert blocks.match_prefix(sequence([*range(8), 9], [("x", 1.0)], "s")) == 8


def test_the_order_of_a_set_is_irrelevant() -> None:
    blocks = BlockManager(16, 4)
    compute(blocks, sequence(list(range(8)), [("x", 1.0), ("y", 0.5)]))
    assert blocks.match_prefix(sequence([*range(8), 9], [("y", 0.5), ("x", 1.0)])) == 8


def test_a_switch_separates_later_blocks_only() -> None:
    blocks = BlockManager(16, 4)
    switched = sequence(list(range(6)), [("x", 1.0)])
    switched.switch((AdapterRef("y", 1.0),))
    switched.tokens.extend(range(6, 13))
    compute(blocks, switched)
    assert blocks.match_prefix(sequence(list(range(13)), [("x", 1.0)])) == 4
    replay = sequence(list(range(6)), [("x", 1.0)])
    replay.switch((AdapterRef("y", 1.0),))
    replay.tokens.extend(range(6, 13))
    assert blocks.match_prefix(replay) == 12


def test_without_caching_nothing_is_found() -> None:
    blocks = BlockManager(16, 4, prefix_caching=False)
    compute(blocks, sequence(list(range(8))))
    assert blocks.match_prefix(sequence(list(range(9)))) == 0


def test_growth_is_all_or_nothing() -> None:
    blocks = BlockManager(3, 4)
    seq = sequence(list(range(13)))
    assert not blocks.grow(seq, 13)
    assert not seq.blocks
    assert blocks.num_free == 3
    assert blocks.grow(seq, 12)


def test_random_traffic_keeps_the_invariants() -> None:
    rng = random.Random(3)
    blocks = BlockManager(24, 4)
    live: list[Sequence] = []
    for _ in range(2000):
        if live and rng.random() < 0.45:
            blocks.free(live.pop(rng.randrange(len(live))))
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
            seq = sequence(tokens, [("x", 1.0)] if rng.random() < 0.5 else [])
            blocks.match_prefix(seq)
            if blocks.grow(seq, len(tokens)):
                seq.num_computed = len(tokens)
                blocks.register(seq, seq.num_computed)
                live.append(seq)
            else:
                blocks.free(seq)
        blocks.check()
    for seq in live:
        blocks.free(seq)
    blocks.check()
    assert blocks.num_used == 0
