"""A cost model: the bytes and FLOPs that each operation of a step must at least move and do.

With e bytes per element, T tokens, and everything read or written once:

    product       bytes e (in out + T (in + out) [+ out: bias])               flops 2 T in out [+ T out]
    scale input   bytes e (G in + 2 T' in) [+ 4 N]                            flops (2 N + T') in
    shrink        bytes e (sum over distinct adapters of r in  +  T' in) + 4 H    flops 2 H in    per slice
    expand        bytes e (sum over distinct adapters of r out + 2 T' out) + 4 H  flops 2 H out   per slice
      its gates         bytes 4 N, once for all slices                        flops H
      its scale vectors bytes e G out                                         flops 3 N out
    folded        product and expand together, less the 2 T' out of the expand
    KV write      bytes 2 e T kv_heads (k_dim + v_dim)                        flops 0
    attention     bytes e (kv_heads (k_dim + v_dim) K + T heads (k_dim + v_dim))
                  flops 2 heads (k_dim + v_dim) P
    embedding     bytes 2 e T d                                               flops 0
    norm          bytes e (d + 2 T d)                                         flops 4 T d
    residual      bytes 3 e T d                                               flops T d
    rotary        bytes e (2 T heads k_dim + 2 T k_dim)                       flops 3 T heads k_dim
    activation    bytes 3 e T d                                               flops 5 T d

r is an adapter's rank in the slice, T' the tokens with an adapter there, H the sum of ranks over tokens and their
adapters (float32 between shrink and expand), K the keys visible to any query of a sequence, P the pairs of a query and
a key it sees. Of the scale vectors, G are the distinct adapters that have one there, N the pairs of a token and such an
adapter; of gates, N are the pairs of a token and an adapter of its set that has anything there. A slice that no adapter
touches costs nothing. The expand adds into its output, hence its factor 2. Rotary heads are those of queries and keys,
with a cosine and a sine per token and dimension; an activation takes two rows (gate, up) to one.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loramux.kernels.attention.interface import AttentionShape
from loramux.kernels.lora.interface import ScaleName, Segment, Site, SiteSlice

Ranks = Mapping[int, Mapping[str, int]]
"""{slot: {module: rank}}; modules that an adapter does not touch are absent."""
Scales = Collection[tuple[int, str, ScaleName]]
"""(slot, module, which) of each scale vector."""


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
    """A layer's attention, its window (None: all earlier tokens), and the width of its gated activation."""

    attention: AttentionShape
    window: int | None = None
    intermediate: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """What a step runs: the projections of all layers, then the output projection for the rows that are sampled.

    `itemsize` is the bytes of an element of weights, activations and caches. Each layer has two norms of `hidden` and
    two residual additions, a rotary embedding and a gated activation; one more norm precedes the output projection.
    Routers of experts are left out.
    """

    sites: tuple[Site, ...]
    head: Site
    layers: tuple[Layer, ...]
    itemsize: int = 2

    @property
    def hidden(self) -> int:
        """The width of the residual stream."""
        return self.head.in_features

    @property
    def weight_bytes(self) -> int:
        """Bytes of all projections, the output projection included; the input embedding is not."""
        return sum(site.in_features * site.out_features for site in (*self.sites, self.head)) * self.itemsize


FUSABLE = frozenset({"norm", "residual", "rotary", "activation"})
"""Operations of a step that may ride in the reads and writes of their neighbours: a floor does not count them."""


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


def product(tokens: int, in_features: int, out_features: int, itemsize: int = 2, *, bias: bool = False) -> Cost:
    """y = x W^T (+ b) for x [tokens, in] and W [out, in]."""
    return Cost(
        (in_features + bias) * out_features * itemsize,
        tokens * (in_features + out_features) * itemsize,
        (2 * in_features + bias) * tokens * out_features,
    )


def adapter_bytes(sites: Iterable[Site], rank: int, itemsize: int = 2) -> int:
    """Bytes of an adapter that has this rank in every module: rank * sum(in + out) elements."""
    return sum(rank * (site.in_features + part.out_features) for site in sites for part in site.slices) * itemsize


