"""Which prompts an iteration samples from. A choice is a function of the seed, of how many were
drawn, and of the success rates seen so far; all of it is in the checkpoint.

Kimi k1.5, arXiv:2501.12599 section 2.3.4: curriculum (easy to hard), and prioritized sampling
proportional to 1 - success rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from posttrain.resolve import settings


@settings
class CurriculumConfig:
    """The order of prompts."""

    order: Literal["uniform", "curriculum", "prioritized"] = "uniform"
    """uniform: shuffled epochs. curriculum: uniform up to ``hard_from``, then only the hard ones;
    without ``hard_from`` from easy to hard. prioritized: drawn with probability proportional to 1 -
    success rate + floor."""
    difficulty_column: str = "difficulty"
    """Column with the difficulty (``posttrain prep difficulty`` writes it): higher is harder, 1 -
    pass rate for example."""
    hard_from: int = 0
    """Curriculum: iteration from which only prompts of at least the median difficulty are drawn
    (k1.5's ablation: 24)."""
    floor: float = 0.05
    """Prioritized: added to 1 - success rate, so that a solved prompt is not lost forever."""
    prior: float = 0.5
    """Prioritized: success rate of a prompt that was not sampled yet."""

    def __post_init__(self) -> None:
        if self.floor < 0 or not 0 <= self.prior <= 1:
            raise ValueError(
                f"curriculum needs floor >= 0 and prior in [0, 1]; got {self.floor} "
                f"and {self.prior}."
            )


class PromptSampler:
    """``next(count, iteration)`` -> indices of prompts; ``update`` tells what came of them."""

    def __init__(
        self, config: CurriculumConfig, samples: Sequence[Mapping[str, Any]], *, seed: int
    ) -> None:
        self._config, self._seed, self._size = config, seed, len(samples)
        self._drawn = 0
        self._tries = np.zeros(self._size)
        self._successes = np.zeros(self._size)
        self._by_difficulty = np.arange(self._size)
        if config.order == "curriculum":
            missing = next((s for s in samples if s.get(config.difficulty_column) is None), None)
            if missing is not None:
                raise ValueError(
                    f"{missing.get('_where', 'a sample')} has no column "
                    f"{config.difficulty_column!r}. Estimate it with `posttrain prep difficulty`, "
                    "or set --curriculum.order uniform."
                )
            difficulty = np.array([float(s[config.difficulty_column]) for s in samples])
            self._by_difficulty = np.argsort(difficulty, kind="stable")
            self._hard = np.flatnonzero(difficulty >= np.median(difficulty))

    def next(self, count: int, *, iteration: int) -> list[int]:
        """``count`` indices. A prompt comes twice in one call only where a pass over the data ends
        in it, or of fewer prompts than ``count``."""
        config = self._config
        if config.order == "prioritized":
            weights = priorities(self.success_rates(), floor=config.floor)
            draws = np.random.default_rng([self._seed, 1, self._drawn])
            chosen: list[int] = []
            while len(chosen) < count:
                keys = -np.log(draws.random(self._size)) / np.maximum(
                    weights, 1e-300
                )  # the smallest win: without replacement
                chosen += [int(i) for i in np.argsort(keys, kind="stable")[: count - len(chosen)]]
        elif config.order == "curriculum" and config.hard_from == 0:
            chosen = [
                int(self._by_difficulty[(self._drawn + i) % self._size]) for i in range(count)
            ]
        else:
            pool = (
                self._hard
                if config.order == "curriculum" and iteration >= config.hard_from
                else np.arange(self._size)
            )
            chosen = [self._shuffled(pool, self._drawn + i) for i in range(count)]
        self._drawn += count
        return chosen

    def _shuffled(self, pool: np.ndarray, position: int) -> int:
        epoch, at = divmod(position, len(pool))
        order = np.random.default_rng([self._seed, 2, epoch, len(pool)]).permutation(len(pool))
        return int(pool[order[at]])

    def update(self, prompt: int, *, tries: int, successes: float) -> None:
        """Counts the completions of a prompt and how many were right."""
        self._tries[prompt] += tries
        self._successes[prompt] += successes

    def success_rates(self) -> np.ndarray:
        """[prompts] share of right completions so far; the prior where there are none."""
        return np.where(
            self._tries > 0, self._successes / np.maximum(self._tries, 1), self._config.prior
        )

    def state_dict(self) -> dict[str, Any]:
        """As JSON has it; only prompts that were sampled."""
        seen = np.flatnonzero(self._tries)
        return {
            "drawn": self._drawn,
            "seen": [[int(i), float(self._tries[i]), float(self._successes[i])] for i in seen],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self._drawn = int(state["drawn"])
        self._tries[:] = 0
        self._successes[:] = 0
        for i, tries, successes in state["seen"]:
            self._tries[i], self._successes[i] = tries, successes


def priorities(success_rates: Sequence[float] | np.ndarray, *, floor: float = 0.0) -> np.ndarray:
    """Probabilities proportional to 1 - s_i + floor (k1.5 has none: what is solved never comes
    again); uniform if all are 0."""
    weights = 1.0 - np.asarray(success_rates, dtype=np.float64) + floor
    return weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1 / len(weights))
