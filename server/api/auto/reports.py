"""Between the wire and the router: a request's options, and a decision as clients see it."""

from loramux.router.options import RouteOptions, RouterError
from loramux.router.policy import Decision
from loramux.server.api.errors import APIError, bad_request
from loramux.server.api.schemas.common import CandidateScore, Chosen, RouterParams, RouterReport


def refused(error: RouterError) -> APIError:
    """The 400 that names the option at fault."""
    field = f"router.{error.field}"
    return bad_request(f"{field}: {error.message}", field, "invalid_value")


def options_of(params: RouterParams | None) -> RouteOptions:
    """The options of a request. Raises a 400 that names the one no decision could follow."""
    if params is None:
        return RouteOptions()
    given = {name: value for name, value in params if value is not None and name != "explain"}
    try:
        return RouteOptions.from_mapping(given)
    except RouterError as error:
        raise refused(error) from None


def chosen_of(decision: Decision) -> list[Chosen]:
    """The set, heaviest first; empty for the base."""
    return [Chosen(name=name, weight=weight) for name, weight in decision.chosen]


def report_of(decision: Decision, *, explain: bool) -> RouterReport:
    """The decision as the body shows it; the reason in words only to `explain`."""
    report = RouterReport(
        chosen=chosen_of(decision),
        rung=decision.rung,
        threshold=decision.threshold,
        abstained=decision.abstained,
        milliseconds=round(decision.milliseconds, 3),
        scores=[CandidateScore(name=name, score=score) for name, score in decision.scores],
    )
    if explain:
        report.reason = decision.reason
    return report
