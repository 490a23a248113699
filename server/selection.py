"""Which devices train a round: uniformly, by Oort's utility, or by that utility inside communities of like devices.

Every selector ranks all candidates and says why each stands where it does; the round asks them in that order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Protocol

import networkx as nx
import numpy as np

from frostline.protocol.messages import Presence
from frostline.protocol.tensors import Array
from frostline.server.config import SelectionTable
from frostline.server.history import DeviceHistory, FleetHistory

SLOWNESS_PENALTY = 2.0
"""Exponent of the penalty for devices slower than the preferred duration: Oort's `round_penalty`."""
CLIPPED_ABOVE = 0.98
"""Utilities above this quantile count as much as it, so that outliers do not rule: Oort's `clip_bound`."""
STALENESS = 0.1
"""Weight of the bonus for devices not seen for long: sqrt(0.1 ln(round) / last round), in Oort's code."""
UNKNOWN = -1
"""Stands for the community of the devices nothing is known of."""
REGROUP_ROUNDS = 10
"""Rounds after which communities are looked for anew."""


@dataclass(frozen=True)
class Candidate:
    """A device that can train the stage.

    Attributes
    ----------
    seconds : float or None
        How long it is expected to take; None if nothing is known.
    """

    presence: Presence
    seconds: float | None

    @property
    def device(self) -> str:
        """Its name."""
        return self.presence.device


@dataclass(frozen=True)
class Ranked:
    """A candidate's place in the order, and why.

    Attributes
    ----------
    community : int or None
        The group of like devices it is in, counted from 0; None where there are no groups.
    utility : float or None
        Statistical utility: its samples times the root of its mean squared loss; None before its first update.
    speed_factor : float or None
        What its slowness leaves of the score, 0 to 1.
    score : float or None
        What devices that were seen before are ordered by.
    """

    device: str
    reason: str
    community: int | None = None
    utility: float | None = None
    speed_factor: float | None = None
    score: float | None = None


class Selector(Protocol):
    """Puts the candidates of a round in order."""

    def rank(self, candidates: Sequence[Candidate], history: FleetHistory, round_number: int) -> list[Ranked]:
        """Every candidate once, those to be asked first in front; the same for the same fleet and rounds."""


def build_selector(settings: SelectionTable, seed: int) -> Selector:
    """The selector a run asks for."""
    if settings.method == "uniform":
        return UniformSelector(seed)
    if settings.method == "oort":
        return OortSelector(settings, seed)
    return CommunitySelector(settings, seed)


@dataclass(frozen=True)
class UniformSelector:
    """Draws devices uniformly, without replacement, reproducibly from `seed` and the round's number."""

    seed: int

    def rank(self, candidates: Sequence[Candidate], history: FleetHistory, round_number: int) -> list[Ranked]:
        """All candidates in random order."""
        names = sorted(candidate.device for candidate in candidates)
        random = np.random.default_rng([self.seed, round_number])
        return [Ranked(names[i], "drawn uniformly") for i in random.permutation(len(names))]


@dataclass(frozen=True)
class OortSelector:
    """Oort's guided selection (Lai et al., "Oort: Efficient Federated Learning via Guided Participant Selection", OSDI 2021).

    The form and the constants are those of its released code. A device's statistical utility is its samples times the
    root of its mean squared loss. Utilities are clipped and scaled to 0..1, a bonus for staleness is added, and devices
    slower than the preferred duration T lose the factor (T/t)^2. For a share of the places, which decays from round to
    round, devices that were never seen are drawn instead, the fast ones more often. T is ours: the median of what the
    candidates are expected to take.

    Fairness is ours too: devices asked in the last `separation` rounds come after all others.
    """

    settings: SelectionTable
    seed: int

    def rank(self, candidates: Sequence[Candidate], history: FleetHistory, round_number: int) -> list[Ranked]:
        """Candidates by score, with unseen ones drawn in between; those asked lately at the end."""
        rested, tired = self.rank_apart(candidates, history, round_number)
        return [*rested, *tired]

    def rank_apart(
        self, candidates: Sequence[Candidate], history: FleetHistory, round_number: int
    ) -> tuple[list[Ranked], list[Ranked]]:
        """The same in two parts: the rested, and those asked lately."""
        random = np.random.default_rng([self.seed, round_number])
        ordered = sorted(candidates, key=lambda candidate: candidate.device)
        lately = {c.device for c in ordered if self._asked_lately(history.of(c.device), round_number)}
        rested = [c for c in ordered if c.device not in lately]
        tired = [c for c in ordered if c.device in lately]
        late = [
            replace(each, reason=f"{each.reason}; rests, since it was asked lately")
            for each in self._mix(tired, ordered, history, round_number, random)
        ]
        return self._mix(rested, ordered, history, round_number, random), late

    def _asked_lately(self, device: DeviceHistory, round_number: int) -> bool:
        return device.last_asked is not None and round_number - device.last_asked <= self.settings.separation

    def _mix(
        self,
        group: Sequence[Candidate],
        everyone: Sequence[Candidate],
        history: FleetHistory,
        round_number: int,
        random: np.random.Generator,
    ) -> list[Ranked]:
        exploit = self._exploit(group, everyone, history, round_number)
        explore = self._explore([c for c in group if _unseen(c, history)], random)
        share = self.exploration(round_number)
        mixed: list[Ranked] = []
        while exploit or explore:
            exploring = bool(explore) and (not exploit or random.random() < share)
            mixed.append((explore if exploring else exploit).pop(0))
        return mixed

    def exploration(self, round_number: int) -> float:
        """Share of a round's places for devices that were never seen."""
        settings = self.settings
        decayed: float = settings.exploration * settings.exploration_decay**round_number
        return max(decayed, settings.exploration_minimum)

    def _explore(self, unseen: Sequence[Candidate], random: np.random.Generator) -> list[Ranked]:
        speeds = np.array([1 / c.seconds if c.seconds else 1.0 for c in unseen])
        # Gumbel's trick: sorted by these keys, devices come as if drawn one by one in proportion to their speeds.
        keys = np.log(speeds) + random.gumbel(size=len(unseen))
        return [Ranked(unseen[i].device, "explored: never seen yet") for i in np.argsort(-keys)]

    def _exploit(
        self,
        group: Sequence[Candidate],
        everyone: Sequence[Candidate],
        history: FleetHistory,
        round_number: int,
    ) -> list[Ranked]:
        utilities = {c.device: _utility(c, history) for c in everyone if not _unseen(c, history)}
        seen = [c for c in group if c.device in utilities]
        if not seen:
            return []
        known = np.array(list(utilities.values()))
        clip = float(np.quantile(known, CLIPPED_ABOVE))
        least = float(known.min())
        durations = [c.seconds for c in everyone if c.seconds]
        preferred = float(np.median(durations)) if durations else 0.0
        ranked = []
        for candidate in seen:
            utility = utilities[candidate.device]
            past = history.of(candidate.device)
            score = (min(utility, clip) - least) / max(clip - least, 1e-4)
            last = (past.last_asked or 0) + 1
            score += float(np.sqrt(STALENESS * np.log(round_number + 1) / last))
            slow = bool(candidate.seconds and preferred and candidate.seconds > preferred)
            factor = (
                (preferred / candidate.seconds) ** SLOWNESS_PENALTY if slow and candidate.seconds else 1.0
            )
            reason = f"utility {utility:.0f}"
            if slow:
                reason += f", times {factor:.2f} as slower than the median"
            ranked.append(
                Ranked(candidate.device, reason, utility=utility, speed_factor=factor, score=score * factor)
            )
        return sorted(ranked, key=lambda each: (-(each.score or 0.0), each.device))


