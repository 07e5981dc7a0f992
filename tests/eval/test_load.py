"""The load bench on a tiny model: complete rows, fair lanes, ratios, and what is left after Ctrl-C."""

import json
from pathlib import Path

import pytest

from dspark.cli import main
from dspark.engine import policy
from dspark.engine.engine import Engine
from dspark.engine.sequence import Sequence
from dspark.eval import load
from dspark.eval.load import LoadBench, LoadConfig, make_policy
from dspark.eval.load_lane import poisson_arrivals
from dspark.eval.load_stats import SHARES, Tally, jackknife, percentile, summarise, throughput
from dspark.models.loader import Target
from dspark.models.source import ModelSource
from dspark.spec.calibration import OnlineCalibration
from dspark.spec.cost_table import CostTable
from dspark.spec.prefix_scheduler import FixedLength, Foresight, Threshold
from tests.tiny import tiny_drafter, tiny_target

POLICIES = ("plain", "fixed-1", "fixed-4", "threshold", "greedy", "stale", "foresight")
COSTS = CostTable("tiny", "float32", "here", (1, 8, 64), (1e-3, 1e-3, 4e-3), (1, 8), (1e-4, 2e-4), 1e-4)


class Tokenizer:
    """One token a character."""

    chat_template = None

    def __call__(self, text: str) -> dict:
        return {"input_ids": [ord(c) % 64 for c in text]}


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(ModelSource("tiny", Path()), tiny_target(), Tokenizer(), frozenset({1}))  # pyright: ignore


@pytest.fixture(autouse=True)
def side_files(monkeypatch):
    monkeypatch.setattr(load, "cost_table", lambda *_: COSTS)
    monkeypatch.setattr(policy, "load_calibration", lambda *_: None)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "abcdefgh"[: 3 + i % 5] + str(i), "domain": "ab"[i % 2]} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def bench_of(target: Target, prompts: Path, **options) -> LoadBench:
    options = {"streams": (1, 3), "seconds": 0.02, "slice_seconds": 0.01, "max_new_tokens": 12} | options
    return LoadBench(LoadConfig(prompts=prompts, **options), target, tiny_drafter(target.decoder))


def test_every_load_and_policy_has_a_complete_row(target, prompts):
    bench = bench_of(target, prompts, policies=POLICIES, arrivals="both", rates=(50.0,), temperature=1.0)
    bench.run()
    rows = bench.rows()
    assert [(r["arrivals"], r["streams"], r["rate"], r["policy"]) for r in rows] == [
        (*where, policy)
        for where in (("closed", 1, None), ("closed", 3, None), ("poisson", None, 50.0))
        for policy in POLICIES
    ]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["rounds"] > 0 and row["slices"] >= 1
        assert sum(row[name] for name in SHARES.values()) == pytest.approx(1, abs=1e-3)
        assert 1 <= row["accepted_length"] <= 1 + row["verify_length"]
        assert row["stream_tokens_per_s_p95"] <= row["stream_tokens_per_s_p50"]
    by_policy = {r["policy"]: r for r in rows if r["streams"] == 3}
    assert by_policy["plain"]["verify_length"] == 0 and by_policy["plain"]["draft_share"] < 0.1
    # A last token is not drafted for: of an answer's at least 6 or 3 rounds, which take 11 tokens, one may be without.
    assert 5 / 6 <= by_policy["fixed-1"]["draft_length"] <= 1 and 8 / 3 <= by_policy["fixed-4"]["draft_length"] <= 4
    assert by_policy["fixed-4"]["verify_length"] > by_policy["fixed-1"]["verify_length"] > 0
    summary = bench.summary()
    assert summary["scheduled"].keys() == set(POLICIES[3:])
    assert [level["streams"] for level in summary["scheduled"]["greedy"]["levels"]] == [1, 3]


def test_the_closed_loop_keeps_all_streams_busy_in_lanes_that_share_weights_only(target, prompts):
    bench = bench_of(target, prompts, policies=("plain", "fixed-1", "fixed-2"), streams=(3,))
    seen = []
    bench.run(lambda *_: seen.append([len(lane.live) for lane in bench.lanes.values()]))
    assert len(seen) >= 3 and all(counts == [3, 3, 3] for counts in seen)
    plain, one, two = (lane.engine.drafter for lane in bench.lanes.values())
    assert plain is None  # pays for no drafter
    assert one.head is two.head and one._storage[0].data_ptr() != two._storage[0].data_ptr()  # pyright: ignore


