"""A cost model: the bytes and FLOPs that each operation of a step must at least move and do.

With e bytes per element, T tokens, and everything read or written once:

    product       bytes e (in out + T (in + out))                             flops 2 T in out
    shrink        bytes e (sum over distinct adapters of r in  +  T' in) + 4 H    flops 2 H in    per slice
    expand        bytes e (sum over distinct adapters of r out + 2 T' out) + 4 H  flops 2 H out   per slice
    KV write      bytes 2 e T kv_heads (k_dim + v_dim)                        flops 0
    attention     bytes e (kv_heads (k_dim + v_dim) K + T heads (k_dim + v_dim))
                  flops 2 heads (k_dim + v_dim) P

r is an adapter's rank in the slice, T' the tokens with an adapter there, H the sum of ranks over tokens and their
adapters (float32 between shrink and expand), K the keys visible to any query of a sequence, P the pairs of a query and
a key it sees. A slice that no adapter touches costs nothing. The expand adds into its output, hence its factor 2.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loramux.kernels.attention.interface import AttentionShape
from loramux.kernels.lora.interface import Segment, Site, SiteSlice

Ranks = Mapping[int, Mapping[str, int]]
"""{slot: {module: rank}}; modules that an adapter does not touch are absent."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a card reaches: `bandwidth` in bytes/s and `flops` in FLOP/s, preferably as measured in the same run."""

    bandwidth: float
    flops: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of weights (or of the cache) and of activations, and FLOPs."""

    weight_bytes: int = 0
    activation_bytes: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weight_bytes + self.activation_bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte; 0 for nothing."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.flops + other.flops,
        )

    def floor(self, peaks: Peaks) -> float:
        """The least seconds: max(bytes / bandwidth, flops / peak)."""
        return max(self.bytes / peaks.bandwidth, self.flops / peaks.flops)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's attention and its window (None: all earlier tokens)."""

    attention: AttentionShape
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """What a step runs: the projections of all layers, then the output projection for the rows that are sampled.

    `itemsize` is the bytes of an element of weights, activations and caches. Norms, rotary embedding and gated
    activations are left out, as they can be fused, and so are routers of experts.
    """

    sites: tuple[Site, ...]
    head: Site
    layers: tuple[Layer, ...]
    itemsize: int = 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of all projections, the output projection included; the input embedding is not."""
        return sum(site.in_features * site.out_features for site in (*self.sites, self.head)) * self.itemsize


@dataclass(frozen=True, slots=True)
class Step:
    """One step: (queries, context) of each sequence, segments of its tokens, and the rows whose logits are computed.

    `context` counts a sequence's tokens up to and including its last query. `segments` are by token of the step.
    """

    sequences: tuple[tuple[int, int], ...]
    segments: tuple[Segment, ...] = ()
    logit_rows: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(queries for queries, _ in self.sequences)


def product(tokens: int, in_features: int, out_features: int, itemsize: int = 2) -> Cost:
    """y = x W^T for x [tokens, in] and W [out, in]."""
    return Cost(
        in_features * out_features * itemsize,
        tokens * (in_features + out_features) * itemsize,
        2 * tokens * in_features * out_features,
    )


def adapter_bytes(sites: Iterable[Site], rank: int, itemsize: int = 2) -> int:
    """Bytes of an adapter that has this rank in every module: rank * sum(in + out) elements."""
    return sum(rank * (site.in_features + part.out_features) for site in sites for part in site.slices) * itemsize


def shrink(site: Site, segments: Sequence[Segment], ranks: Ranks, itemsize: int = 2) -> Cost:
    """h = A x of every adapter at one site; x is read once, however many slices it feeds."""
    weights = flops = width = 0
    for part in site.slices:
        summed, elements = _ranks(part, segments, ranks)
        weights += summed * site.in_features
        flops += 2 * elements * site.in_features
        width += elements
    tokens = sum(
        segment.end - segment.start
        for segment in segments
        if any(_rank(part, slot, ranks) for part in site.slices for slot, _ in segment.adapters)
    )
    return Cost(weights * itemsize, tokens * site.in_features * itemsize + 4 * width, flops)


def expand(site: Site, segments: Sequence[Segment], ranks: Ranks, itemsize: int = 2) -> Cost:
    """out += B h of every adapter at one site."""
    cost = Cost()
    for part in site.slices:
        summed, elements = _ranks(part, segments, ranks)
        tokens = sum(
            segment.end - segment.start
            for segment in segments
            if any(_rank(part, slot, ranks) for slot, _ in segment.adapters)
        )
        cost += Cost(
            summed * part.out_features * itemsize,
            2 * tokens * part.out_features * itemsize + 4 * elements,
            2 * elements * part.out_features,
        )
    return cost


def _rank(part: SiteSlice, slot: int, ranks: Ranks) -> int:
    return ranks[slot].get(part.module, 0)


def _ranks(part: SiteSlice, segments: Sequence[Segment], ranks: Ranks) -> tuple[int, int]:
    """(sum of ranks over distinct adapters, sum of ranks over tokens and their adapters) at one slice."""
    distinct = {slot for segment in segments for slot, _ in segment.adapters}
    elements = sum(
        (segment.end - segment.start) * _rank(part, slot, ranks) for segment in segments for slot, _ in segment.adapters
    )
    return sum(_rank(part, slot, ranks) for slot in distinct), elements


def visible_keys(queries: int, context: int, window: int | None = None) -> tuple[int, int]:
    """(keys that any of the last `queries` tokens of `context` sees, pairs of a query and a key it sees)."""
    first = context - queries
    if window is None:
        return context, (first + 1 + context) * queries // 2
    keys = context - max(0, first - window + 1)
    growing = min(max(window - first, 0), queries)
    pairs = (2 * first + 1 + growing) * growing // 2 + (queries - growing) * window
    return keys, pairs


def attention(
    shape: AttentionShape, sequences: Sequence[tuple[int, int]], window: int | None = None, itemsize: int = 2
) -> Cost:
    """Attention of one layer: each sequence's visible keys and values are read once for all its queries and heads."""
    dims = shape.k_dim + shape.v_dim
    keys = pairs = tokens = 0
    for queries, context in sequences:
        seen, seen_pairs = visible_keys(queries, context, window)
        keys, pairs, tokens = keys + seen, pairs + seen_pairs, tokens + queries
    return Cost(
        shape.kv_heads * dims * keys * itemsize, tokens * shape.heads * dims * itemsize, 2 * shape.heads * dims * pairs
    )


