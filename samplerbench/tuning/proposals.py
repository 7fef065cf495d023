"""Proposals of candidates, by Optuna."""

from __future__ import annotations

import math
from typing import Any

from samplerbench.errors import UserError
from samplerbench.tuning.space import Candidate, Space

TRIES = 25
"""Proposals in a row that may repeat known candidates before a batch ends."""


class Proposals:
    """Proposes candidates that were not tried yet.

    Half of them are drawn at random, which explores the space. The others are from the tree-structured Parzen estimator
    of Optuna (Bergstra et al. 2011), which learns from the values of all candidates.

    Args:
        space: the candidates.
        seed: seed of the proposals.

    Raises:
        UserError: if Optuna is not installed.
    """

    def __init__(self, space: Space, seed: int) -> None:
        optuna = import_optuna()
        self.space = space
        samplers, seed = optuna.samplers, seed % 2**32
        self._learned = samplers.TPESampler(seed=seed, n_startup_trials=0, constant_liar=True)
        self._random = samplers.RandomSampler(seed=seed)
        self._study = optuna.create_study(sampler=self._learned)
        self._open: dict[Candidate, Any] = {}
        self._values: dict[Candidate, float] = {}

    def add(self, candidate: Candidate, value: float) -> None:
        """Report a default row that was not proposed.

        Args:
            candidate: the row.
            value: its value; lower is better. Infinity if it cannot be run.
        """
        self._study.enqueue_trial(self.space.values_of(candidate))
        trial = self._study.ask()
        self._open[self.space.suggest(trial)] = trial
        self.tell(candidate, value)

    def batch(self, size: int) -> list[Candidate]:
        """Propose candidates.

        Args:
            size: largest number of candidates. There are fewer if no others can be found.
        """
        batch: list[Candidate] = []
        tries = 0
        while len(batch) < size and tries < TRIES:
            self._study.sampler = self._random if len(batch) % 2 else self._learned
            if tries > TRIES // 2:
                self._study.sampler = self._random
            trial = self._study.ask()
            candidate = self.space.suggest(trial)
            if candidate in self._values:
                self._study.tell(trial, self._values[candidate])
                tries += 1
            elif candidate in self._open:
                self._study.tell(trial, state=import_optuna().trial.TrialState.FAIL)
                tries += 1
            else:
                self._open[candidate] = trial
                batch.append(candidate)
                tries = 0
        return batch

    def tell(self, candidate: Candidate, value: float) -> None:
        """Report the value of a proposed candidate.

        Args:
            candidate: the candidate.
            value: its value; lower is better. Infinity if it cannot be run.
        """
        self._values[candidate] = value
        self._study.tell(self._open.pop(candidate), value if math.isfinite(value) else math.inf)


def import_optuna() -> Any:
    """Import Optuna, without its log.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("this needs Optuna: pip install 'samplerbench[tune]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


__all__ = ["Proposals", "import_optuna"]
