"""Long tails that continue in the next step instead of holding up this one (partial rollouts).

Off by default. With an allowance of c groups a rollout may end when all but c of its new groups are complete; what
those c have generated so far is kept and continued, by the next weights, in the next step. A carried group must then
complete, so no sample is older than one step and long answers are delayed, never dropped: the c that finish last are
carried, whatever their length. Every token keeps the log-probability under the weights that drew it, which is what
truncated importance sampling divides by (objective.tis_cap), and the sample bears the oldest version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from m2rl.rollout.engine import Finished
from m2rl.rollout.sharing import Sharing
from m2rl.types import Prompt, Sample


@dataclass(slots=True)
class Group:
    """A prompt's n samples in the making."""

    place: tuple[int, int]  # (step, position in that step's batch): the order of the result
    prompt: Prompt
    samples: list[Sample | None]  # [n] complete ones
    begun: dict[int, Finished] = field(default_factory=dict)  # by index: what earlier weights have generated

    @property
    def complete(self) -> bool:
        return all(s is not None for s in self.samples)


class CarryOver:
    """The groups that this rank's engine left unfinished, and the rule by which a rollout may end early."""

    def __init__(self, allowance: int):
        """allowance: groups of one step, over all ranks, that may be left."""
        self.allowance = allowance
        self.groups: list[Group] = []
        self.places: list[tuple[int, int]] = []  # of all ranks' groups; for the checkpoint

    def restart(self, prompts: Sequence[tuple[tuple[int, int], Prompt]], n: int, sharing: Sharing) -> None:
        """After a resume: the carried prompts again, from their beginning."""
        self.places = [place for place, _ in prompts]
        mine = prompts[sharing.engine :: sharing.engines]
        self.groups = [Group(place, prompt, [None] * n) for place, prompt in mine]

    def take(self) -> list[Group]:
        groups, self.groups = self.groups, []
        return groups

    def enough(self, sharing: Sharing, prompts: int) -> bool:
        """Whether all carried groups and all but `allowance` of the new ones are complete, over all ranks."""
        return (
            sharing.add("carried done", 0) >= len(self.places)
            and sharing.add("new done", 0) >= prompts - self.allowance
        )

    def leave(self, groups: list[Group]) -> None:
        """Keep this rank's unfinished groups for the next rollout; collective."""
        self.groups = groups
        places = [g.place for g in groups]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyone: list = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, places)
            places = [p for part in everyone for p in part]
        self.places = sorted(set(places))
