"""Training the scorer without a server: the same encoder, the same choice by cross-validation, the same artefacts."""

import asyncio
import logging
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loramux.adapters_store.base_spec import base_spec_from_config
from loramux.router import artifacts
from loramux.router.interface import Floats, Progress
from loramux.router.progress import bars
from loramux.router.scores.dataset import DatasetError, ScoredQuery, build_table, merge, read_scores
from loramux.router.scores.routerdc import fine_tune_encoder
from loramux.server.api.auto.embedders import TEXTS_AT_ONCE
from loramux.server.api.auto.parts import RouterParts, RouterSetupError, prepare
from loramux.server.api.auto.scoring import BASE_WORD, SCORERS, as_routed
from loramux.server.api.auto.service import FOLDER
from loramux.server.api.auto.training import KEPT_VERSIONS, train
from loramux.server.api.rendering import Renderer, TokenizerError
from loramux.server.api.serve import ServeError, configure_logging, find_model, structure_of
from loramux.server.engine.client import ProcessEngineClient
from loramux.server.engine.loading import UnsupportedModelError, load_config
from loramux.server.engine.protocol import EngineError
from loramux.server.settings import Settings

logger = logging.getLogger(__name__)


class OfflineError(Exception):
    """Training is not possible; the message says why and what would help."""


def train_file(
    settings: Settings, file: Path, out: Path | None, seed: int, fine_tune: Path | None = None
) -> dict[str, Any]:
    """Trains on a file of scores and saves the next version in `out`, or in the store of these settings.

    With `fine_tune`, the sentence encoder is trained itself and written there, and the scorer is for that one.

    Returns the artefact's notes with `version` and `folder`. Deterministic by `seed`. Raises `OfflineError`.
    """
    configure_logging("warning")
    settings = settings.model_copy(
        update={"log_level": "warning"}
    )  # the engine's: progress bars are all there is to see
    try:
        model = find_model(settings)
        spec = base_spec_from_config(load_config(model), name=settings.base_name)
        renderer = Renderer.load(
            model, chat_template=settings.chat_template, response_template=settings.response_template
        )
        parts = prepare(settings, model, spec.num_layers)
        if parts is None:
            raise OfflineError("--router off: there is nothing to train for; leave it out")
        words = {BASE_WORD, *settings.base_names}
        rows = merge(as_routed(row, words) for row in read_scores(file))
        folder = out if out is not None else settings.store_root(structure_of(spec)) / FOLDER / SCORERS
        with bars() as progress:
            if fine_tune is None:
                texts = [row.query for row in rows]
                embeddings, encoder = asyncio.run(_embed(settings, parts, renderer, model, texts, progress))
                with _saving(folder):
                    version = train(build_table(rows, embeddings), folder, encoder, seed=seed, progress=progress)
            else:
                version = _fine_tuned(parts, rows, folder, fine_tune, seed, progress)
        made = artifacts.load(folder, version)
    except (ServeError, TokenizerError, UnsupportedModelError, RouterSetupError) as error:
        raise OfflineError(str(error)) from error
    except (DatasetError, ValueError) as error:
        raise OfflineError(f"{file}: {error}") from error
    except EngineError as error:
        raise OfflineError(f"the base cannot embed the queries: {error}") from error
    return {**made.notes, "version": version, "folder": str(folder)}


def _fine_tuned(
    parts: RouterParts, rows: list[ScoredQuery], folder: Path, target: Path, seed: int, progress: Progress
) -> int:
    """Trains the settings' sentence encoder, writes it to `target` and the scorer for it as the next version."""
    from loramux.router.encoders.huggingface import HuggingFaceEncoder  # transformers takes seconds

    if not isinstance(parts.local, HuggingFaceEncoder):
        raise OfflineError(
            "--fine-tune: only a sentence encoder can be trained; give --router-encoder its path or hub name, without "
            "+ngram"
        )
    with _new_folder(target) as begun:
        encoder, rows = parts.local, [row for row in rows if row.scores]
        texts = [row.query for row in rows]
        progress("embedding queries", 0, len(texts))
        table = build_table(rows, encoder.encode(texts))
        progress("embedding queries", len(texts), len(texts))
        scorer, value = fine_tune_encoder(encoder, texts, table, seed=seed, progress=progress)
        encoder.save(begun)
        name = HuggingFaceEncoder(begun).name  # as a server will know it
        chosen = {"name": "RouterDC with its encoder", "setting": "as published", "estimate": value}
        notes = {
            "rows": len(rows), "seed": seed, "chosen": chosen["name"], "setting": chosen["setting"],
            "criterion": "mean score of queries held out", "compared": [chosen],
        }  # fmt: skip
        with _saving(folder):
            return artifacts.save(folder, artifacts.Artifact(scorer, name, encoder.dim, notes), keep=KEPT_VERSIONS)


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """What keeps the disk from taking a scorer is an `OfflineError`."""
    try:
        yield
    except OSError as error:
        raise OfflineError(f"the scorer cannot be saved in {folder}: {error.strerror}") from error


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it in the end, or is removed. Raises `OfflineError`, before anything else
    where the place cannot be used."""
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise OfflineError(f"--fine-tune {target}: there is something already; name a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as begun:
            made = Path(begun, "encoder")
            made.mkdir()
            yield made
            made.replace(target)
    except OSError as error:
        raise OfflineError(f"--fine-tune {target}: cannot be written ({error.strerror})") from error


async def _embed(
    settings: Settings, parts: RouterParts, renderer: Renderer, model: Path, texts: list[str], progress: Progress
) -> tuple[Floats, str]:
    """(rows of the texts, the encoder's name); the engine runs for as long as the encoder needs it."""
    with tempfile.TemporaryDirectory() as no_adapters, ThreadPoolExecutor(1) as threads:
        engine = ProcessEngineClient(settings.to_engine_config(str(model), no_adapters))
        try:
            if parts.uses_base:
                await engine.start()
                await engine.wait_ready()
            embedder = parts.embedder(engine, renderer, threads, at_once=1)
            rows = [np.zeros((0, embedder.dim), np.float32)]
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                progress("embedding queries", start, len(texts))
                rows.append(await embedder.embed(texts[start : start + TEXTS_AT_ONCE]))
            progress("embedding queries", len(texts), len(texts))
            return np.concatenate(rows), embedder.name
        finally:
            await engine.stop()
