"""Settings: flags, variables, sizes, and messages a person can act on."""

import argparse
from pathlib import Path

import pytest

from loramux.server.lora_modules import LoraModule
from loramux.server.settings import Settings, SettingsError, add_arguments, flag_of, load_settings, variable_of


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable_of(name), raising=False)


def parse(*flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return load_settings(vars(parser.parse_args(flags)))


def test_defaults_are_valid() -> None:
    settings = parse()
    assert settings.model is None
    assert settings.base_name == "loramux-demo"
    assert settings.api_key == ()


SAMPLES = {
    "model": ("org/name", "org/name"), "revision": None, "served_model_name": ("a/b", ("a/b",)), "chat_template": None,
    "response_template": None,
    "host": ("0.0.0.0", "0.0.0.0"), "port": ("0", 0), "api_key": None, "max_request_bytes": ("2MiB", 2 << 20),
    "body_timeout_seconds": ("2.5", 2.5), "drain_seconds": ("0", 0.0), "log_level": ("debug", "debug"),
    "console": ("off", "off"),
    "metrics_max_adapters": ("3", 3), "dtype": ("bfloat16", "bfloat16"), "device": ("cuda:1", "cuda:1"),
    "threads": ("2", 2), "max_model_len": ("512", 512), "max_num_seqs": ("4", 4), "max_batched_tokens": ("128", 128),
    "max_queue": ("9", 9), "max_queue_tokens": ("99", 99), "queue_timeout_seconds": ("1.5", 1.5),
    "request_timeout_seconds": ("60", 60.0), "block_size": ("32", 32), "kv_cache_bytes": ("1GiB", 1 << 30),
    "enable_prefix_caching": ("false", False), "device_adapter_bytes": ("64MB", 64_000_000),
    "host_adapter_bytes": ("5000", 5000), "max_adapters_per_set": ("2", 2), "packed_projections": ("0", False),
    "max_set_rank": ("64", 64), "max_device_adapters": ("7", 7), "lora_implementation": ("torch", "torch"),
    "decode_workspace": ("no", False), "attention_implementation": ("torch", "torch"), "cuda_graphs": ("off", "off"),
    "overlap": ("on", "on"), "compile_layers": ("1", True), "deterministic": ("1", True),
    "prepacked_weights": ("on", "on"),
    "lora_overlap": ("stream", "stream"), "lora_fold": ("on", "on"), "gpu_memory_utilization": ("0.5", 0.5),
    "store_dir": ("/tmp/x", Path("/tmp/x")), "adapter_max_bytes": ("1GiB", 1 << 30), "max_adapters": ("5", 5),
    "metrics_open": ("1", True), "tenant_max_adapters": ("4", 4), "tenant_adapter_bytes": ("1GiB", 1 << 30),
    "tenant_max_pinned": ("0", 0), "tenant_max_requests": ("8", 8), "tenant_tokens_per_minute": ("9000", 9000),
    "router": ("off", "off"), "router_encoder": ("ngram", "ngram"), "router_layer": ("3", 3),
    "router_max_tokens": ("64", 64), "router_base_examples": None, "router_shadow": ("1", True),
    "router_weights_bytes": ("0", 0), "router_cache_bytes": ("2MiB", 2 << 20),
    "router_scores_bytes": ("2MiB", 2 << 20), "root_path": ("/llm", "/llm"), "ssl_certfile": None, "ssl_keyfile": None,
    "cors_origin": ("https://a.example", ("https://a.example",)), "max_connections": ("7", 7),
    "max_header_bytes": ("8KiB", 8 << 10), "header_timeout_seconds": ("3.5", 3.5), "keep_alive_seconds": ("6", 6.0),
    "lora_modules": ("a=/b", (LoraModule("a", "/b"),)), "adapter_root": ("/", (Path("/"),)),
    "log_format": ("json", "json"), "step_timeout_seconds": ("30", 30.0), "otlp_endpoint": ("http://collector:4318", "http://collector:4318"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_has_a_flag_and_a_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = SAMPLES[name]
    if sample is None:
        return
    text, value = sample
    if isinstance(value, bool):
        assert getattr(parse(flag_of(name) if value else "--no-" + flag_of(name)[2:]), name) is value
    else:
        assert getattr(parse(flag_of(name), text), name) == value
    monkeypatch.setenv(variable_of(name), text)
    assert getattr(parse(), name) == value


def test_a_flag_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_PORT", "1")
    assert parse("--port", "2").port == 2


def test_empty_variables_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "MODEL", "API_KEY", "THREADS", "SERVED_MODEL_NAME", "CHAT_TEMPLATE", "LORA_MODULES", "ADAPTER_ROOT",
        "QUANTIZATION",
    ):  # fmt: skip
        monkeypatch.setenv(f"LORAMUX_{name}", "")
    settings = parse()
    assert (settings.model, settings.api_key, settings.threads) == (None, (), None)
    assert (settings.base_names, settings.lora_modules, settings.adapter_root) == (("loramux-demo",), (), ())


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse("--api-key", "a", "--api-key", "b, c")
    assert [key.get_secret_value() for key in settings.api_key] == ["a", "b", "c"]
    monkeypatch.setenv("LORAMUX_API_KEY", "x,y")
    assert [key.get_secret_value() for key in parse().api_key] == ["x", "y"]
    assert "'x'" not in repr(parse())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "70000"), ("port", "http"), ("dtype", "int4"), ("device", "gpu"), ("max_model_len", "0"),
        ("max_num_seqs", "-1"), ("kv_cache_bytes", "2 elephants"), ("host_adapter_bytes", "0"), ("log_level", "loud"),
        ("body_timeout_seconds", "nan"), ("drain_seconds", "inf"), ("chat_template", "/no/such/file"),
        ("served_model_name", "auto"), ("served_model_name", "a b"), ("enable_prefix_caching", "maybe"),
        ("root_path", "llm"), ("root_path", "/llm/"), ("root_path", "/v1"), ("otlp_endpoint", "collector:4318"),
        ("cors_origin", "app.example"),
        ("cors_origin", "https://a.example/"), ("ssl_certfile", "/no/such/file"), ("log_format", "xml"),
        ("max_header_bytes", "10"), ("max_connections", "0"), ("served_model_name", "a,auto"),
        ("lora_modules", "name"), ("lora_modules", "a=/x a=/y"), ("lora_modules", "{"), ("lora_modules", "[1]"),
        ("lora_modules", '{"name": "a", "path": 1}'), ("lora_modules", '{"name": "a", "path": "b", "c": 1}'),
        ("adapter_root", "/no/such/folder"), ("model", "org/name-GGUF"), ("model", "./weights.gguf"),
        ("tensor_parallel_size", "2"), ("pipeline_parallel_size", "2"), ("data_parallel_size", "4"),
        ("quantization", "awq"), ("load_format", "gguf"), ("trust_remote_code", "true"),
    ],
)  # fmt: skip
def test_mistakes_are_named(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable_of(name), text)
    with pytest.raises(SettingsError) as caught:
        parse()
    assert flag_of(name) in str(caught.value)
    assert variable_of(name) in str(caught.value)


