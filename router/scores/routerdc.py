"""RouterDC: query and candidate embeddings trained by two contrastive losses (Chen et al. 2024, arXiv 2409.19886).

    s_t(x) = cos(P e(x), k_t) / tau,     inference: argmax_t s_t(x)
    L = L_sample-LLM + lambda L_sample-sample

    L_sample-LLM    = sum over the K+ best-scored i of -log(e^{s_i} / (e^{s_i} + sum over the K- worst of e^{s_j})),
                      without the i scored 0 or less and the j scored above 0.5
    L_sample-sample = -log(e^{cos(x, x+)} / (e^{cos(x, x+)} + sum over H queries x- of other clusters e^{cos(x, x-)}))
                      x+: another query of x's cluster; both drawn from the batch

e(x) are frozen embeddings with a trained projection P, or the states of an encoder that is trained itself. Differences
from the paper, on purpose: clusters are k-means over the frozen embeddings themselves (the paper puts t-SNE in between,
which distorts distances between clusters and would need scikit-learn); a share of the training queries is held out, the
state of the best held-out score is kept and training stops when it no longer rises; dropout and weight decay on P.
Candidates that a query was not scored on take no part in its loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loramux.router.interface import Floats, Progress
from loramux.router.scores.clusters import kmeans
from loramux.router.scores.dataset import ScoreTable
from loramux.router.scores.features import Partition
from loramux.router.scores.knn import unit

if TYPE_CHECKING:  # transformers takes seconds to import, and only training an encoder needs it
    from loramux.router.encoders.huggingface import HuggingFaceEncoder

_MASKED = -1e9


@dataclass(frozen=True, slots=True)
class RouterDCOptions:
    """Hyperparameters; the paper's are K+ = K- = H = 3, lambda 1, tau 1, 8 clusters, AdamW 5e-5, 1000 steps of 64.

    projection: width of P, or 0 for none (P = 1). dropout: of e(x) while P is trained. held_out: share of the queries
    that early stopping looks at, every `check_every` steps; it gives up after `patience` checks without a better score.
    """

    positives: int = 3
    negatives: int = 3
    cluster_negatives: int = 3
    balance: float = 1.0
    temperature: float = 1.0
    clusters: int = 8
    projection: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.2
    steps: int = 1000
    batch: int = 64
    held_out: float = 0.15
    check_every: int = 50
    patience: int = 5

    def __post_init__(self) -> None:
        for name in ("positives", "negatives", "cluster_negatives", "clusters", "steps", "check_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.batch < 2:
            raise ValueError("batch must be at least 2")
        for name in ("temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        for name in ("balance", "weight_decay", "projection"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0")
        if not 0 <= self.dropout < 1 or not 0 < self.held_out < 1:
            raise ValueError("dropout must be in [0, 1) and held_out in (0, 1)")


def sample_llm_loss(similarities: Tensor, scores: Tensor, positives: int, negatives: int) -> Tensor:
    """The mean over rows of L_sample-LLM, of s [n, c] and scores [n, c] (NaN: the candidate takes no part).

    A candidate among both the best and the worst (there are few candidates) is no negative of itself.
    """
    known = ~torch.isnan(scores)
    columns = scores.shape[1]
    best = torch.where(known, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :positives]
    worst = torch.where(known, scores, torch.inf).argsort(dim=1, stable=True)[:, : min(negatives, columns)]
    best_scores, worst_scores = scores.gather(1, best), scores.gather(1, worst)
    negative_ok = known.gather(1, worst) & ~(worst_scores > 0.5)
    s_best, s_worst = similarities.gather(1, best), similarities.gather(1, worst)
    usable = negative_ok.unsqueeze(1) & (best.unsqueeze(2) != worst.unsqueeze(1))
    against = torch.where(usable, s_worst.unsqueeze(1), _MASKED)
    losses = torch.logsumexp(torch.cat([s_best.unsqueeze(2), against], 2), 2) - s_best
    return torch.where(known.gather(1, best) & (best_scores > 0), losses, 0.0).sum() / len(scores)


def sample_sample_loss(queries: Tensor, clusters: Tensor, negatives: int, generator: torch.Generator) -> Tensor:
    """The mean over rows of L_sample-sample, of embeddings [n, d] and clusters int64 [n].

    x+ and the x- are drawn from the batch; rows whose cluster has no other row, or that have no row of another cluster,
    add nothing; where fewer than `negatives` rows of other clusters exist, all of them are taken.
    """
    n = len(queries)
    rows = F.normalize(queries, dim=-1)
    cosines = rows @ rows.T
    same = clusters.unsqueeze(1) == clusters.unsqueeze(0)
    others = same & ~torch.eye(n, dtype=torch.bool, device=same.device)
    noise = torch.rand(2, n, n, generator=generator).to(queries.device)
    positive = torch.where(others, noise[0], -1.0).argmax(1, keepdim=True)
    negative = torch.where(same, -1.0, noise[1]).topk(min(negatives, n), dim=1).indices
    s_positive = cosines.gather(1, positive)
    s_negative = torch.where(same.gather(1, negative), _MASKED, cosines.gather(1, negative))
    losses = torch.logsumexp(torch.cat([s_positive, s_negative], 1), 1) - s_positive.squeeze(1)
    return torch.where(others.any(1) & ~same.all(1), losses, 0.0).sum() / n


@dataclass(frozen=True, slots=True)
class RouterDC:
    """A `Scorer`: cos(P x, k_t) / tau, with P float32 [width, dim] (None: P = 1) and k float32 [candidates, width]."""

    candidates: tuple[str, ...]
    keys: Floats
    projection: Floats | None
    temperature: float

    def score(self, embeddings: Floats) -> Floats:
        """float32 [n, candidates], in [-1 / tau, 1 / tau]."""
        rows = embeddings if self.projection is None else embeddings @ self.projection.T
        return ((unit(rows) @ unit(self.keys).T) / self.temperature).astype(np.float32)


class _Head(nn.Module):
    """The trained parameters: P (or none) and one key per candidate, N(0, 0.78) as in the paper."""

    def __init__(self, dim: int, candidates: int, options: RouterDCOptions, generator: torch.Generator) -> None:
        super().__init__()
        width = options.projection or dim
        self.keys = nn.Parameter(torch.empty(candidates, width).normal_(0.0, 0.78, generator=generator))
        self.projection: nn.Parameter | None = None
        if options.projection:
            self.projection = nn.Parameter(torch.empty(width, dim).normal_(0.0, dim**-0.5, generator=generator))

    def project(self, rows: Tensor) -> Tensor:
        return rows if self.projection is None else rows @ self.projection.T

    def similarities(self, projected: Tensor, temperature: float) -> Tensor:
        return F.normalize(projected, dim=-1) @ F.normalize(self.keys, dim=-1).T / temperature

    def scorer(self, candidates: tuple[str, ...], temperature: float) -> RouterDC:
        projection = None if self.projection is None else self.projection.detach().cpu().numpy().copy()
        return RouterDC(candidates, self.keys.detach().cpu().numpy().copy(), projection, temperature)


def fit_head(
    table: ScoreTable, options: RouterDCOptions | None = None, *, seed: int, progress: Progress | None = None
) -> RouterDC:
    """A projection and keys over the table's frozen embeddings. Deterministic by `seed` on one machine."""
    options = options or RouterDCOptions()
    generator = torch.Generator().manual_seed(seed)
    head = _Head(table.embeddings.shape[1], len(table.candidates), options, generator)
    rows = torch.from_numpy(np.ascontiguousarray(table.embeddings))

    def embed(which: Tensor, training: bool) -> Tensor:
        taken = rows[which]
        if training and options.dropout:
            keep = torch.rand(taken.shape, generator=generator) >= options.dropout
            taken = taken * keep / (1 - options.dropout)
        return head.project(taken)

    _train(table, options, head, head, embed, generator, seed, progress)
    return head.scorer(table.candidates, options.temperature)