def test_policies_are_given_the_same_prompts_in_the_same_order_and_answer_the_same(target, prompts, monkeypatch):
    names = ("plain", "fixed-2", "greedy")
    added: dict[Engine, list[Sequence]] = {}
    add = Engine.add

    def recorded(engine: Engine, *args) -> Sequence:
        sequence = add(engine, *args)
        added.setdefault(engine, []).append(sequence)
        return sequence

    def prompt(sequence: Sequence) -> list[int]:
        return sequence.token_ids[: sequence.prompt_length]

    monkeypatch.setattr(Engine, "add", recorded)
    bench = bench_of(target, prompts, policies=names, streams=(3,), seconds=0.1)
    bench.run()
    plain, *others = (added[bench.lanes[name].engine] for name in names)
    for other in others:
        pairs = list(zip(plain, other))
        assert len(pairs) >= 6 and all(prompt(a) == prompt(b) and a.params == b.params for a, b in pairs)
        answers = [(a.token_ids, b.token_ids) for a, b in pairs if a.finish_reason and b.finish_reason]
        assert len(answers) >= 3 and all(a == b for a, b in answers)


def test_all_policies_get_as_far_as_the_first_one_of_a_pass(target, prompts):
    names = ("plain", "fixed-4", "greedy")
    bench, seen = bench_of(target, prompts, policies=names, streams=(3,)), []
    bench.run(lambda text, _: seen.append(text.split()[-1]))
    tokens = {name: lane.tokens for name, lane in bench.lanes.items()}
    assert set(seen[-3:]) == set(names) and tokens[seen[-3]] == min(tokens.values())
    lane, tally = bench.lanes["fixed-4"], Tally()
    goal = lane.tokens + 40
    seconds = bench.run_slice(lane, tally, 3, goal)
    assert goal <= lane.tokens < goal + 3 * (1 + 4)
    assert tally.seconds == seconds > 0 and tally.slices[0][0] == lane.tokens - goal + 40


def test_the_open_loop_answers_every_arrival_under_every_policy(target, prompts):
    bench = bench_of(target, prompts, policies=("plain", "fixed-4"), arrivals="poisson", rates=(200.0,), seconds=0.1)
    bench.run()
    waits = [t.first_token_seconds for t in bench.tallies["poisson", 200.0].values()]
    assert len(waits[0]) == len(waits[1]) == len(poisson_arrivals(200.0, 0.1, 0)) and min(map(min, waits)) > 0
    tokens = [t.slices[0][0] for t in bench.tallies["poisson", 200.0].values()]
    assert tokens[0] == tokens[1]  # greedy answers do not depend on the policy
    assert not any(lane.live or lane.engine.has_work for lane in bench.lanes.values())


def test_interrupted_runs_keep_what_was_measured(target, prompts):
    bench = bench_of(target, prompts, policies=("plain", "fixed-2", "greedy"), seconds=60.0)
    seen = []

    def interrupt(text: str, _: float) -> None:
        seen.append(text)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(interrupt)
    assert {(r["streams"], r["policy"]) for r in bench.rows()} == {(1, p) for p in ("plain", "fixed-2", "greedy")}
    assert bench.summary()["scheduled"]["greedy"]["worst_ratio"] > 0


def test_ratios_are_paired_by_pass_and_against_the_best_rival():
    def tally(*tokens: float) -> Tally:
        return Tally(slices=[[t, 1.0] for t in tokens])

    # The machine is twice as fast in the second pass: throughput has an error, the ratio has none.
    tallies = {
        1: {"plain": tally(10, 20), "fixed-1": tally(20, 40), "fixed-2": tally(30, 60), "greedy": tally(33, 66)},
        8: {"plain": tally(40, 80), "fixed-1": tally(36, 72), "fixed-2": tally(20, 40), "greedy": tally(40, 80)},
    }
    summary = summarise(tallies)
    assert summary["best_single_fixed"] == "fixed-1"
    greedy = summary["scheduled"]["greedy"]
    assert [(level["best"], level["ratio"]) for level in greedy["levels"]] == [("fixed-2", 1.1), ("plain", 1.0)]
    assert [level["ratio_se"] for level in greedy["levels"]] == pytest.approx([0, 0], abs=1e-9)
    assert greedy["worst_ratio"] == 1.0
    assert greedy["geomean_to_best_single_fixed"] == pytest.approx((33 / 20 * 40 / 36) ** 0.5, rel=1e-4)
    assert jackknife(throughput, tally(10, 20).slices) == pytest.approx(5)
    unfinished = {64: {"plain": tally(10), "fixed-1": tally(), "fixed-2": tally(), "greedy": tally()}}
    assert summarise(tallies | unfinished) == summary
    assert summarise({}) == {"best_single_fixed": None, "scheduled": {}}


