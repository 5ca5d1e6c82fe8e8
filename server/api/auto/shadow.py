"""Routing without acting: what the router would have chosen for requests that name their model, beside their answers.

Requests never wait for it. A bounded number may be under way or waiting; beyond it they go without.
"""

import asyncio
import logging
from collections import deque

from loramux.router.options import RouteOptions, RouterError
from loramux.router.policy import Decision
from loramux.server.api.auto.ending import end
from loramux.server.api.auto.reports import chosen_of
from loramux.server.api.auto.service import RouterService
from loramux.server.api.metrics import Metrics
from loramux.server.api.schemas.common import ShadowReport
from loramux.server.engine.protocol import EngineError

logger = logging.getLogger(__name__)

MAX_WAITING = 64
WORKERS = 2


class ShadowTicket:
    """One request's comparison: `actual` are the keys of the adapters that serve it, none for the base.

    The report has the reason in words only to `explain`.
    """

    def __init__(
        self,
        text: str,
        options: RouteOptions,
        salt: str,
        actual: frozenset[str],
        tenant: str | None = None,
        *,
        explain: bool = False,
    ) -> None:
        self.text = text
        self.options = options
        self.salt = salt
        self.actual = actual
        self.tenant = tenant
        self.explain = explain
        self.dropped = False
        self.failed = False
        self.decision: Decision | None = None

    @property
    def agrees(self) -> bool:
        """Whether the router chose what was named: the same adapters, whatever their weights."""
        return self.decision is not None and {name for name, _ in self.decision.chosen} == self.actual

    def report(self) -> ShadowReport:
        """What is known at this moment."""
        if self.decision is None:
            return ShadowReport(status="dropped" if self.dropped else "failed" if self.failed else "pending")
        report = ShadowReport(
            status="decided",
            agrees=self.agrees,
            chosen=chosen_of(self.decision),
            rung=self.decision.rung,
            milliseconds=round(self.decision.milliseconds, 3),
        )
        if self.explain:
            report.reason = self.decision.reason
        return report


class Shadow:
    """The queue and the workers that decide what is in it, oldest first."""

    def __init__(self, router: RouterService, metrics: Metrics) -> None:
        self._router = router
        self._metrics = metrics
        self._waiting: deque[ShadowTicket] = deque()
        self._running: set[asyncio.Task[None]] = set()

    def offer(self, ticket: ShadowTicket) -> ShadowTicket:
        """Takes a request of a tenant's (see `RouterService.decide`) in if there is room; returns it at once."""
        if len(self._waiting) >= MAX_WAITING:
            ticket.dropped = True
            self._metrics.shadowed("dropped")
            return ticket
        self._waiting.append(ticket)
        if len(self._running) < WORKERS:
            task = asyncio.create_task(self._work(), name="router-shadow")
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return ticket

    async def _work(self) -> None:
        while self._waiting:
            ticket = self._waiting.popleft()
            try:
                ticket.decision = await self._router.decide(
                    ticket.text, ticket.options, tenant=ticket.tenant, salt=ticket.salt
                )
            except (RouterError, EngineError) as error:
                logger.info("a request was not routed in the shadow: %s", error)
                ticket.failed = True
            except Exception:
                logger.exception("a request could not be routed in the shadow")
                ticket.failed = True
            if ticket.failed:
                self._metrics.shadowed("failed")
            else:
                self._metrics.shadowed("agree" if ticket.agrees else "disagree")

    async def stop(self) -> None:
        """Ends what is under way."""
        self._waiting.clear()
        await end(self._running)
