"""Seeds of a study in memory, whose models pass problems by chance: nothing is trained, sampled or read."""

import numpy as np
import small_study

from m2rl.comparison import Comparison, SeedResults

DOMAINS = small_study.DOMAINS


def seed_of(accuracy, problems=400, k=4, seed=0, noise=None) -> SeedResults:
    """A seed whose models pass each domain's problems with these chances; `noise` shares luck between models."""
    rng = np.random.default_rng(seed)
    luck = rng.random((len(DOMAINS), problems, k))
    rewards = {}
    for m, by in accuracy.items():
        mine = luck if noise is None else rng.random(luck.shape)
        rewards[m] = {
            f"{d}/{i}": (mine[n, i] < by[d]).astype(float) for n, d in enumerate(DOMAINS) for i in range(problems)
        }
    domain_of = {p: p.partition("/")[0] for p in rewards["sft"]}
    return SeedResults(seed, {}, rewards, domain_of, {}, None)


def chances(**changed):
    """Every model at 0.5, except as told: model=chance on all domains, or model={domain: chance}."""
    out = {}
    for m in small_study.MODELS:
        of = changed.get(m, 0.5)
        out[m] = {d: of.get(d, 0.5) if isinstance(of, dict) else of for d in DOMAINS}
    return out


def comparison(*seeds: SeedResults) -> Comparison:
    return Comparison(seeds, small_study.MODELS, DOMAINS)
