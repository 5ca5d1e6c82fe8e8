"""Every setting of the server, read once at the edge: a `--flag`, or a `LORAMUX_*` variable, or the default.

A flag wins over its variable. Nothing behind this class reads the environment; the engine gets a frozen dataclass.
"""

import argparse
import hashlib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from loramux.server.engine.config import EngineConfig

ENV_PREFIX = "LORAMUX_"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Switch = Literal["auto", "on", "off"]
_SWITCHES: Mapping[Switch, bool | None] = {"auto": None, "on": True, "off": False}


class SettingsError(Exception):
    """A setting is missing or wrong; the message names the flag and its variable and says what would be right."""


def default_store_dir() -> Path:
    """`$XDG_DATA_HOME/loramux`, or `~/.local/share/loramux`."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "loramux"


class Settings(BaseSettings):
    """The server's settings. Sizes accept `512MiB`, `2GiB` or a number of bytes."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    model: str | None = Field(None, description="hub name or directory of the base model (none: the embedded demo)")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    served_model_name: str | None = Field(None, description="the base's name in the API (default: made from --model)")
    chat_template: Path | None = Field(None, description="Jinja file that replaces the model's own chat template")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on (0: any free one)")
    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="key that clients must send; repeat the flag, or separate with commas, for several"
    )
    max_request_bytes: ByteSize = Field(ByteSize(4 * MIB), ge=KIB, description="largest JSON request body")
    body_timeout_seconds: float = Field(60.0, gt=0, description="longest pause of a client while it sends a body")
    drain_seconds: float = Field(30.0, ge=0, description="how long running requests may finish after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level logged")
    metrics_max_adapters: int = Field(
        100, ge=0, description="adapters with a label of their own in /metrics; the rest share `other`"
    )

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="type of weights and cache")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, gt=0, description="CPU threads of the engine (default: torch decides)")
    max_model_len: int | None = Field(None, gt=0, description="longest prompt plus answer in tokens (default: model's)")
    max_num_seqs: int = Field(64, gt=0, description="sequences that run at once")
    max_batched_tokens: int = Field(2048, gt=0, description="tokens of one step")
    max_queue: int = Field(1024, gt=0, description="requests that may wait; beyond it clients get 503")
    block_size: int = Field(16, gt=0, description="tokens per block of the KV cache")
    kv_cache_bytes: ByteSize | None = Field(None, gt=0, description="memory of the KV cache (default: by device)")
    enable_prefix_caching: bool = Field(True, description="reuse the KV cache of equal prompt beginnings")

    device_adapter_bytes: ByteSize = Field(ByteSize(GIB), gt=0, description="memory for adapters on the device")
    host_adapter_bytes: ByteSize = Field(ByteSize(4 * GIB), gt=0, description="memory for adapters on the host")
    max_adapters_per_set: int = Field(8, gt=0, description="adapters that one request may fuse")
    max_set_rank: int = Field(512, gt=0, description="sum of the ranks of one request's adapters")
    max_device_adapters: int = Field(1024, gt=0, description="adapters on the device at once, whatever their bytes")
    lora_implementation: Literal["auto", "torch", "triton"] = Field(
        "auto", description="how adapters are computed (auto: triton on CUDA, torch elsewhere)"
    )
    lora_overlap: Literal["none", "stream", "launch"] = Field(
        "none", description="on a card, hide the adapters' first product beside the base's, or launch the second early"
    )
    attention_implementation: Literal["auto", "torch", "triton", "flashinfer"] = Field(
        "auto", description="how attention is computed (auto: triton on CUDA, torch elsewhere)"
    )
    cuda_graphs: Switch = Field("auto", description="replay decode steps as CUDA graphs (auto: on a card)")
    overlap: Switch = Field("auto", description="prepare a step while the device computes the last (auto: on a card)")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a card's memory that may be filled")
    compile_layers: bool = Field(False, description="fuse the model's small operations by torch.compile at start")
    decode_workspace: bool = Field(True, description="on a CPU, keep decoding sequences' keys and values contiguous")
    packed_projections: bool = Field(True, description="compute q, k, v and gate, up as one product each")
    deterministic: bool = Field(False, description="the same bits for a request alone and in any batch (slower)")

    store_dir: Path = Field(default_factory=default_store_dir, description="where uploaded adapters are kept")
    adapter_max_bytes: ByteSize = Field(ByteSize(2 * GIB), gt=0, description="largest adapter that may be uploaded")
    max_adapters: int = Field(10_000, gt=0, description="adapters that may be registered")

    router: Literal["on", "off"] = Field("on", description="answer model `auto` by the adapter that a query needs")
    router_encoder: str = Field(
        "base+ngram", min_length=1,
        description="what embeds queries: base (hidden states), ngram, base+ngram, or a sentence encoder by path",
    )  # fmt: skip
    router_layer: int | None = Field(None, ge=0, description="layer of the base's states (default: the middle one)")
    router_max_tokens: int = Field(512, ge=16, description="tokens of a query that the base looks at: its last ones")
    router_base_examples: Path | None = Field(
        None, description="prompts that the base is to answer: a text file, or .jsonl (none: the demo's own)"
    )
    router_scores_bytes: ByteSize = Field(
        ByteSize(64 * MIB), ge=MIB, description="text of queries whose scores are kept for training, the newest"
    )
    router_shadow: bool = Field(False, description="compare the router with the model that requests name")

    @field_validator("api_key", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        """Accepts a comma-separated string, a sequence of them, or nothing."""
        if value is None:
            return ()
        items: Sequence[Any] = [value] if isinstance(value, str | SecretStr) else list(value)
        texts = [item.get_secret_value() if isinstance(item, SecretStr) else str(item) for item in items]
        return tuple(SecretStr(part.strip()) for text in texts for part in text.split(",") if part.strip())

    @field_validator(
        "model", "revision", "served_model_name", "chat_template", "threads", "router_layer", "router_base_examples",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        """An empty variable, as compose files leave behind, means "not set"."""
        return None if value == "" else value

    @field_validator("served_model_name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        """The name travels in URLs, headers and metric labels."""
        if value is not None and (not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,255}", value) or value == "auto"):
            raise ValueError("must be letters, digits and ._:/- (256 at most), and not 'auto'")
        return value

    @field_validator("chat_template", "router_base_examples")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        """The file is read later; a wrong path should fail now."""
        if value is not None and not value.is_file():
            raise ValueError(f"no such file: {value}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        """Raises ValueError for values that are fine alone and wrong together."""
        if self.model is None and self.revision is not None:
            raise ValueError("--revision needs --model")
        if self.router_shadow and self.router == "off":
            raise ValueError("--router-shadow needs --router on")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-batched-tokens ({self.max_batched_tokens}) must be at least --max-num-seqs "
                f"({self.max_num_seqs}): every running sequence needs one token per step"
            )
        return self

    @property
    def base_name(self) -> str:
        """The name under which the base is served: chosen, or the hub name, or the last part of a path."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model is None:
            return "loramux-demo"
        path = Path(self.model).expanduser()
        return path.resolve().name if path.exists() else self.model

    def store_root(self, structure: str) -> Path:
        """The store of one base: adapters fit one structure only, so bases never share a directory.

        `structure` is any text that changes when the base's modules or shapes do.
        """
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", self.base_name).strip("-.")[:64] or "base"
        return self.store_dir.expanduser() / f"{slug}-{hashlib.sha256(structure.encode()).hexdigest()[:12]}"

    def to_engine_config(self, model_path: str, blob_dir: str) -> EngineConfig:
        """The engine's part of the settings, for a model that lies at `model_path`."""
        return EngineConfig(
            model_path=model_path,
            blob_dir=blob_dir,
            dtype=self.dtype,
            device=self.device,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_batched_tokens=self.max_batched_tokens,
            block_size=self.block_size,
            kv_cache_bytes=None if self.kv_cache_bytes is None else int(self.kv_cache_bytes),
            device_adapter_bytes=int(self.device_adapter_bytes),
            host_adapter_bytes=int(self.host_adapter_bytes),
            max_adapters_per_set=self.max_adapters_per_set,
            enable_prefix_caching=self.enable_prefix_caching,
            max_set_rank=self.max_set_rank,
            max_device_adapters=self.max_device_adapters,
            lora_implementation=None if self.lora_implementation == "auto" else self.lora_implementation,
            attention_implementation=None if self.attention_implementation == "auto" else self.attention_implementation,
            lora_overlap=self.lora_overlap,
            cuda_graphs=_SWITCHES[self.cuda_graphs],
            overlap=_SWITCHES[self.overlap],
            gpu_memory_utilization=self.gpu_memory_utilization,
            deterministic=self.deterministic,
            compile_layers=self.compile_layers,
            decode_workspace=self.decode_workspace,
            packed_projections=self.packed_projections,
            max_queue=self.max_queue,
            threads=self.threads,
        )


def flag_of(field: str) -> str:
    """`max_num_seqs` -> `--max-num-seqs`."""
    return "--" + field.replace("_", "-")


def variable_of(field: str) -> str:
    """`max_num_seqs` -> `LORAMUX_MAX_NUM_SEQS`."""
    return ENV_PREFIX + field.upper()


def _shown_default(field: str) -> str:
    """The default as the help shows it: sizes with their unit, nothing for None, never a secret."""
    info = Settings.model_fields[field]
    value = default_store_dir() if field == "store_dir" else info.default
    if value is None or value == ():
        return ""
    if isinstance(value, ByteSize):
        return f" (default: {value.human_readable(separator='')})"
    return f" (default: {value})"


def add_arguments(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Adds one flag per setting, or for those named. Values stay text: `load_settings` parses and checks them."""
    for name, info in Settings.model_fields.items():
        if names is not None and name not in names:
            continue
        text = f"{info.description}{_shown_default(name)} [{variable_of(name)}]".replace("%", "%%")
        if info.annotation is bool:
            parser.add_argument(
                flag_of(name), dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        elif name == "api_key":
            parser.add_argument(
                flag_of(name), dest=name, action="append", metavar="KEY", default=argparse.SUPPRESS, help=text
            )
        else:
            metavar = name.rsplit("_", 1)[-1].upper()
            parser.add_argument(flag_of(name), dest=name, metavar=metavar, default=argparse.SUPPRESS, help=text)


def load_settings(given: Mapping[str, Any] | None = None) -> Settings:
    """The settings from the given flags and the environment. Raises `SettingsError` with one line per mistake."""
    try:
        return Settings(**(given or {}))
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False, include_input=False):
            message = item["msg"].removeprefix("Value error, ")
            if item["loc"]:
                field = str(item["loc"][0])
                lines.append(f"{flag_of(field)} (or {variable_of(field)}): {message}")
            else:
                lines.append(message)
        raise SettingsError("\n".join(lines)) from None