def shrink(site: Site, segments: Sequence[Segment], ranks: Ranks, itemsize: int = 2) -> Cost:
    """h = A x of every adapter at one site; x is read once, however many slices it feeds."""
    weights = flops = width = 0
    anywhere: set[int] = set()
    for part in site.slices:
        summed, elements = _ranks(part, segments, ranks)
        weights += summed * site.in_features
        flops += 2 * elements * site.in_features
        width += elements
        anywhere |= _paired(part, segments, ranks)
    read = _tokens(segments, anywhere) * site.in_features
    return Cost(weights * itemsize, read * itemsize + 4 * width, flops)


def scale_input(
    site: Site, segments: Sequence[Segment], scales: Scales, itemsize: int = 2, *, gated: bool = False
) -> Cost:
    """x' = x + sum_i w_i (l_i - 1) o x at one site; only the rows that are scaled are counted."""
    scaled = {slot for part in site.slices for slot in _scaled(part, "in", segments, scales)}
    pairs, tokens, width = _pairs(segments, scaled), _tokens(segments, scaled), site.in_features
    return Cost(
        len(scaled) * width * itemsize,
        2 * tokens * width * itemsize + 4 * pairs * gated,
        (2 * pairs + tokens) * width,
    )


def expand(
    site: Site, segments: Sequence[Segment], ranks: Ranks, itemsize: int = 2, *, scales: Scales = frozenset(),
    gated: bool = False,
) -> Cost:  # fmt: skip
    """out += B h of every adapter at one site, with the gates and the output scale vectors that there are."""
    cost = Cost()
    anywhere: set[int] = set()
    for part in site.slices:
        summed, elements = _ranks(part, segments, ranks)
        scaled = _scaled(part, "out", segments, scales)
        here = scaled | _paired(part, segments, ranks)
        anywhere |= here
        cost += Cost(
            (summed + len(scaled)) * part.out_features * itemsize,
            2 * _tokens(segments, here) * part.out_features * itemsize + 4 * elements,
            (2 * elements + 3 * _pairs(segments, scaled)) * part.out_features + elements * gated,
        )
    return cost + Cost(activation_bytes=4 * _pairs(segments, anywhere) * gated)


def folded(
    site: Site, tokens: int, segments: Sequence[Segment], ranks: Ranks, itemsize: int = 2, *, bias: bool = False,
    scales: Scales = frozenset(), gated: bool = False,
) -> Cost:  # fmt: skip
    """y = x' W^T (+ b) + B h in one kernel: the product's output is not read and written again."""
    cost = product(tokens, site.in_features, site.out_features, itemsize, bias=bias)
    cost += expand(site, segments, ranks, itemsize, scales=scales, gated=gated)
    again = 0
    for part in site.slices:
        here = _paired(part, segments, ranks) | _scaled(part, "out", segments, scales)
        again += 2 * part.out_features * _tokens(segments, here)
    return cost + Cost(activation_bytes=-again * itemsize)


def _rank(part: SiteSlice, slot: int, ranks: Ranks) -> int:
    return ranks[slot].get(part.module, 0)


def _slots(segments: Sequence[Segment]) -> set[int]:
    """The distinct adapters of a step."""
    return {slot for segment in segments for slot, _ in segment.adapters}


def _paired(part: SiteSlice, segments: Sequence[Segment], ranks: Ranks) -> set[int]:
    """The distinct adapters with a pair at one slice."""
    return {slot for slot in _slots(segments) if _rank(part, slot, ranks)}


def _scaled(part: SiteSlice, which: ScaleName, segments: Sequence[Segment], scales: Scales) -> set[int]:
    """The distinct adapters with a scale vector at one slice."""
    return {slot for slot in _slots(segments) if (slot, part.module, which) in scales}


def _tokens(segments: Sequence[Segment], slots: Collection[int]) -> int:
    """Tokens whose set has any of these adapters."""
    return sum(s.end - s.start for s in segments if any(slot in slots for slot, _ in s.adapters))


def _pairs(segments: Sequence[Segment], slots: Collection[int]) -> int:
    """Pairs of a token and one of these adapters in its set."""
    return sum((s.end - s.start) * sum(slot in slots for slot, _ in s.adapters) for s in segments)