def test_a_load_goes_on_until_its_ratios_are_precise(target, prompts):
    names = ("plain", "fixed-1", "fixed-2", "greedy")
    bench = bench_of(target, prompts, policies=names, precision=0.05, seconds=1.0)

    def tallies(seconds: float, *greedy: float) -> dict[str, Tally]:
        def of(*tokens: float) -> Tally:
            return Tally([[t, seconds] for t in tokens])

        plain, slow = [10] * len(greedy), [2] * len(greedy)
        return {"plain": of(*plain), "fixed-1": of(*slow), "fixed-2": of(*plain[1:], 9), "greedy": of(*greedy)}

    assert bench.goes_on(tallies(0.4, 10, 10))  # too short
    assert not bench.goes_on(tallies(0.6, 10, 10))
    assert bench.goes_on(tallies(2.0, 10))  # no error is known yet
    assert bench.goes_on(tallies(0.6, 10, 20))  # not precise
    assert not bench.goes_on(tallies(6.0, 10, 20))  # will not become so


def test_percentiles():
    assert percentile([], 50) is None and percentile([3.0], 95) == 3
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5


def test_policies_by_name():
    assert make_policy("fixed-3", 4, lambda: COSTS) == FixedLength(3)
    assert make_policy("threshold-0.7", 4, lambda: COSTS) == Threshold(0.7)
    assert isinstance(make_policy("foresight", 4, lambda: COSTS), Foresight)
    with pytest.raises(ValueError, match="block of 4"):
        make_policy("fixed-5", 4, lambda: COSTS)


def test_arrivals_are_seeded_and_have_their_rate():
    times = poisson_arrivals(4.0, 500.0, 1)
    assert times == sorted(times) == poisson_arrivals(4.0, 500.0, 1) != poisson_arrivals(4.0, 500.0, 2)
    assert abs(len(times) - 2000) < 200
    assert len(poisson_arrivals(1e-6, 1.0, 0)) == 1


def test_a_prompt_that_cannot_fit_is_refused(target, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 250}))
    with pytest.raises(ValueError, match="does not fit the model's context"):
        bench_of(target, path)
    path.write_text(json.dumps({"prompt": "a" * 244}))  # it does, but without room for the drafts behind it
    with pytest.raises(ValueError, match="have 256 tokens, more than the limit of"):
        bench_of(target, path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--policies", "plain,clever"], "clever"),
        (["--policies", "fixed-0"], "fixed-0"),
        (["--streams", "1,x"], "--streams"),
        (["--streams", "0"], "--streams"),
        (["--rates", "0"], "--rates"),
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--slice", "0"], "--slice"),
        (["--precision", "-1"], "--precision"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--limit", "0"], "--limit"),
        (["--prompts", "/nowhere.jsonl"], "cannot read"),
    ],
)
def test_bad_options_end_in_one_sentence(capsys, options, message):
    assert main(["bench", "load", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_the_command_prints_tables_plots_and_one_json_line(target, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LoadConfig, "load_target", lambda _: target)
    monkeypatch.setattr(load, "make_drafter", lambda *_: tiny_drafter(target.decoder))
    options = ["--streams", "2", "--policies", "plain,fixed-2,greedy", "--seconds", "0.02", "--slice", "0.01"]
    command = ["bench", "load", "--prompts", str(prompts), *options, "--max-new-tokens", "8"]
    assert main([*command, "--plots", str(tmp_path / "figures")]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert (
        len(result["rows"]) == 3
        and not result["interrupted"]
        and result["costs"]["model"] == "tiny"
        and "greedy" in result["summary"]["scheduled"]
    )
    assert {"machine", "versions", "git", "argv"} <= result.keys()
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2
    assert main([*command, "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LoadBench, "run", interrupted)
    assert main(command) == 130
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["interrupted"] and result["rows"] == []


def test_online_calibration_is_learnt_by_each_policy_alone(target, prompts):
    bench = bench_of(target, prompts, policies=("plain", "fixed-1", "fixed-4"), online_calibration=True)
    bench.run()
    short, long = (bench.lanes[name].engine.calibration for name in ("fixed-1", "fixed-4"))
    assert isinstance(short, OnlineCalibration) and isinstance(long, OnlineCalibration)
    assert short.information[0] > 0 == short.information[1] and long.information[1] > 0


def test_policies_that_draft_need_a_drafter(target):
    config = LoadConfig(policies=("plain", "greedy"))
    with pytest.raises(ValueError, match="needs a drafter"):
        LoadBench(config, target, None)
    assert load.default_policies(0) == ("plain",)
    assert load.default_policies(2) == ("plain", "fixed-1", "fixed-2", "threshold", "greedy", "stale", "foresight")


def test_bench_without_a_word_is_the_old_bench(monkeypatch):
    import dspark.eval.bench

    seen = []
    monkeypatch.setattr(dspark.eval.bench, "run_and_report", lambda config, show_table: seen.append(config))
    assert main(["bench", "--limit", "3", "--streams", "1,2"]) == 0
    assert seen[0].streams == (1, 2) and isinstance(seen[0], dspark.eval.bench.BenchConfig)
