"""Where `loramux keys` and `loramux tenants` find tenants: a store's folder, while a server runs on it or not, or a
server's admin API."""

import argparse
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux.adapters_store.errors import AdapterError, StoreUnavailableError
from loramux.adapters_store.schema import REGISTRY_FILE
from loramux.adapters_store.tenants import Tenants
from loramux.server.cli_client import REFUSED, USAGE, Api, CommandError
from loramux.server.settings import Settings, add_arguments, load_settings

STORE_SETTINGS = frozenset({"model", "revision", "served_model_name", "store_dir"})


def store_parser() -> argparse.ArgumentParser:
    """The flags that name a store's folder, to be a parser's parent."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser, STORE_SETTINGS)
    return parser


def store_root(settings: Settings) -> Path:
    """The folder of the store that a server with these settings uses. Raises `CommandError`."""
    from loramux.adapters_store.base_spec import base_spec_from_config
    from loramux.server.api.serve import ServeError, find_model, structure_of
    from loramux.server.engine.loading import (
        UnsupportedModelError,
        load_config,
    )  # torch and transformers take seconds: not for other commands

    try:
        spec = base_spec_from_config(load_config(find_model(settings)), name=settings.base_name)
    except (ServeError, UnsupportedModelError) as error:
        raise CommandError(str(error)) from error
    return settings.store_root(structure_of(spec))


@contextmanager
def registry_of(api: Api, args: argparse.Namespace) -> Iterator[Api | Tenants]:
    """The server at --url or LORAMUX_URL where one is given, else what is in the store's folder.

    A server that runs on the folder hears of changes with its next request. Raises `CommandError`, also for what the
    registry refuses while it is open here.
    """
    given = {name: value for name, value in vars(args).items() if name in STORE_SETTINGS}
    if args.url and given:
        raise CommandError("give either --url or the server's own settings (--model, --store-dir), not both", USAGE)
    if args.url or (os.environ.get("LORAMUX_URL") and not given):
        yield api
        return
    root = store_root(load_settings(given))
    try:
        root.mkdir(parents=True, exist_ok=True)
        tenants = Tenants(root / REGISTRY_FILE)
    except (StoreUnavailableError, sqlite3.Error, OSError) as error:
        raise CommandError(f"{root}: {error}") from error
    try:
        yield tenants
    except AdapterError as error:
        raise CommandError(str(error), USAGE if error.status == 400 else REFUSED) from None
    except sqlite3.Error as error:
        raise CommandError(f"{root}: {error}") from error
    finally:
        tenants.close()
