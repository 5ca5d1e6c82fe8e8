"""How tenants and adapters are named: patterns, and the two ways to write one adapter's name.

An adapter is (owner, name). Its *key* is what the server uses inside, the same whoever asks: `name` for the local
tenant's, else `owner/name`. Its *address* is what one tenant calls it: `name` for its own, else `owner/name`. Neither
part holds a slash, so both forms have one meaning.
"""

import re
from typing import Final

LOCAL_TENANT: Final = "default"
"""Who everybody is while no keys exist, and whose the keys given as settings are."""
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Of adapters and of tenants; `fullmatch` it."""
VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,8}")


def key_of(owner: str, name: str) -> str:
    """The name inside the server of the adapter that `owner` calls `name`."""
    return name if owner == LOCAL_TENANT else f"{owner}/{name}"


def owner_and_name(key: str) -> tuple[str, str]:
    """What `key_of` was made of."""
    owner, slash, name = key.rpartition("/")
    return (owner, name) if slash else (LOCAL_TENANT, name)


def address_of(key: str, tenant: str) -> str:
    """What `tenant` calls the adapter with this key."""
    owner, name = owner_and_name(key)
    return name if owner == tenant else f"{owner}/{name}"


def key_at(address: str, tenant: str) -> str:
    """The key of what `tenant` calls `address`, a version left out; says nothing of whether it exists."""
    owner, slash, name = address.partition("@")[0].rpartition("/")
    return key_of(owner if slash else tenant, name)
