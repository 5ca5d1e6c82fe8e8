"""Structured output: what a request holds its answer to, checked before anything is generated."""

from loramux.server.api.errors import bad_request, unavailable
from loramux.server.api.grammar_check import Model, WorkerLostError
from loramux.server.api.schemas.structured import Named, StructuredFields
from loramux.server.api.state import ServerState
from loramux.server.engine.grammars import ConstraintError
from loramux.server.engine.protocol import Constraint


async def check_constraint(
    state: ServerState, constraint: Constraint, field_name: str, *, tenant: str = ""
) -> Constraint:
    """The constraint as the engine takes it, compiled once off the event loop, within bounds of time and memory.

    Raises a 400 that names the field and says why it cannot be followed, a 503 when that could not be found out.
    """
    info = state.require_engine()
    model = Model(state.renderer.definition, state.vocab_size, info.eos_token_ids)
    try:
        return await state.grammars.check(constraint, model, tenant)
    except ConstraintError as error:
        raise bad_request(f"{field_name} cannot be followed: {error}", field_name, "invalid_constraint") from None
    except WorkerLostError as error:
        raise unavailable(f"The constraint could not be checked: {error}.", code="grammar_check_failed") from None


def one_constraint(fields: StructuredFields) -> Named | None:
    """The request's constraint and its field. Raises a 400 for more than one."""
    found = list(fields.constraints())
    if len(found) > 1:
        raise bad_request(
            f"{found[0][0]} and {found[1][0]} exclude each other: an answer has one constraint.", found[1][0],
            "invalid_value",
        )  # fmt: skip
    return found[0] if found else None


async def checked_constraint(state: ServerState, fields: StructuredFields, tenant: str) -> Constraint | None:
    """What the request holds its answer to, as the engine takes it; see `one_constraint` and `check_constraint`."""
    found = one_constraint(fields)
    return None if found is None else await check_constraint(state, found[1], found[0], tenant=tenant)
