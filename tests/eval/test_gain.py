"""Rows of a bench become gains, costs and a plain sentence."""

import pytest

from dspark.eval.gain import gains, verdict


def rows(*speeds: float) -> list[dict]:
    loads = [(streams, temperature) for streams in (1, 8) for temperature in (0.0, 1.0)]
    return [
        {"system": system, "streams": s, "temperature": t, "tokens_per_s": speed, "accepted_length": 1.5}
        for (s, t), fast in zip(loads, speeds, strict=True)
        for system, speed in (("plain", 50.0), ("dspark", fast))
    ]


def test_it_says_plainly_when_it_does_not_pay():
    found = gains(rows(40.0, 50.0, 52.0, 45.0), None)
    assert "cost_per_million_tokens" not in found[0] and [g["gain"] for g in found] == [0.8, 1.0, 1.04, 0.9]
    assert verdict(found).startswith(
        "The drafter does not pay on this machine; times the tokens/s of plain decoding: "
        "0.80 at 1 stream and temperature 0, 1.00 at 1 stream and temperature 1, 1.04 at 8 streams"
    )
    some = verdict(gains(rows(90.0, 75.0, 60.0, 45.0), None))
    assert some.startswith("The drafter pays") and some.endswith("there: 0.90 at 8 streams and temperature 1.")
    every = verdict(gains(rows(90.0, 75.0, 60.0, 55.0), 2.0))
    assert every.startswith("The drafter pays") and "not pay" not in every


def test_costs_of_a_million_tokens():
    costs = gains(rows(100.0, 75.0, 60.0, 55.0), 3.6)[0]["cost_per_million_tokens"]
    assert costs == pytest.approx({"plain": 20.0, "drafter": 10.0})
