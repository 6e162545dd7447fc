"""
Times of several contenders, taken so that their ratios can be trusted.

All contenders run in one process and in turn, so that a drift of the machine's speed meets all of them;
the number to quote is the median. Every call gets the next of a few routings, so that a decode step finds
its weights in memory and not in a cache.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MODES = ("gaps", "back-to-back")
ROUTINGS_CYCLED = 4

_GAP_S = 0.010  # long enough for the spinning threads of another library to fall asleep
_SLOW, _SLOW_ROUNDS = 3.0, 3  # a contender that takes so much longer than the fastest joins one round of so many
_BURST = 9  # calls of one contender in a row in the back-to-back mode; the first is not counted


@dataclass(frozen=True)
class Timing:
    """Times of one contender, in microseconds."""

    samples_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        """The number to quote."""
        return statistics.median(self.samples_us)

    @property
    def best_us(self) -> float:
        """The fastest call."""
        return min(self.samples_us)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a fraction of the median."""
        if len(self.samples_us) < 4:
            return (max(self.samples_us) - min(self.samples_us)) / self.median_us
        low, _, high = statistics.quantiles(self.samples_us, n=4)
        return (high - low) / self.median_us


def compare(
    contenders: Mapping[str, Callable[[int], object]],
    *,
    mode: str = "gaps",
    budget_s: float = 4.0,
    min_rounds: int = 11,
    max_rounds: int = 31,
    gap_s: float = _GAP_S,
) -> dict[str, Timing]:
    """
    Time contenders round by round; each is called with the number of the routing to use.

    In mode "gaps" each round calls every contender once, after a pause of `gap_s`. In mode
    "back-to-back" each round gives every contender a pause and then a burst of calls without one, as
    the layers of a decode step come; the first call of a burst wakes the threads and is not counted.
    Every contender is first called once per routing, uncounted. One that takes more than three times as
    long as the fastest joins every third round. The number of rounds follows from `budget_s` (seconds for
    all contenders together) within `min_rounds` and `max_rounds`.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be {' or '.join(MODES)}, got {mode!r}")
    burst = _BURST if mode == "back-to-back" else 1
    warm = {}
    for name, run in contenders.items():
        _call(run, 0)
        warm[name] = statistics.median(_call(run, routing) for routing in range(1, ROUTINGS_CYCLED))
    every = {name: _SLOW_ROUNDS if one > _SLOW * min(warm.values()) else 1 for name, one in warm.items()}
    round_s = sum((gap_s + burst * one) / every[name] for name, one in warm.items())
    rounds = max(min_rounds, min(max_rounds, int(budget_s / max(round_s, 1e-9))))

    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    calls = 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            # Every other round runs backwards, so that nobody always follows the same one.
            for name in names if number % 2 == 0 else names[::-1]:
                if number % every[name]:
                    continue
                time.sleep(gap_s)
                times = [_call(contenders[name], (calls + repeat) % ROUTINGS_CYCLED) for repeat in range(burst)]
                samples[name] += [1e6 * seconds for seconds in (times[1:] if burst > 1 else times)]
            calls += burst
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _call(run: Callable[[int], object], routing: int) -> float:
    started = time.perf_counter()
    run(routing)
    return time.perf_counter() - started