def fine_tune_encoder(
    encoder: "HuggingFaceEncoder",
    texts: Sequence[str],
    table: ScoreTable,
    options: RouterDCOptions | None = None,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[RouterDC, float]:
    """The paper's own form: `encoder` is trained in place (its `name` changes), on the texts of the table's rows.

    The table's embeddings are the encoder's before training; clusters come from them. Returns the keys as a scorer over
    embeddings of the trained encoder, and the best mean score of the queries that early stopping held out. Raises
    ValueError when texts and rows differ in number, or when `projection` or `dropout` is not 0 (the encoder has its
    own).
    """
    options = options or RouterDCOptions(projection=0, learning_rate=5e-5, dropout=0.0)
    if len(texts) != len(table.embeddings):
        raise ValueError(f"{len(texts)} texts and {len(table.embeddings)} rows")
    if options.projection or options.dropout:
        raise ValueError("projection and dropout must be 0 when the encoder itself is trained")
    generator = torch.Generator().manual_seed(seed)
    head = _Head(encoder.dim, len(table.candidates), options, generator).to(encoder.device)

    def embed(which: Tensor, training: bool) -> Tensor:
        encoder.model.train(training)
        indices = which.tolist()
        parts = [indices[i : i + encoder.batch_size] for i in range(0, len(indices), encoder.batch_size)]
        return torch.cat([encoder.embed([texts[i] for i in part]) for part in parts])

    with torch.random.fork_rng(devices=[] if encoder.device == "cpu" else None):
        torch.manual_seed(seed)  # the encoder's own dropout
        trained = nn.ModuleList([encoder.model, head])
        value = _train(table, options, head, trained, embed, generator, seed, progress)
    encoder.model.eval()
    encoder.refresh_name()
    return head.scorer(table.candidates, options.temperature), value


def _train(
    table: ScoreTable,
    options: RouterDCOptions,
    head: _Head,
    trained: nn.Module,
    embed: Callable[[Tensor, bool], Tensor],
    generator: torch.Generator,
    seed: int,
    progress: Progress | None,
) -> float:
    """Trains the parameters of `trained`, leaves them at the state of the best held-out score and returns that.

    `embed(rows, training)` gives P e(x) [len(rows), width] of rows of the table.
    """
    training, held = _split(table, options.held_out, seed)
    validation = table.rows(held.numpy())
    if np.isnan(validation.mean(validation.chosen(np.zeros_like(validation.scores, np.float32)))):
        raise ValueError("RouterDC needs more queries that were scored on at least two candidates")
    centroids = kmeans(table.embeddings[training.numpy()], options.clusters, seed)
    clusters = torch.from_numpy(Partition.nearest(centroids)(table.embeddings))
    device = head.keys.device
    scores = torch.from_numpy(table.scores).float().to(device)
    optimiser = torch.optim.AdamW(trained.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    best, best_state, stale = -np.inf, _state(trained), 0
    for step in range(1, options.steps + 1):
        which = training[torch.randint(len(training), (options.batch,), generator=generator)]
        queries = embed(which, True)
        similarities = head.similarities(queries, options.temperature)
        loss = sample_llm_loss(similarities, scores[which], options.positives, options.negatives)
        if options.balance:
            loss = loss + options.balance * sample_sample_loss(
                queries, clusters[which].to(device), options.cluster_negatives, generator
            )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if progress is not None:
            progress("RouterDC", step, options.steps)
        if step % options.check_every and step < options.steps:
            continue
        with torch.inference_mode():
            predicted = head.similarities(embed(held, False), options.temperature).cpu().numpy()
        value = validation.mean(validation.chosen(predicted))
        if value > best:
            best, best_state, stale = value, _state(trained), 0
        else:
            stale += 1
            if stale == options.patience:
                break
    trained.load_state_dict(best_state)
    return float(best)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}


def _split(table: ScoreTable, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row indices for training and held out, the same share of every group. ValueError when either would be empty."""
    order = np.random.default_rng(seed).permutation(len(table.groups))
    held = np.zeros(len(order), bool)
    for group in np.unique(table.groups):
        members = order[table.groups[order] == group]
        held[members[: round(held_out * len(members))]] = True
    if held.all() or not held.any():
        raise ValueError(f"{len(held)} queries are too few to hold a share of {held_out} out")
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
