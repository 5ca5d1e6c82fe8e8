"""The decode batch is an optimisation: what is kept from step to step is what the sequences themselves would give."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from support.engines import drain, make_core, request, tokens_of
from support.models import (
    VOCAB,
    family_config,
    greedy,
    mixed_recipes,
    random_model,
    save_adapter,
    save_model,
    write_blob,
)

from loramux.adapters_store.device import AdapterLoadFailure
from loramux.kernels.attention import AttentionBatch, AttentionLimits
from loramux.kernels.attention.triton_plan import Metadata, TableRows, Tiling
from loramux.server.engine.core import EngineCore
from loramux.server.engine.inputs import step_inputs
from loramux.server.engine.protocol import AdapterRef, EngineOutput, EngineRequest
from loramux.server.engine.runner import Launched
from loramux.server.engine.scheduler import Failure
from loramux.server.engine.step import Chunk, Step
from loramux.server.engine.transport import ColumnDecoder, ColumnEncoder

Run = dict[str, list[EngineOutput]]


@dataclass
class Setup:
    model: Any
    model_dir: Path
    blob_dir: Path
    digests: list[str]

    def core(self, **overrides: Any) -> EngineCore:
        return make_core(self.model_dir, self.blob_dir, **overrides)

    def requests(self) -> list[EngineRequest]:
        """Every kind of end and of sampling, with and without adapters; the second half repeats prompts."""
        generator = torch.Generator().manual_seed(11)
        prompts = [torch.randint(3, VOCAB, (1 + 7 * i % 40,), generator=generator).tolist() for i in range(12)]
        kinds: list[dict[str, Any]] = [
            {"ignore_eos": True}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}, {"min_tokens": 9},
            {"temperature": 1.1, "top_k": 6, "seed": -3, "ignore_eos": True},
            {"stop_token_ids": (*range(3, 40), VOCAB + 5)}, {"temperature": 0.7, "min_p": 0.1, "min_tokens": 4},
        ]  # fmt: skip
        sets: list[list[tuple[str, float]]] = [[], [(self.digests[0], 1.0)], [(self.digests[1], 0.5)],
                                               [(self.digests[0], 0.5), (self.digests[2], 1.0)]]  # fmt: skip
        return [
            request(str(i), prompts[i % 12], (1, 2, 23, 40)[i % 4], sets[i // 2 % 4], **kinds[i % 6]) for i in range(24)
        ]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    root = tmp_path_factory.mktemp("batch")
    model = random_model(family_config("llama"))
    model_dir = save_model(model, root / "base")
    paths = [save_adapter(model, recipe, root / "adapters") for recipe in mixed_recipes(model)[:3]]
    return Setup(model, model_dir, root / "blobs", [write_blob(model, path, root / "blobs") for path in paths])


def before_each_step(core: EngineCore, change: Callable[[EngineCore], None]) -> None:
    schedule = core.scheduler.schedule

    def changed() -> tuple[Step, list[Failure]]:
        change(core)
        return schedule()

    core.scheduler.schedule = changed  # type: ignore[method-assign]


def disperse(core: EngineCore) -> None:
    """The plain twin: nothing is kept, every row is made anew from its sequence."""
    for seq in tuple(core.scheduler.running):
        core.scheduler.take_out(seq)
    assert len(core.batch) == 0


def run(core: EngineCore, requests: Iterable[EngineRequest], *, abort: bool = False) -> Run:
    """Requests that come one per step; with `abort` every fifth is given up two steps after it came."""
    found: Run = {}
    for number, one in enumerate(requests):
        core.add(one)
        for output in core.step().outputs:
            found.setdefault(output.request_id, []).append(output)
        if abort and number % 5 == 4:
            core.abort(str(number - 2))
            found.pop(str(number - 2), None)
    for key, outputs in drain(core).items():
        found.setdefault(key, []).extend(outputs)
    assert len(core.batch) == 0
    assert core.blocks.num_used == 0
    assert all(a.users == 0 for a in core.tier.residency())
    core.blocks.check()
    return found


def told(found: Run) -> dict[str, Any]:
    """What clients are told, but for the time and how much the cache spared."""
    return {key: (tokens_of(outputs), outputs[-1].finish_reason, outputs[-1].stop_token_id) for key, outputs in
            found.items()}  # fmt: skip


@pytest.mark.parametrize("few_blocks", [False, True], ids=["room", "preemption"])
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_what_is_kept_makes_no_difference(setup: Setup, overlap: bool, few_blocks: bool) -> None:
    per_block = setup.core().model.kv_bytes_per_token * 4
    limits = {"kv_cache_bytes": per_block * 40, "max_model_len": 100} if few_blocks else {}
    kept, dispersed = (setup.core(overlap=overlap, **limits) for _ in range(2))
    before_each_step(dispersed, disperse)
    for abort in (False, True):
        expected = run(dispersed, setup.requests(), abort=abort)
        assert told(run(kept, setup.requests(), abort=abort)) == told(expected)
        assert {outputs[-1].finish_reason for outputs in expected.values()} == {"stop", "length"}
    assert (kept.scheduler.preemptions > 0) == few_blocks
    kept.close()
    dispersed.close()


def test_columns_are_what_the_sequences_say(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    core = setup.core(max_batched_tokens=16)
    known: dict[str, list[int]] = {one.request_id: list(one.prompt_token_ids) for one in setup.requests()}
    launch, seen = core.runner.launch, 0

    def checked(step: Step, previous: Launched | None) -> Launched:
        nonlocal seen
        inputs = step_inputs(step, core.config.block_size)
        tokens = [(c.seq, place) for c in step for place in range(c.start, c.end)]
        assert inputs.ids.tolist() == [known[seq.request_id][place] for seq, place in tokens]
        assert inputs.positions.tolist() == [place for _, place in tokens]
        assert inputs.places.slots.tolist() == [seq.blocks[place // 4] * 4 + place % 4 for seq, place in tokens]
        assert inputs.places.ends.tolist() == [c.end for c in step]
        assert [list(inputs.places.tables[i][: -(-c.end // 4)]) for i, c in enumerate(step)] == [
            c.seq.blocks[: -(-c.end // 4)].tolist() for c in step
        ]
        sets: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
        for part in inputs.segments:
            sets[part.start : part.end] = [part.adapters] * (part.end - part.start)
        for (seq, _), adapters in zip(tokens, sets, strict=True):
            slots = seq.slots or {}
            assert adapters == tuple((slots[a.digest], a.weight) for a in seq.current_span.adapters)
        sampled = [c for c in step if c.end == len(known[c.seq.request_id])]
        assert [(c.seq, c.end) for c in inputs.sampling] == [(c.seq, c.end) for c in sampled]
        seen += step.num_decodes
        return launch(step, previous)

    monkeypatch.setattr(core.runner, "launch", checked)
    for one in setup.requests():
        core.add(one)
    while core.has_work():
        for output in core.step().outputs:
            known[output.request_id].extend(output.token_ids)
    core.close()
    assert seen > 200


def test_steady_steps_keep_their_layout(setup: Setup) -> None:
    """Nothing that depends on the rows alone is built again while they stay; sets lie in the kernels' order."""
    core = setup.core()
    for i in range(12):
        names = [(setup.digests[i // 2 % 3], 1.0)] if i % 2 else []
        core.add(request(str(i), [5 + i, 6, 7], 200, names, ignore_eos=True))
    while core.stats().waiting or len(core.batch) < 12:
        core.step()
    core.step()
    layouts = []
    before_each_step(core, lambda core: layouts.append(core.batch.decodes(core.batch.ready()).layout))
    for _ in range(10):
        core.step()
    assert all(layout is layouts[0] for layout in layouts)
    assert [(part.start, part.end) for part in layouts[0].segments] == [(6, 8), (8, 10), (10, 12)]
    order = [core.backend.order(part.adapters[0][0]) for part in layouts[0].segments]
    assert order == sorted(order)
    core.close()


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_adapters_are_switched_between_two_tokens(setup: Setup, overlap: bool) -> None:
    prompt = [9, 8, 7, 6, 5]

    def switch(core: EngineCore, *, always: bool) -> None:
        for seq in tuple(core.scheduler.running):
            late = seq.row is not None and core.batch.length(seq) == len(prompt) + 4
            if always or late:
                core.scheduler.take_out(seq)
            if late:
                (slot,) = core.tier.acquire(setup.digests[:1]) or ()
                seq.slots = {setup.digests[0]: slot}
                seq.switch((AdapterRef(setup.digests[0]),))

    found = []
    for always in (False, True):
        core = setup.core(overlap=overlap)
        core.pin_adapter(setup.digests[0], True)
        while not core.tier.loads:
            core.step()
        before_each_step(core, lambda core, always=always: switch(core, always=always))  # type: ignore[misc]
        found.append(tokens_of(run(core, [request("r", prompt, 16, ignore_eos=True)])["r"]))
        core.close()
    assert found[0] == found[1]
    base = greedy(setup.model, prompt, 16)
    assert found[0][:4] == base[:4]
    assert found[0] != base


def test_a_request_that_fails_gets_no_token_that_was_under_way(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preempted with a step in flight, and then its adapter cannot be had again."""

    def refuse(digests: Any) -> None:
        raise AdapterLoadFailure(setup.digests[0], "gone")

    core = setup.core(overlap=True)
    core.add(request("r", [5, 6, 7], 9, [(setup.digests[0], 1.0)], ignore_eos=True))
    while not core.scheduler.running:
        core.step()
    core.step()
    core.scheduler.preempt(next(iter(core.scheduler.running)))
    monkeypatch.setattr(core.tier, "acquire", refuse)
    assert [(o.request_id, o.finish_reason) for o in core.step().outputs] == [("r", "error")]
    assert not drain(core)
    core.close()


def test_a_row_cannot_be_switched(setup: Setup) -> None:
    core = setup.core()
    core.add(request("r", [5, 6, 7], 9, ignore_eos=True))
    core.step()
    core.step()
    (seq,) = core.scheduler.running
    with pytest.raises(ValueError, match="decode batch"):
        seq.switch(())
    core.scheduler.take_out(seq)
    seq.switch(())
    with pytest.raises(ValueError, match="in no row"):
        core.batch.leave(seq)
    core.close()


def test_chunks_of_a_step_can_be_looked_at(setup: Setup) -> None:
    core = setup.core()
    core.add(request("a", [5, 6, 7], 9, ignore_eos=True))
    core.step()
    core.add(request("b", [8, 9], 9))
    step, _ = core.scheduler.schedule()
    a, b = core.scheduler.running
    assert list(step) == [Chunk(a, 3, 4), Chunk(b, 0, 2)]
    assert (len(step), step.num_decodes, step.num_tokens) == (2, 1, 3)
    assert step[1] == Chunk(b, 0, 2)
    assert Step.of(step) is step
    core.close()


def test_packed_tables_are_the_same_plan() -> None:
    """Rows of a matrix give the metadata that separate tables give."""
    rng = np.random.default_rng(2)
    limits = AttentionLimits(64, 16, 400)
    matrix = rng.integers(0, 1000, (9, 20), dtype=np.int32)
    rows, others = np.array([4, 0, 8, 2]), [matrix[1, :7], list(range(15))]
    contexts = np.array([1, 77, 80, 33, 28, 60])
    lens = np.array([1, 1, 1, 1, 20, 9])
    slots = np.arange(int(lens.sum()))
    packed = TableRows(matrix, rows).followed_by(TableRows.of(others))
    separate = [*(matrix[row, : -(-end // 4)] for row, end in zip(rows, contexts, strict=False)), *others]
    assert [list(table) for table in packed[:2]] == [list(matrix[4]), list(matrix[0])]
    assert packed.padded(np.array([4, 1]), np.array([2, 3])).tolist() == [
        [matrix[1, 0], matrix[1, 1], matrix[1, 0]], matrix[0, :3].tolist()
    ]  # fmt: skip
    found = []
    for tables in (packed, separate):
        metadata = Metadata(limits, 4, [Tiling(2, 16)], torch.device("cpu"))
        plan = metadata.write(AttentionBatch(lens, contexts, tables, slots), None)
        entries = int((-(-contexts // 4)).sum())
        regions = (metadata.contexts[:4], metadata.first_entries[:4], metadata.slots[:33], metadata.tables[:entries])
        tiles = metadata.tiles[Tiling(2, 16)][: plan.tiles[Tiling(2, 16)] * 8]
        found.append((plan, [region.tolist() for region in (*regions, tiles)]))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="do not hold"):
        Metadata(limits, 4, (), torch.device("cpu")).write(
            AttentionBatch([1], [81], TableRows(matrix, rows[:1]), [80]), None
        )


def test_a_column_says_whose_tokens_it_has_when_that_changes() -> None:
    encoder, decoder = ColumnEncoder(), ColumnDecoder()
    both, one = ("a", "b"), ("b",)
    sent = [(both, [5, 6]), (both, [7, 8]), (one, [9]), ((), []), (one, [1 << 40])]
    columns = [encoder.encode(ids, np.array(tokens, dtype=np.int64)) for ids, tokens in sent]
    assert [ids for ids, _ in columns] == [both, None, one, (), one]
    found = [list(decoder.decode(*msgpack.unpackb(msgpack.packb(column)))) for column in columns]
    assert found == [list(zip(ids, tokens, strict=True)) for ids, tokens in sent]
    with pytest.raises(ValueError, match="longer"):
        list(decoder.decode(["a"], columns[0][1]))
