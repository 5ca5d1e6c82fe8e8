"""Adapters from this machine's own disk: `--lora-modules` at start, vLLM's load and unload requests while it runs.

`POST /v1/load_lora_adapter` reads only below `--adapter-root`, and what it reads passes the checks of an upload. With
keys, both requests are for those with the role `admin`; the adapter belongs to the key's tenant.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from loramux.adapters_store.errors import AdapterError
from loramux.adapters_store.folder import MAX_PATH_CHARS, copy_folder, copy_from_root
from loramux.adapters_store.storage import Upload
from loramux.adapters_store.store import AdapterStore
from loramux.server.api.adapters import take_in, take_out
from loramux.server.api.caller import From
from loramux.server.api.errors import APIError, bad_request
from loramux.server.api.schemas.common import Flag, RequestModel, Text
from loramux.server.api.state import State, in_thread
from loramux.server.api.uploads import Form
from loramux.server.lora_modules import LoraModule

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1")


class LoraModuleError(Exception):
    """An adapter of `--lora-modules` cannot be served; the message names it and says why."""


class LoadRequest(RequestModel):
    """vLLM's. `load_inplace` makes the files a new version of a name that there is already."""

    lora_name: Text = Field(min_length=1, max_length=128)
    lora_path: Text = Field(min_length=1, max_length=MAX_PATH_CHARS)
    load_inplace: Flag


class UnloadRequest(RequestModel):
    """vLLM's. The number is vLLM's own and says nothing here: names are unique."""

    lora_name: Text = Field(min_length=1, max_length=128)
    lora_int_id: int | None = None


def register_modules(store: AdapterStore, modules: Sequence[LoraModule]) -> None:
    """Puts the settings' adapters into the store: a new version where the files have changed. Raises `LoraModuleError`.

    Blocks; for the start.
    """
    for module in modules:
        try:
            with store.begin_upload() as upload:
                copy_folder(Path(module.path).expanduser(), upload)
                found = store.commit(upload, name=module.name)
        except AdapterError as error:
            raise LoraModuleError(f"--lora-modules {module.name}={module.path}: {error}") from None
        logger.info("adapter %s is served from --lora-modules", found.adapter.id)


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadRequest, state: State, caller: From) -> Response:
    """Registers an adapter that lies below `--adapter-root`. It serves the next request."""
    roots = state.settings.adapter_root
    if not roots:
        raise APIError(
            403, "Loading from the server's disk is switched off: start it with --adapter-root, or send the files to "
            "POST /v1/adapters.", param="lora_path", code="adapter_root_missing",
        )  # fmt: skip
    if not body.load_inplace and await state.in_store(_is_there, state.store, body.lora_name, caller.tenant):
        raise bad_request(
            f"The adapter {body.lora_name!r} has already been loaded: send `load_inplace: true` to replace it.",
            "lora_name", "name_taken",
        )  # fmt: skip

    async def copy(upload: Upload) -> Form:
        await in_thread(state.upload_threads, partial(copy_from_root, body.lora_path, roots, upload))
        return Form({"name": body.lora_name})

    _, headers = await take_in(state, caller, copy)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.", headers=headers)


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadRequest, state: State, caller: From) -> Response:
    """Deletes an adapter of the caller's, as `DELETE /v1/adapters/{name}` does."""
    await take_out(state, caller, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _is_there(store: AdapterStore, name: str, owner: str) -> bool:
    """Whether the owner has such an adapter. Blocks."""
    try:
        store.own(name, owner=owner)
    except AdapterError:
        return False
    return True
