"""The cost table: measured, kept, and refused where it does not belong; names become prefix schedulers."""

from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dspark.config import write_json
from dspark.drafters.checkpoint import save_drafter
from dspark.engine import profile
from dspark.engine.kv_cache import slot_bytes
from dspark.engine.policy import drafting, make_policy
from dspark.engine.profile import ProfileConfig, cost_table, load_profile, measure_costs
from dspark.models.loader import Target
from dspark.spec.calibration import Calibration
from dspark.spec.prefix_scheduler import FixedLength, Foresight, StaleBudget, Threshold, ThroughputGreedy
from tests.tiny import tiny_drafter, tiny_model, tiny_target

SMALL = ProfileConfig((1, 2, 5), (1, 3), repeats=1, context=6)


@pytest.fixture
def target() -> Target:
    return cast(Target, SimpleNamespace(source=SimpleNamespace(name="tiny"), decoder=tiny_target()))


def test_measures_target_and_drafter(target: Target):
    table = measure_costs(target, tiny_drafter(target.decoder), SMALL)
    assert (table.batch_tokens, table.requests) == ((1, 2, 5), (1, 3))
    assert table.target_seconds == tuple(sorted(table.target_seconds)) and table.target_seconds[0] > 0
    assert measure_costs(target, None, SMALL).requests == ()


def test_measurements_are_made_monotone(target: Target, monkeypatch: pytest.MonkeyPatch):
    """Noise must not make more work look cheaper, nor a short block dearer than a whole one."""
    noisy = {"target": [1.0, 0.9, 2.0], "draft": [0.3, 0.2], "short draft": [0.25, 0.4]}
    drawn = {name: iter(seconds) for name, seconds in noisy.items()}
    monkeypatch.setattr(
        profile, "median_seconds", lambda jobs, *_: {job: next(drawn.get(job[0], repeat(0.0))) for job in jobs}
    )
    table = measure_costs(target, tiny_drafter(target.decoder), SMALL)
    assert table.target_seconds == (1.0, 1.0, 2.0)
    assert (table.draft_seconds, table.short_draft_seconds) == ((0.3, 0.3), (0.25, 0.3))


def test_takes_no_more_memory_than_an_engine(target: Target, monkeypatch: pytest.MonkeyPatch):
    drafter, made = tiny_drafter(target.decoder), []
    bytes_of_a_slot = slot_bytes(target.decoder.config, target.decoder.kv_dtype) + drafter.slot_bytes
    monkeypatch.setattr(profile.EngineConfig, "kv_gib", 25 * bytes_of_a_slot / 2**30)
    monkeypatch.setattr(drafter, "allocate", lambda slots: made.append(slots) or type(drafter).allocate(drafter, slots))
    table = measure_costs(target, drafter, replace(SMALL, batch_tokens=(1, 2, 9), requests=(1, 9)))
    assert made[0] <= 25 and table.batch_tokens == (1, 2, 9)


