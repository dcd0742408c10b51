"""All outcomes of random decisions, with their probabilities."""

from collections.abc import Callable, Iterator
from typing import Any


class Script:
    """Takes the place of `Chance`: decides as written, then always the first possibility, and notes the others."""

    def __init__(self, decisions):
        self.decisions, self.weight, self.others = list(decisions), 1.0, []
        self._position = 0

    def reserve(self, number):
        pass

    def flip(self, probability):
        return self._decide([(True, probability), (False, 1 - probability)])

    def choose(self, number):
        return self._decide([(i, 1 / number) for i in range(number)])

    def _decide(self, possibilities):
        if self._position == len(self.decisions):
            self.others += [[*self.decisions, choice] for choice, p in possibilities[1:] if p > 0]
            self.decisions.append(possibilities[0][0])
        choice = self.decisions[self._position]
        self._position += 1
        self.weight *= dict(possibilities)[choice]
        return choice


def outcomes(run: Callable[[Script], Any]) -> Iterator[tuple[float, Any]]:
    """Probability and result of `run(script)` for everything that may be decided."""
    open_scripts = [[]]
    while open_scripts:
        script = Script(open_scripts.pop())
        result = run(script)
        open_scripts += script.others
        if script.weight > 0:
            yield script.weight, result
