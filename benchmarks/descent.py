"""Coordinate descent over positive constants in logarithmic steps: enough for a few dozen, alike on every machine."""

import math
from collections.abc import Callable, Mapping

Constants = dict[str, float]


def descend(
    loss: Callable[[Constants], float], start: Mapping[str, float], step: float = 0.1, most: float = math.inf
) -> Constants:
    """Constants of a local minimum: each is moved by its own factor, which grows on success and shrinks on failure."""
    constants, factors = dict(start), dict.fromkeys(start, step)
    best = loss(constants)
    while max(factors.values()) > 0.01:
        before = best
        for name in constants:
            for sign in (1, -1):
                tried = constants | {name: min(constants[name] * math.exp(sign * factors[name]), most)}
                value = loss(tried)
                if value < best - 1e-7:
                    best, constants = value, tried
                    factors[name] *= 1.2
                    break
            else:
                factors[name] *= 0.6
        if before - best < 1e-6 and max(factors.values()) < 0.02:
            break
    return constants