def test_is_measured_once_and_kept(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    monkeypatch.setattr(profile, "QUICK", SMALL)
    drafter = tiny_drafter(target.decoder)
    table = cost_table(target, drafter, "ngram")
    path = profile.profile_path(target, "ngram")
    kept = path.read_text()
    assert cost_table(target, drafter, "ngram").batch_tokens == table.batch_tokens
    assert path.read_text() == kept
    path.write_text("{")
    assert cost_table(target, drafter, "ngram").batch_tokens == table.batch_tokens  # damaged: measured anew


def test_a_kept_one_is_brought_to_what_steps_take_now(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    monkeypatch.setattr(profile, "QUICK", SMALL)
    table = cost_table(target, tiny_drafter(target.decoder), "ngram")
    slower = tuple(3 * seconds for seconds in table.target_seconds)
    now = replace(table, target_seconds=slower, step_seconds=3 * table.step_seconds)
    monkeypatch.setattr(profile, "measure_costs", lambda *_, **__: now)
    found = cost_table(target, tiny_drafter(target.decoder), "ngram")
    assert found.target_seconds == pytest.approx(slower, rel=0.2) and found.draft_seconds == pytest.approx(
        table.draft_seconds, rel=0.01
    )


def test_a_drafter_of_another_shape_has_its_own(target: Target, tmp_path: Path):
    def path(seed: int, block_size: int) -> Path:
        save_drafter(tiny_model(target.decoder.config, seed, block_size=block_size), tmp_path / "drafter")
        return profile.profile_path(target, str(tmp_path / "drafter"))

    assert path(0, 3) == path(1, 3) != path(0, 2)


def test_long_jobs_are_not_repeated(monkeypatch: pytest.MonkeyPatch):
    """Short ones have a warm-up and `repeats` turns; one that takes the time of all of them alone has a single turn."""
    clock, runs = [0.0], []
    monkeypatch.setattr(profile.time, "perf_counter", lambda: clock[0])

    def job(name: str, seconds: float) -> None:
        runs.append((name, 1))
        clock[0] += seconds

    taken = {"short": 0.01, "some": 0.4, "long": 2.0}
    jobs = {(name, 1): partial(job, name, seconds) for name, seconds in taken.items()}
    seconds = profile.median_seconds(jobs, ProfileConfig(repeats=5), lambda _: None)
    assert list(seconds.values()) == pytest.approx(list(taken.values()))
    assert [runs.count(job) for job in jobs] == [6, 3, 1]


def test_a_table_of_something_else_is_refused(target: Target, tmp_path: Path):
    path = tmp_path / "profile.json"
    write_json(measure_costs(target, None, SMALL), path)
    assert load_profile(path, target).model == "tiny"
    for name, other in (("model", "n"), ("dtype", "bfloat16"), ("machine", "there")):
        write_json(replace(measure_costs(target, None, SMALL), **{name: other}), path)
        with pytest.raises(ValueError, match=f"for {name} '{other}', not .* run `dspark profile` again"):
            load_profile(path, target)


def test_names_of_policies():
    table: Any = SimpleNamespace(seconds=None)
    assert make_policy("fixed-3", 4, lambda: table) == FixedLength(3)
    assert make_policy("threshold-0.7", 4, lambda: table) == Threshold(0.7)
    for name, kind in (("greedy", ThroughputGreedy), ("stale", StaleBudget), ("foresight", Foresight)):
        assert isinstance(make_policy(name, 4, lambda: table), kind)
    for name in ("fixed-5", "fixed-0", "best", "threshold-2"):
        with pytest.raises(ValueError, match=r"policy|block"):
            make_policy(name, 4, lambda: table)


def test_a_given_profile_is_used_or_refused(target: Target, tmp_path: Path):
    path = tmp_path / "given.json"
    table = measure_costs(target, None, SMALL)
    write_json(table, path)
    assert cost_table(target, None, "none", path) == table and table.step_seconds > 0
    with pytest.raises(ValueError, match="cannot be read"):
        cost_table(target, None, "none", tmp_path / "nowhere.json")


def test_a_context_longer_than_the_models_is_refused(target: Target):
    with pytest.raises(ValueError, match="leaves no room in the model's 256"):
        measure_costs(target, None, replace(SMALL, context=255))


def test_policies_are_checked_without_a_drafter(target: Target):
    with pytest.raises(ValueError, match="a policy is one of"):
        drafting(target, "none", "best")


def test_a_calibration_of_shorter_blocks_is_refused(target: Target, tmp_path: Path):
    save_drafter(tiny_model(target.decoder.config, block_size=4), tmp_path)
    write_json(Calibration.identity(3), tmp_path / "calibration.json")
    with pytest.raises(ValueError, match=r"blocks of 3 tokens, the drafter's have 4: run 'dspark calibrate"):
        drafting(target, str(tmp_path), "fixed-2")


def test_a_given_profile_without_the_drafter_is_refused(target: Target, tmp_path: Path):
    drafter = tiny_drafter(target.decoder, block_size=4)
    for measured, message in ((None, "with no drafter"), (tiny_drafter(target.decoder, block_size=2), "blocks of 2")):
        write_json(measure_costs(target, measured, SMALL), tmp_path / "given.json")
        with pytest.raises(ValueError, match=message):
            cost_table(target, drafter, "mine", tmp_path / "given.json")