def test_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("--cors-origin", "http://a:1", "--cors-origin", "http://b, *").cors_origin == (
        "http://a:1", "http://b", "*",
    )  # fmt: skip
    monkeypatch.setenv("LORAMUX_CORS_ORIGIN", "")
    assert parse().cors_origin == ()


def test_a_key_needs_its_certificate(tmp_path: Path) -> None:
    (tmp_path / "key.pem").touch()
    with pytest.raises(SettingsError, match="--ssl-certfile"):
        parse("--ssl-keyfile", str(tmp_path / "key.pem"))


def test_mistakes_between_settings() -> None:
    with pytest.raises(SettingsError, match="--max-batched-tokens"):
        parse("--max-batched-tokens", "8", "--max-num-seqs", "16")
    with pytest.raises(SettingsError, match="--model"):
        parse("--revision", "main")


def test_names(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert parse("--model", str(folder)).base_name == "my-model"
    assert parse("--model", "Qwen/Qwen3-0.6B").base_name == "Qwen/Qwen3-0.6B"
    assert parse("--model", "Qwen/Qwen3-0.6B", "--served-model-name", "qwen").base_name == "qwen"


def test_several_names() -> None:
    settings = parse("--served-model-name", "a", "b,c", "--served-model-name", "a")
    assert settings.base_names == ("a", "b", "c")
    assert settings.base_name == "a"


def test_a_commands_own_argument_is_not_taken_for_a_name() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tenant")
    add_arguments(parser, {"served_model_name"})
    args = parser.parse_args(["--served-model-name", "a", "team"])
    assert (args.tenant, args.served_model_name) == ("team", ["a"])


def test_adapters_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = ["a=/x=1", '{"name": "b", "path": "/y z", "base_model_name": "m"}', '[{"name": "c", "path": "/w"}]']
    expected = (LoraModule("a", "/x=1"), LoraModule("b", "/y z"), LoraModule("c", "/w"))
    assert parse("--lora-modules", *forms).lora_modules == expected
    monkeypatch.setenv("LORAMUX_LORA_MODULES", "a=/x=1 b=/y")
    assert [module.name for module in parse().lora_modules] == ["a", "b"]


def test_roots_are_what_they_are_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert parse("--adapter-root", str(tmp_path / "link")).adapter_root == (tmp_path / "real",)
    monkeypatch.setenv("LORAMUX_ADAPTER_ROOT", f"{tmp_path}:{tmp_path / 'real'}")
    assert parse().adapter_root == (tmp_path, tmp_path / "real")


def test_what_other_servers_have_says_what_would_work(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="load balancer"):
        parse("--tensor-parallel-size", "2")
    with pytest.raises(SettingsError, match="unquantised"):
        parse("--quantization", "gptq")
    with pytest.raises(SettingsError, match="never run"):
        parse("--trust-remote-code")
    assert parse("--tensor-parallel-size", "1", "--load-format", "safetensors").model is None
    (tmp_path / "model-Q4.gguf").touch()
    with pytest.raises(SettingsError, match="safetensors"):
        parse("--model", str(tmp_path))


def test_bases_do_not_share_a_store(tmp_path: Path) -> None:
    a = parse("--model", "org/a", "--store-dir", str(tmp_path))
    b = parse("--model", "org/b", "--store-dir", str(tmp_path))
    roots = {
        a.store_root("x"),
        a.store_root("y"),
        b.store_root("x"),
        parse("--store-dir", str(tmp_path)).store_root("x"),
    }
    assert len(roots) == 4
    assert a.store_root("x") == a.store_root("x")
    assert all(root.parent == tmp_path for root in roots)
    odd = parse("--served-model-name", "a/../../b", "--store-dir", str(tmp_path)).store_root("x")
    assert odd.parent == tmp_path


def test_engine_config() -> None:
    config = parse("--kv-cache-bytes", "1MiB", "--max-num-seqs", "3", "--no-packed-projections").to_engine_config(
        "m", "b"
    )
    assert (config.model_path, config.blob_dir, config.kv_cache_bytes, config.max_num_seqs) == ("m", "b", 1 << 20, 3)
    assert config.packed_projections is False
    assert type(config.device_adapter_bytes) is int


def test_help_names_every_variable() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    for name in Settings.model_fields:
        assert flag_of(name) in text
        assert variable_of(name) in text