def kv_write(shape: AttentionShape, tokens: int, itemsize: int = 2) -> Cost:
    """Keys and values of one layer, read from where they were computed and written to the cache."""
    return Cost(0, 2 * tokens * shape.kv_heads * (shape.k_dim + shape.v_dim) * itemsize, 0)


def step_costs(model: Model, step: Step, ranks: Ranks) -> dict[str, Cost]:
    """The step's costs by operation: base, head, shrink, expand, kv_write, attention. Adapters at the head are left
    out. A step without segments has no shrink and no expand."""
    tokens, size = step.num_tokens, model.itemsize
    rows = len(step.sequences) if step.logit_rows is None else step.logit_rows
    head = product(rows, model.head.in_features, model.head.out_features, size)
    costs = {"base": Cost(), "head": head, "kv_write": Cost(), "attention": Cost()}
    for site in model.sites:
        costs["base"] += product(tokens, site.in_features, site.out_features, size)
    for layer in model.layers:
        costs["kv_write"] += kv_write(layer.attention, tokens, size)
        costs["attention"] += attention(layer.attention, step.sequences, layer.window, size)
    if step.segments:
        costs["shrink"] = costs["expand"] = Cost()
        for site in model.sites:
            costs["shrink"] += shrink(site, step.segments, ranks, size)
            costs["expand"] += expand(site, step.segments, ranks, size)
    return costs


def step_floor(costs: Mapping[str, Cost], peaks: Peaks) -> float:
    """The least seconds of a step whose kinds of operation run one after the other: the sum of their floors."""
    return sum(cost.floor(peaks) for cost in costs.values())


def decoder(
    *, hidden: int, intermediate: int, layers: int, shape: AttentionShape, vocabulary: int, itemsize: int = 2,
    window: int | None = None,
) -> Model:  # fmt: skip
    """A Llama-like model: packed q, k, v; o; packed gate, up; down, in every layer."""
    sites: list[Site] = []

    def add(in_features: int, prefix: str, parts: Mapping[str, int]) -> None:
        slices = tuple(SiteSlice(f"{prefix}.{name}", width) for name, width in parts.items())
        sites.append(Site(len(sites), in_features, slices))

    q, k, v = shape.heads * shape.k_dim, shape.kv_heads * shape.k_dim, shape.kv_heads * shape.v_dim
    for number in range(layers):
        attention_prefix, mlp_prefix = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        add(hidden, attention_prefix, {"q_proj": q, "k_proj": k, "v_proj": v})
        add(shape.heads * shape.v_dim, attention_prefix, {"o_proj": hidden})
        add(hidden, mlp_prefix, {"gate_proj": intermediate, "up_proj": intermediate})
        add(intermediate, mlp_prefix, {"down_proj": hidden})
    head = Site(len(sites), hidden, (SiteSlice("lm_head", vocabulary),))
    return Model(tuple(sites), head, (Layer(shape, window),) * layers, itemsize)