def _ranks(part: SiteSlice, segments: Sequence[Segment], ranks: Ranks) -> tuple[int, int]:
    """(sum of ranks over distinct adapters, sum of ranks over tokens and their adapters) at one slice."""
    elements = sum(
        (segment.end - segment.start) * _rank(part, slot, ranks) for segment in segments for slot, _ in segment.adapters
    )
    return sum(_rank(part, slot, ranks) for slot in _slots(segments)), elements


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


def embedding(tokens: int, features: int, itemsize: int = 2) -> Cost:
    """Rows of a table, read and written."""
    return Cost(tokens * features * itemsize, tokens * features * itemsize, 0)


def norm(tokens: int, features: int, itemsize: int = 2) -> Cost:
    """y = w o x / rms(x), row by row: a square and a sum, then two multiplications per element."""
    return Cost(features * itemsize, 2 * tokens * features * itemsize, 4 * tokens * features)


def residual(tokens: int, features: int, itemsize: int = 2) -> Cost:
    """y = a + b."""
    return Cost(0, 3 * tokens * features * itemsize, tokens * features)


def rotary(shape: AttentionShape, tokens: int, itemsize: int = 2) -> Cost:
    """Queries and keys turned by their position: x cos + rotated(x) sin."""
    width = (shape.heads + shape.kv_heads) * shape.k_dim
    return Cost(0, 2 * tokens * (width + shape.k_dim) * itemsize, 3 * tokens * width)


def activation(tokens: int, features: int, itemsize: int = 2) -> Cost:
    """y = silu(gate) o up; silu is counted as four operations."""
    return Cost(0, 3 * tokens * features * itemsize, 5 * tokens * features)


def step_costs(
    model: Model, step: Step, ranks: Ranks, *, scales: Scales = frozenset(), gated: bool = False, fold: bool = False
) -> dict[str, Cost]:
    """The step's costs by kind of operation, each the sum over all layers.

    base (the projections), head, embedding, norm, residual, rotary, activation, kv_write, attention; with segments
    also shrink and expand, and scale_input where an input is scaled. With `fold`, the projections with a term are in
    `folded` instead of in base and expand. Adapters at the head are left out; a step without segments has no LoRA cost.
    """
    tokens, size, wide = step.num_tokens, model.itemsize, model.hidden
    rows = len(step.sequences) if step.logit_rows is None else step.logit_rows
    costs: dict[str, Cost] = {"embedding": embedding(tokens, wide, size)}

    def count(kind: str, cost: Cost) -> None:
        costs[kind] = costs.get(kind, Cost()) + cost

    for site in model.sites:
        term = expand(site, step.segments, ranks, size, scales=scales, gated=gated)
        if step.segments:
            count("shrink", shrink(site, step.segments, ranks, size))
            scaled = scale_input(site, step.segments, scales, size, gated=gated)
            if scaled != Cost():
                count("scale_input", scaled)
        if fold and term != Cost():
            count("folded", folded(site, tokens, step.segments, ranks, size, scales=scales, gated=gated))
            continue
        count("base", product(tokens, site.in_features, site.out_features, size))
        if step.segments:
            count("expand", term)
    for layer in model.layers:
        count("kv_write", kv_write(layer.attention, tokens, size))
        count("attention", attention(layer.attention, step.sequences, layer.window, size))
        count("rotary", rotary(layer.attention, tokens, size))
        count("activation", activation(tokens, layer.intermediate, size))
        for _ in range(2):
            count("norm", norm(tokens, wide, size))
            count("residual", residual(tokens, wide, size))
    count("norm", norm(rows, wide, size))
    count("head", product(rows, wide, model.head.out_features, size))
    return costs


def step_floor(costs: Mapping[str, Cost], peaks: Peaks) -> float:
    """The least seconds of a step whose kinds of operation run one after the other, all but the fusable ones."""
    return sum(cost.floor(peaks) for kind, cost in costs.items() if kind not in FUSABLE)


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
    return Model(tuple(sites), head, (Layer(shape, window, intermediate),) * layers, itemsize)
