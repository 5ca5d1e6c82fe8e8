"""Sentence embeddings by any Hugging Face encoder, from a folder or the hub's name.

    e(x) = pool(h_1 .. h_m),  row = e / |e|,   h = the last hidden states of the m tokens kept of x

`mean` pools over the text's tokens (Reimers and Gurevych 2019, arXiv 1908.10084), `cls` takes the first one, as
RouterDC (arXiv 2409.19886) does; RouterDC also cuts long texts on the left, so that the end of a prompt stays.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from loramux.router.interface import Floats

Pooling = Literal["mean", "cls"]
Side = Literal["left", "right"]


POOLING_FOLDER = "1_Pooling"
_POOLING_KEYS: dict[Pooling, str] = {"mean": "mean_tokens", "cls": "cls_token"}


class EncoderError(ValueError):
    """The encoder cannot be used as asked; the message names the setting and the remedy."""


class HuggingFaceEncoder:
    """An `Encoder` over a transformers model; text alone decides a row, up to float rounding within a padded batch.

    One thread at a time. Options:

    source: folder or hub name, with safetensors weights (pickles are never opened, remote code is never run).
    pooling: None takes what the model's own sentence-transformers files say, `mean` without them.
    max_tokens: tokens kept of a text, special ones included; None takes the model's own limit.
    truncation: the side that is cut from longer texts.
    normalise: rows of norm 1; False gives the pooled states themselves.
    prefix: put before every text (E5 and BGE models want one).
    Raises EncoderError for a model that cannot be loaded or needs more than pooling and normalising.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        pooling: Pooling | None = None,
        max_tokens: int | None = None,
        truncation: Side = "right",
        normalise: bool = True,
        prefix: str = "",
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise EncoderError("batch_size must be at least 1")
        where = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else str(source)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
            loaded = AutoModel.from_pretrained(where, trust_remote_code=False, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise EncoderError(f"encoder: {source} cannot be loaded: {reason}") from error
        self.model: Any = loaded.float().to(device).eval()
        self.device = device
        self.batch_size = batch_size
        self.pooling: Pooling = pooling or _declared_pooling(where)
        self.normalise = normalise
        self.prefix = prefix
        self.max_tokens = _token_limit(where, self.tokenizer, self.model.config, max_tokens)
        self.tokenizer.truncation_side = truncation
        self.tokenizer.padding_side = "right"
        self.dim = int(self.model.config.hidden_size)
        self.name = self._identity()

    def encode(self, texts: Sequence[str]) -> Floats:
        """float32 [len(texts), dim]; texts of like length share a batch, the order of rows is that of the texts."""
        rows = torch.empty(len(texts), self.dim)
        with torch.inference_mode():
            for part in self._batches(texts):
                rows[part] = self.embed([texts[i] for i in part]).cpu()
        return cast(Floats, rows.numpy())

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The same rows for one batch, as a tensor on the encoder's device, with gradients when they are enabled."""
        inputs = self.tokenizer(
            [self.prefix + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.device)
        states: Tensor = self.model(**inputs).last_hidden_state
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalise else pooled

    def refresh_name(self) -> None:
        """Recomputes `name` after the weights were changed in place by training."""
        self.name = self._identity()

    def save(self, folder: Path) -> None:
        """Writes weights (safetensors), configuration, tokenizer, and pooling and token limit as sentence-transformers.

        `HuggingFaceEncoder(folder)` then gives the same rows; but for `truncation`, `normalise` and `prefix`, which
        have to be given again. OSError when the disk refuses.
        """
        try:
            self.model.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(None, str(error)) from error
        self.tokenizer.save_pretrained(folder)
        (folder / POOLING_FOLDER).mkdir(exist_ok=True)
        modes = {f"pooling_mode_{key}": self.pooling == mode for mode, key in _POOLING_KEYS.items()}
        files: dict[str, Any] = {
            "modules.json": [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": POOLING_FOLDER, "type": "sentence_transformers.models.Pooling"},
            ],
            f"{POOLING_FOLDER}/config.json": {"word_embedding_dimension": self.dim, **modes},
            "sentence_bert_config.json": {"max_seq_length": self.max_tokens, "do_lower_case": False},
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _batches(self, texts: Sequence[str]) -> Iterator[list[int]]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _identity(self) -> str:
        """Digest of weights, configuration and tokenizer, with the options that change a row."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        config = self.model.config.to_diff_dict()
        for elsewhere in ("_name_or_path", "transformers_version"):  # where it lies and who wrote it change no row
            config.pop(elsewhere, None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(self._tokenizer_state().encode())
        options = json.dumps(
            [self.pooling, self.max_tokens, self.tokenizer.truncation_side, self.normalise, self.prefix]
        )
        digest.update(options.encode())
        return f"hf-{digest.hexdigest()[:32]}"

    def _tokenizer_state(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # a tokenizer written in Python: its words and class are what there is to hash
            return json.dumps([type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())])
        state = json.loads(backend.to_str())
        for transient in ("truncation", "padding"):  # left behind by the latest call
            state.pop(transient, None)
        return json.dumps(state, sort_keys=True)


def _model_file(where: str, name: str) -> Any:
    """A JSON file beside the model, or None when it has none."""
    path = cached_file(
        where,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else json.loads(Path(path).read_text())


def _declared_pooling(where: str) -> Pooling:
    """What `modules.json` asks for. EncoderError when that is more than mean or cls pooling and normalising."""
    modules = _model_file(where, "modules.json")
    if modules is None:
        return "mean"
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise EncoderError(
            f"encoder: modules.json asks for {', '.join(unknown)}, which is not applied here; "
            "pass pooling='mean' or 'cls' to use the model without it, or choose another encoder"
        )
    for module in modules:
        if not module["type"].endswith("Pooling"):
            continue
        options = _model_file(where, f"{module['path']}/config.json") or {}
        modes = [key for key, value in options.items() if key.startswith("pooling_mode_") and value is True]
        if modes == ["pooling_mode_cls_token"]:
            return "cls"
        if modes != ["pooling_mode_mean_tokens"]:
            raise EncoderError(f"encoder: pooling {modes} is not offered; pass pooling='mean' or 'cls'")
    return "mean"


def _token_limit(where: str, tokenizer: Any, config: Any, asked: int | None) -> int:
    """The model's own limit, or `asked` when it is within what the positions and the tokenizer allow."""
    hard = [int(tokenizer.model_max_length)]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        hard.append(positions)
    most = min(hard)
    if asked is None:
        options = _model_file(where, "sentence_bert_config.json") or {}
        own = options.get("max_seq_length")
        asked = min(own, most) if isinstance(own, int) else most
    if not tokenizer.num_special_tokens_to_add() < asked <= most:
        raise EncoderError(
            f"max_tokens is {asked}; this encoder takes {tokenizer.num_special_tokens_to_add() + 1} to {most}"
        )
    return asked
