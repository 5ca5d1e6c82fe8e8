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

from loramux.adapters_store.tenants import TenantLimits
from loramux.server.engine.config import EngineConfig
from loramux.server.lora_modules import LoraModule, parse_lora_modules
from loramux.server.refused_settings import REFUSED, check_model_name, check_refused

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
    served_model_name: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="the base's names in the API, the first is the main one (default: made from --model)"
    )
    chat_template: Path | None = Field(None, description="Jinja file that replaces the model's own chat template")
    response_template: Path | None = Field(
        None, description="JSON file that says how answers mark calls and reasoning (default: by the model's templates)"
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on (0: any free one)")
    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="key of the local tenant with admin rights; repeat the flag, or separate with commas"
    )
    root_path: str = Field("", description="path under which a reverse proxy serves this server, as /llm")
    ssl_certfile: Path | None = Field(None, description="certificate chain (PEM): serves HTTPS")
    ssl_keyfile: Path | None = Field(None, description="private key (PEM), if it is not in the certificate's file")
    cors_origin: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="origin that browsers may call from, or *; repeat the flag, or separate with commas"
    )
    max_connections: int = Field(4096, gt=0, description="open connections; beyond them clients get 503")
    max_header_bytes: ByteSize = Field(ByteSize(32 * KIB), ge=KIB, description="largest request line with headers")
    header_timeout_seconds: float = Field(15.0, gt=0, description="how long a head or a TLS handshake may take")
    keep_alive_seconds: float = Field(75.0, gt=0, description="how long an idle connection is kept")
    max_request_bytes: ByteSize = Field(ByteSize(4 * MIB), ge=KIB, description="largest JSON request body")
    body_timeout_seconds: float = Field(60.0, gt=0, description="longest pause of a client while it sends a body")
    drain_seconds: float = Field(30.0, ge=0, description="how long running requests may finish after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level logged")
    log_format: Literal["text", "json"] = Field("text", description="log lines as text or as JSON objects")
    console: Literal["on", "off"] = Field("on", description="serve the web console at /")
    otlp_endpoint: str | None = Field(None, description="OTLP/HTTP collector for traces and metrics (needs [otel])")
    metrics_max_adapters: int = Field(
        100, ge=0, description="adapters with a label of their own in /metrics; the rest share `other`"
    )
    metrics_open: bool = Field(False, description="let everybody read /metrics, with adapters' names, despite keys")
    tenant_max_adapters: int | None = Field(None, ge=0, description="adapters that a tenant may have (default: any)")
    tenant_adapter_bytes: ByteSize | None = Field(None, ge=0, description="bytes of a tenant's adapters on disk")
    tenant_max_pinned: int | None = Field(None, ge=0, description="adapters that a tenant may pin to the device")
    tenant_max_requests: int | None = Field(None, ge=1, description="requests that a tenant may have under way")
    tenant_tokens_per_minute: int | None = Field(None, ge=1, description="tokens of a tenant's prompts and answers")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="type of weights and cache (auto: the checkpoint's; on a CPU float32, unless both checkpoint and "
        "processor have bfloat16; the demo: float32)",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, gt=0, description="CPU threads of the engine (default: torch decides)")
    max_model_len: int | None = Field(None, gt=0, description="longest prompt plus answer in tokens (default: model's)")
    max_num_seqs: int = Field(64, gt=0, description="sequences that run at once")
    max_batched_tokens: int = Field(2048, gt=0, description="tokens of one step")
    max_queue: int = Field(1024, gt=0, description="requests that may wait; beyond it clients get 503")
    max_queue_tokens: int = Field(
        2_000_000, gt=0, description="tokens of prompts that may wait; beyond it clients get 503"
    )
    queue_timeout_seconds: float | None = Field(
        600.0, gt=0, description="how long a request may wait for its first token; then it gets 503"
    )
    request_timeout_seconds: float | None = Field(
        None, gt=0, description="how long an answer may take in all; then it is cut off with 504 (default: any time)"
    )
    step_timeout_seconds: float = Field(
        120.0, ge=5, description="an engine that hangs in a step for so long is replaced (its first step: 5 times)"
    )
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
    lora_fold: Switch = Field(
        "auto", description="add the adapters' second product inside the base's (auto: where measured to be quicker)"
    )
    attention_implementation: Literal["auto", "torch", "triton", "flashinfer"] = Field(
        "auto", description="how attention is computed (auto: triton on CUDA, torch elsewhere)"
    )
    cuda_graphs: Switch = Field("auto", description="replay decode steps as CUDA graphs (auto: on a card)")
    overlap: Switch = Field("auto", description="prepare a step while the device computes the last (auto: on a card)")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a card's memory that may be filled")
    compile_layers: bool = Field(False, description="fuse the model's small operations by torch.compile at start")
    prepacked_weights: Switch = Field(
        "auto", description="on a CPU, keep float32 weights in oneDNN's order, too (auto: if memory is ample)"
    )
    decode_workspace: bool = Field(True, description="on a CPU, keep decoding sequences' keys and values contiguous")
    packed_projections: bool = Field(True, description="compute q, k, v and gate, up as one product each")
    deterministic: bool = Field(False, description="the same bits for a request alone and in any batch (slower)")

    store_dir: Path = Field(default_factory=default_store_dir, description="where uploaded adapters are kept")
    adapter_max_bytes: ByteSize = Field(ByteSize(2 * GIB), gt=0, description="largest adapter that may be uploaded")
    max_adapters: int = Field(10_000, gt=0, description="adapters that may be registered")
    lora_modules: Annotated[tuple[LoraModule, ...], NoDecode] = Field(
        (), description="adapter of this machine to serve from the start, as NAME=DIRECTORY or vLLM's JSON; repeatable"
    )
    adapter_root: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="directory under which /v1/load_lora_adapter may read; repeatable (none: it is switched off)"
    )

    router: Literal["on", "off"] = Field("on", description="answer model `auto` by the adapter that a query needs")
    router_encoder: str = Field(
        "base+ngram", min_length=1,
        description="what embeds queries: base (hidden states), ngram, base+ngram, or a sentence encoder by path, "
        "as PATH or PATH+ngram",
    )  # fmt: skip
    router_layer: int | None = Field(None, ge=0, description="layer of the base's states (default: the middle one)")
    router_max_tokens: int = Field(512, ge=16, description="tokens of a query that the base looks at: its last ones")
    router_base_examples: Path | None = Field(
        None, description="prompts that the base is to answer: a text file, or .jsonl (none: the demo's own)"
    )
    router_scores_bytes: ByteSize = Field(
        ByteSize(64 * MIB), ge=MIB, description="text of queries whose scores are kept for training, the newest"
    )
    router_weights_bytes: ByteSize = Field(
        ByteSize(256 * MIB),
        ge=0,
        description="memory to route by adapters' own weights where nothing else is known (0: never)",
    )
    router_cache_bytes: ByteSize = Field(
        ByteSize(512 * MIB),
        ge=MIB,
        description="file of examples' embeddings, kept so that a start computes none again",
    )
    router_shadow: bool = Field(False, description="compare the router with the model that requests name")

    @field_validator("cors_origin", "served_model_name", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        """Accepts a comma-separated string, a sequence of them, or nothing."""
        items = () if value is None else (value,) if isinstance(value, str) else value
        return tuple(part.strip() for item in items for part in str(item).split(",") if part.strip())

    @field_validator("cors_origin")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Browsers send an origin as scheme, host and port: anything else would never match."""
        for origin in value:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", origin):
                raise ValueError(f"{origin!r} is no origin: write it as https://app.example.org, or * for all")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        """`/v1/traces` and `/v1/metrics` are put behind it."""
        if value is not None and not re.fullmatch(r"https?://[^\s?#@]+", value):
            raise ValueError("must be a URL such as http://collector:4318")
        return value

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, value: str) -> str:
        """With a slash in front and none behind."""
        if value and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value):
            raise ValueError("must be a path such as /llm, without a slash at its end")
        if f"{value}/".startswith("/v1/"):
            raise ValueError("must not begin with /v1, which is where the API's own paths begin")
        return value

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
        "model", "revision", "chat_template", "response_template", "threads", "router_layer", "router_base_examples",
        "ssl_certfile", "ssl_keyfile", "otlp_endpoint", "tenant_max_adapters", "tenant_adapter_bytes",
        "tenant_max_pinned", "tenant_max_requests", "tenant_tokens_per_minute", mode="before",
    )  # fmt: skip
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        """An empty variable, as compose files leave behind, means "not set"."""
        return None if value == "" else value

    @field_validator("served_model_name")
    @classmethod
    def _plain_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """The names travel in URLs, headers and metric labels."""
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,255}", name) or name == "auto":
                raise ValueError("must be letters, digits and ._:/- (256 at most), and not 'auto'")
        return tuple(dict.fromkeys(value))

    @field_validator("lora_modules", mode="before")
    @classmethod
    def _modules(cls, value: Any) -> Any:
        """Accepts one entry, a sequence of them, or nothing; a variable separates entries by white space."""
        texts = () if value is None else (value,) if isinstance(value, str) else value
        return tuple(item for text in texts for item in parse_lora_modules(text))

    @field_validator("lora_modules")
    @classmethod
    def _once(cls, value: tuple[LoraModule, ...]) -> tuple[LoraModule, ...]:
        """Two directories under one name would be two versions of it."""
        names = [module.name for module in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is there twice")
        return value

    @field_validator("adapter_root", mode="before")
    @classmethod
    def _roots(cls, value: Any) -> Any:
        """Accepts one path, a sequence of them, or nothing; a variable separates them as PATH does."""
        items = () if value is None else str(value).split(os.pathsep) if isinstance(value, str | Path) else value
        return tuple(Path(item) for item in items if str(item))

    @field_validator("adapter_root")
    @classmethod
    def _folders(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        """The roots as they are now: what a link points to later changes nothing."""
        for root in value:
            if not root.is_dir():
                raise ValueError(f"no such directory: {root}")
        return tuple(root.resolve() for root in value)

    @field_validator("chat_template", "response_template", "router_base_examples", "ssl_certfile", "ssl_keyfile")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        """The file is read later; a wrong path should fail now."""
        if value is not None and not value.is_file():
            raise ValueError(f"no such file: {value}")
        return value

    @field_validator("model")
    @classmethod
    def _loadable(cls, value: str | None) -> str | None:
        """What is known by its name alone not to load is refused before anything is fetched."""
        return value if value is None else check_model_name(value)

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        """Raises ValueError for values that are fine alone and wrong together."""
        if self.model is None and self.revision is not None:
            raise ValueError("--revision needs --model")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        if self.router_shadow and self.router == "off":
            raise ValueError("--router-shadow needs --router on")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-batched-tokens ({self.max_batched_tokens}) must be at least --max-num-seqs "
                f"({self.max_num_seqs}): every running sequence needs one token per step"
            )
        return self

    @property
    def tenant_limits(self) -> TenantLimits:
        """The limits of tenants that have none of their own."""
        return TenantLimits(
            adapters=self.tenant_max_adapters,
            adapter_bytes=None if self.tenant_adapter_bytes is None else int(self.tenant_adapter_bytes),
            pinned=self.tenant_max_pinned,
            requests=self.tenant_max_requests,
            tokens_per_minute=self.tenant_tokens_per_minute,
        )

    @property
    def base_name(self) -> str:
        """The main name under which the base is served: chosen, or the hub name, or the last part of a path."""
        if self.served_model_name:
            return self.served_model_name[0]
        if self.model is None:
            return "loramux-demo"
        path = Path(self.model).expanduser()
        return path.resolve().name if path.exists() else self.model

    @property
    def base_names(self) -> tuple[str, ...]:
        """All names of the base, the main one first."""
        return self.served_model_name or (self.base_name,)

    def store_root(self, structure: str) -> Path:
        """The store of one base: adapters fit one structure only, so bases never share a directory.

        `structure` is any text that changes when the base's modules or shapes do.
        """
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", self.base_name).strip("-.")[:64] or "base"
        return self.store_dir.expanduser() / f"{slug}-{hashlib.sha256(structure.encode()).hexdigest()[:12]}"

    def to_engine_config(self, model_path: str, blob_dir: str) -> EngineConfig:
        """The engine's part of the settings, for a model that lies at `model_path`.

        The demo's skills were measured in float32: `auto` is that for it, on every device.
        """
        return EngineConfig(
            model_path=model_path,
            blob_dir=blob_dir,
            dtype="float32" if self.model is None and self.dtype == "auto" else self.dtype,
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
            lora_fold=_SWITCHES[self.lora_fold],
            cuda_graphs=_SWITCHES[self.cuda_graphs],
            overlap=_SWITCHES[self.overlap],
            gpu_memory_utilization=self.gpu_memory_utilization,
            deterministic=self.deterministic,
            compile_layers=self.compile_layers,
            prepacked_weights=_SWITCHES[self.prepacked_weights],
            decode_workspace=self.decode_workspace,
            packed_projections=self.packed_projections,
            max_queue=self.max_queue,
            max_queue_tokens=self.max_queue_tokens,
            threads=self.threads,
            log_level=self.log_level,
            log_format=self.log_format,
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
    if value in (None, (), ""):
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
        if info.default == ():
            # several values behind one flag, where none of them can be a command's own argument
            many: dict[str, Any] = {"action": "extend", "nargs": "+"} if names is None else {"action": "append"}
            metavar = name.rsplit("_", 1)[-1].upper()
            parser.add_argument(flag_of(name), dest=name, metavar=metavar, default=argparse.SUPPRESS, help=text, **many)
        elif info.annotation is bool:
            parser.add_argument(
                flag_of(name), dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            metavar = name.rsplit("_", 1)[-1].upper()
            parser.add_argument(flag_of(name), dest=name, metavar=metavar, default=argparse.SUPPRESS, help=text)
    if names is None:
        for name in REFUSED:
            parser.add_argument(
                flag_of(name), dest=name, nargs="?", const="true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )


def load_settings(given: Mapping[str, Any] | None = None) -> Settings:
    """The settings from the given flags and the environment. Raises `SettingsError` with one line per mistake."""
    known = dict(given or {})
    asked = {name: known.pop(name, os.environ.get(variable_of(name))) for name in REFUSED}
    if refusals := [f"{flag_of(name)} (or {variable_of(name)}): {why}" for name, why in check_refused(asked)]:
        raise SettingsError("\n".join(refusals))
    try:
        return Settings(**known)
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
