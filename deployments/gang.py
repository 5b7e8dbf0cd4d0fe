"""A gang's actors: placed in their replica's placement group, made, brought together, and replaced if one is lost."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.logs import LOGGER
from deployments.options import Options
from deployments.workers import MEETING_SECONDS, Part, RowWorker, WorkerFacts
from mage_ray.errors import UserError

NAMESPACE = "mage_ray"
"""Of the leaders' names, by which other replicas find them."""
_LOADING_SECONDS = 600.0


def leader_name(gang: str) -> str:
    """The name of a gang's first actor."""
    return f"gang-{gang}"


class Lost(Exception):
    """The gang can't go on as it is."""


@dataclass
class Member:
    """An actor and what it said of itself; None while it loads."""

    actor: Any
    facts: WorkerFacts | None = None


class Actors:
    """The actors of one gang. ``parts[0]`` leads; the bundle of each is that of its place."""

    def __init__(self, name: str, parts: Sequence[Part], options: Options) -> None:
        self.name = name
        self._parts, self._options = list(parts), options
        self._members: list[Member | None] = [None] * len(parts)
        self._met = False

    @property
    def leader(self) -> Any:
        """The first actor. Only once they are together."""
        member = self._members[0]
        assert member is not None
        return member.actor

    @property
    def facts(self) -> list[WorkerFacts]:
        """What its members, the leader first, have said of themselves. Only once they are together."""
        return [member.facts for member in self._members if member is not None and member.facts is not None]

    async def together(self) -> None:
        """Have all members alive, in one new group, with a new engine at its head.

        Raises UserError for what no new try can mend, and Lost, or an error of Ray's, for the rest. What a worker can't
        load is final only at first: a gang that has been together had it all, and will again.
        """
        for place, member in enumerate(self._members):
            if member is None:
                self._members[place] = self._make(place)
        members = [member for member in self._members if member is not None]
        facts = await _all([member.actor.load.remote() for member in members], _LOADING_SECONDS, final=not self._met)
        for member, said in zip(members, facts, strict=True):
            member.facts = said
        if len({said.vocabulary for said in facts}) > 1:
            sizes = " and ".join(str(said.vocabulary) for said in facts[:2])
            raise UserError(f"guide_study: got vocabularies of {sizes} tokens, allowed: equal ones")
        options, size, seconds = self._options, len(members), self._options.patience
        backend = "nccl" if size > 1 and self._own_gpus(facts) else "gloo"
        address = facts[0].address
        # Whoever still waits for a member of the last group must find that out first.
        wait = MEETING_SECONDS + seconds
        for member in members:
            await _all([member.actor.leave.remote(seconds)], wait)
        port = (await _all([members[0].actor.open.remote(address, size)], wait))[0] if size > 1 else 0
        joins = [m.actor.join.remote(address, port, rank, size, backend) for rank, m in enumerate(members)]
        await _all(joins, wait)
        await _all([member.actor.follow.remote(backend) for member in members[1:]], wait)
        await _all([self.leader.lead.remote(size - 1, backend, seconds, options.queue, options.chunk)], wait)
        self._met = True

    def _own_gpus(self, facts: Sequence[WorkerFacts]) -> bool:
        whole = all(amount >= 1 for amount in (self._options.gpus, self._options.guide_gpus))
        return whole and all(said.device == "cuda" for said in facts)

    async def sift(self) -> int:
        """Kill the members that don't answer; how many that were.

        All are waited for first, and are members until then: who has called for the leader meanwhile finds one.
        """
        pings = {place: member.actor.ping.remote() for place, member in enumerate(self._members) if member is not None}
        there = await asyncio.gather(*(_answers(ping, self._options.patience / 2) for ping in pings.values()))
        lost = [place for place, answered in zip(pings, there, strict=True) if not answered]
        for place in lost:
            LOGGER.warning("a worker is gone", extra={"gang": self.name, "worker": place})
            self._kill(place)
        return len(lost)

    def end(self) -> None:
        """Kill all."""
        for place in range(len(self._members)):
            self._kill(place)

    def _kill(self, place: int) -> None:
        member = self._members[place]
        self._members[place] = None
        if member is not None:
            ray.kill(member.actor)

    def _make(self, place: int) -> Member:
        part = self._parts[place]
        options = self._options
        gpus = options.gpus if place == 0 else options.guide_gpus
        group = ray.util.get_current_placement_group()
        # The bundle is what counts. Half of its GPU is asked for, so that after a reload the next gang's worker can
        # load beside the one that still ends its answers.
        asked: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus / 2}
        if group is not None:
            asked["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place)
        if place == 0:
            # A member that was lost may hold its name for a moment.
            asked |= {"name": leader_name(self.name), "namespace": NAMESPACE}
        threads = {name: str(part.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        actor = ray.remote(RowWorker).options(
            max_concurrency=1000, runtime_env={"env_vars": threads}, max_restarts=0, **asked
        )
        return Member(actor.remote(part))


def new_name() -> str:
    """For a gang; part of its requests' ids."""
    return uuid.uuid4().hex[:12]


async def _answers(ref: Any, seconds: float) -> bool:
    try:
        await asyncio.wait_for(asyncio.wrap_future(ref.future()), seconds)
    except (ray.exceptions.RayError, TimeoutError):
        return False
    return True


async def _all(refs: Sequence[Any], seconds: float, final: bool = False) -> list[Any]:
    """The results. Raises Lost when they take too long or one raised, or Ray's own error of a worker that is gone.

    With ``final`` a UserError that one raised stays what it is.
    """
    futures = [asyncio.wrap_future(ref.future()) for ref in refs]
    try:
        return await asyncio.wait_for(asyncio.gather(*futures), seconds)
    except TimeoutError:
        raise Lost("a worker takes too long") from None
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if final and isinstance(error.cause, UserError) else Lost(str(error.cause))) from None
