"""What the load bench books for a policy, and what it says about it: rows, standard errors, ratios of policies.

Throughput is tokens over seconds of whole slices. Slices of different policies in the same pass saw the same
machine and nearly the same part of the same answers, so a ratio's standard error is the jackknife over passes: what is
left after drift and easy prompts have cancelled.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import geometric_mean

import numpy as np

from dspark.engine.times import StepTimes

SHARES = {  # parts of StepTimes -> columns of a row
    "draft": "draft_share",
    "choose": "schedule_share",
    "target": "verify_share",
    "sample": "sample_share",
    "other": "other_share",
}
MIN_STREAM_ROUNDS = 8  # a request seen for fewer rounds says nothing about a policy's speed


@dataclass
class Stream:
    """One request under one policy: tokens that decoding steps gave it, and how long those took."""

    tokens: int = 0
    rounds: int = 0
    seconds: float = 0.0


@dataclass
class Tally:
    """One policy at one load. Streams and first tokens are pooled, slices kept apart for the standard error."""

    slices: list[list[float]] = field(default_factory=list)  # [tokens, seconds] of each slice
    times: StepTimes = field(default_factory=StepTimes)
    streams: dict[int, Stream] = field(default_factory=dict)  # by request id
    first_token_seconds: list[float] = field(default_factory=list)

    def add_step(self, tokens: int, seconds: float, times: StepTimes) -> None:
        """Book one engine step, which took `times`, into the current slice."""
        self.slices[-1][0] += tokens
        self.slices[-1][1] += seconds
        self.times.add(times)

    def add_round(self, request_id: int, tokens: int, seconds: float) -> None:
        """Book what a step meant to one decoding request."""
        stream = self.streams.setdefault(request_id, Stream())
        stream.tokens += tokens
        stream.rounds += tokens > 0
        stream.seconds += seconds

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.slices)

    @property
    def tokens_per_s(self) -> float:
        return throughput(self.slices)

    def row(self) -> dict:
        """The measured columns of a result row; None where nothing was measured."""
        times, streams = self.times, [s for s in self.streams.values() if s.rounds]
        rounds, long = sum(s.rounds for s in streams), [s for s in streams if s.rounds >= MIN_STREAM_ROUNDS]
        # Of speeds the slow tail is what users feel: 95 % of the streams are at least this fast.
        speeds = [s.tokens / s.seconds for s in long or streams]
        row = {
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_se": jackknife(throughput, self.slices),
            "stream_tokens_per_s_p50": percentile(speeds, 50),
            "stream_tokens_per_s_p95": percentile(speeds, 5),
            "first_token_s_p50": percentile(self.first_token_seconds, 50),
            "first_token_s_p95": percentile(self.first_token_seconds, 95),
            "accepted_length": sum(s.tokens for s in streams) / rounds if rounds else None,
            "draft_length": times.drafted / rounds if rounds else None,
            "verify_length": times.verified / rounds if rounds else None,
            "rounds": times.rounds,
            "ms_per_round": 1e3 * times.total / times.rounds if times.rounds else None,
            **{name: getattr(times, part) / times.total if times.total else None for part, name in SHARES.items()},
            "slices": len(self.slices),
        }
        return {key: rounded(value) for key, value in row.items()}


def rounded(value: float | None) -> float | None:
    """Five significant digits are more than any of this is worth."""
    return value if value is None or isinstance(value, int) else float(f"{value:.5g}")


def throughput(slices: Iterable[list[float]]) -> float:
    tokens, seconds = (sum(column) for column in zip(*slices)) if slices else (0, 0)
    return tokens / seconds if seconds else 0.0


def percentile(values: list[float], percent: float) -> float | None:
    """By linear interpolation; None of nothing."""
    return float(np.percentile(values, percent)) if values else None


def jackknife(statistic: Callable[[list], float], observations: list) -> float | None:
    """Standard error of a statistic of independent observations; None of fewer than two."""
    n = len(observations)
    if n < 2:
        return None
    return math.sqrt((n - 1) * np.var([statistic(observations[:i] + observations[i + 1 :]) for i in range(n)]))


def is_fixed(policy: str) -> bool:
    return policy.startswith("fixed-")


def is_scheduled(policy: str) -> bool:
    return policy != "plain" and not is_fixed(policy)


def compare(ours: Tally, other: Tally) -> tuple[float, float | None]:
    """Ratio of throughputs and its standard error, over the passes that both have measured."""
    pairs = [(a, b) for a, b in zip(ours.slices, other.slices) if a[1] and b[1]]

    def ratio(some: list) -> float:
        return throughput([a for a, _ in some]) / (throughput([b for _, b in some]) or math.inf)

    return ratio(pairs), jackknife(ratio, pairs)


def best_rival(by_policy: dict[str, Tally]) -> str | None:
    """The fastest of plain and the fixed lengths."""
    rivals = [p for p in by_policy if not is_scheduled(p)]
    return max(rivals, key=lambda p: by_policy[p].tokens_per_s, default=None)


def largest_error(by_policy: dict[str, Tally]) -> float:
    """Largest standard error of a scheduled policy's ratio to its best rival; infinite where it is not known yet."""
    best = best_rival(by_policy)
    if best is None:
        return 0.0
    errors = [compare(by_policy[p], by_policy[best])[1] for p in by_policy if is_scheduled(p)]
    return max((math.inf if error is None else error for error in errors), default=0.0)


def best_single_fixed(tallies: dict[int, dict[str, Tally]]) -> str | None:
    """The fixed length with the best geometric mean of throughput over all loads."""
    names = filter(is_fixed, next(iter(tallies.values()), {}))
    return max(names, key=lambda p: geometric_mean([t[p].tokens_per_s for t in tallies.values()]), default=None)


def summarise(tallies: dict[int, dict[str, Tally]]) -> dict:
    """Each scheduled policy against plain decoding and the fixed lengths.

    tallies: concurrency -> policy -> what it measured, the same policies everywhere; loads at which one of them has
    measured nothing are left out. `ratio` is against the best of plain and every fixed length at that concurrency;
    being the best of several noisy figures, that one is a little flattered.
    """
    measured = {s: by_policy for s, by_policy in tallies.items() if all(t.tokens_per_s for t in by_policy.values())}
    rivals = {streams: best for streams, by_policy in measured.items() if (best := best_rival(by_policy))}
    policies, single = next(iter(measured.values()), {}), best_single_fixed(measured)
    scheduled = {}
    for policy in filter(is_scheduled, policies if rivals else ()):
        levels = []
        for streams, best in rivals.items():
            by_policy = measured[streams]
            ratio, error = compare(by_policy[policy], by_policy[best])
            level = {"streams": streams, "best": best, "ratio": rounded(ratio), "ratio_se": rounded(error)}
            if "plain" in by_policy:
                level["ratio_to_plain"] = rounded(compare(by_policy[policy], by_policy["plain"])[0])
            levels.append(level)
        to_single = [compare(t[policy], t[single])[0] for t in measured.values()] if single is not None else []
        scheduled[policy] = {
            "levels": levels,
            "worst_ratio": min(level["ratio"] for level in levels),
            "geomean_to_best_single_fixed": rounded(geometric_mean(to_single)) if to_single else None,
        }
    return {"best_single_fixed": single, "scheduled": scheduled}