class CommunitySelector:
    """Goes round communities of like devices, and inside each by Oort's utility.

    SmartFreeze (Wu et al., IWQoS 2024) selects by communities of devices; its similarity measure and its algorithm were
    not published in full, so both are ours: the cosine of the devices' signatures (`FleetHistory.signature`), each device
    joined to its nearest neighbours, and Louvain's method (Blondel et al., 2008) on that graph. Devices nothing is
    known of form a community of their own, until they were asked once.
    """

    def __init__(self, settings: SelectionTable, seed: int) -> None:
        self._settings = settings
        self._seed = seed
        self._oort = OortSelector(settings, seed)
        self._communities: dict[str, int] = {}
        self._grouped: tuple[int, frozenset[str]] | None = None

    def rank(self, candidates: Sequence[Candidate], history: FleetHistory, round_number: int) -> list[Ranked]:
        """The best of each community, then the second of each, and so on; another community begins each round."""
        self._group(candidates, history, round_number)
        rested, tired = self._oort.rank_apart(candidates, history, round_number)
        return [*self._interleave(rested, round_number), *self._interleave(tired, round_number)]

    def _interleave(self, ranked: Sequence[Ranked], round_number: int) -> list[Ranked]:
        groups: dict[int, list[Ranked]] = {}
        for each in ranked:
            community = self._communities.get(each.device)
            key = UNKNOWN if community is None else community
            groups.setdefault(key, []).append(replace(each, community=community))
        names = sorted(groups)
        turn = round_number % len(names) if names else 0
        rows = zip_longest(*(groups[name] for name in [*names[turn:], *names[:turn]]))
        return [each for row in rows for each in row if each is not None]

    def _group(self, candidates: Sequence[Candidate], history: FleetHistory, round_number: int) -> None:
        found = {c.device: history.signature(c.presence) for c in candidates}
        signatures = {device: each for device, each in found.items() if each is not None}
        state = (round_number // REGROUP_ROUNDS, frozenset(signatures))
        if state != self._grouped:
            self._grouped = state
            self._communities = communities(signatures, self._seed)


def communities(signatures: dict[str, Array], seed: int) -> dict[str, int]:
    """The community of each device, counted from 0, by Louvain's method on the graph of nearest neighbours.

    Parameters
    ----------
    signatures : dict of str to array
        Vectors of length 1; those of another number of values than most have are not compared.
    """
    lengths = Counter(len(each) for each in signatures.values())
    commonest = max(lengths, key=lambda length: (lengths[length], length), default=0)
    names = sorted(name for name, each in signatures.items() if len(each) == commonest)
    if len(names) < 2:
        return dict.fromkeys(names, 0)
    similarity = np.stack([signatures[name] for name in names])
    similarity = similarity @ similarity.T
    np.fill_diagonal(similarity, -np.inf)
    neighbours = min(max(2, round(len(names) ** 0.5)), len(names) - 1)
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(names)
    for i, name in enumerate(names):
        for j in np.argpartition(-similarity[i], neighbours - 1)[:neighbours]:
            if similarity[i, j] > 0:
                graph.add_edge(name, names[j], weight=float(similarity[i, j]))
    found = nx.community.louvain_communities(graph, seed=seed)
    largest_first = sorted(found, key=lambda community: (-len(community), min(community)))
    return {device: number for number, community in enumerate(largest_first) for device in community}


def _unseen(candidate: Candidate, history: FleetHistory) -> bool:
    return history.of(candidate.device).squared_loss is None


def _utility(candidate: Candidate, history: FleetHistory) -> float:
    squared_loss = history.of(candidate.device).squared_loss or 0.0
    return candidate.presence.samples * float(squared_loss**0.5)
