"""Answers from servers that fail, are busy, tear connections and die: each prompt is answered exactly once."""

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from dspark.train import servers
from dspark.train.data import read_examples
from dspark.train.generate import write_data
from dspark.train.servers import LONGEST_RETRY_AFTER, back_off, base_url, retry_after
from dspark.train.work import DataConfig
from tests.tiny_folder import write_tiny_folder
from tests.train.fake_server import Action, FakeServer, answer_to


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(servers, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(servers, "POLL_SECONDS", 0.002)


class Run:
    """A data run over 30 prompts, every third of two turns."""

    def __init__(self, folder: Path, model: str):
        self.out, self.model, self.prompts = folder / "answers.jsonl", model, folder / "prompts.jsonl"
        self.turns = [(f"q{i}",) if i % 3 else (f"q{i}", f"more{i}") for i in range(30)]
        self.prompts.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in self.turns))

    def __call__(self, *fakes: FakeServer, **changes) -> dict:
        urls = tuple(fake.url for fake in fakes)
        config = {"servers": urls, "model": self.model, "streams": 4, "prompts": self.prompts, **changes}
        return write_data(DataConfig(self.out, **config))

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def check(self) -> None:
        """Every prompt is answered once, turn by turn, the answers being in the history and in the mask."""
        rows = self.rows()
        assert Counter(tuple(row["turns"]) for row in rows) == Counter(self.turns)
        for row in rows:
            messages: list[dict] = []
            for turn, answer in zip(row["turns"], row["answers"], strict=True):
                messages.append({"role": "user", "content": turn})
                assert answer == answer_to(messages)
                messages.append({"role": "assistant", "content": answer})
            assert len(row["earlier"]) == len(row["turns"]) - 1
        assert len(read_examples(self.out, 263, 512)) == 30


@pytest.fixture
def run(tmp_path: Path, model: str) -> Run:
    return Run(tmp_path, model)


def test_requests_are_spread_over_the_servers(run: Run, capsys: pytest.CaptureFixture):
    with FakeServer() as a, FakeServer() as b:
        summary = run(a, b, samplings=((0.7, 0.95),))
    run.check()
    assert summary["answers"] == 30 and summary["refused"] == summary["cut_short"] == 0
    assert min(a.answered, b.answered) > 5 and a.answered + b.answered == 40
    body = a.bodies[0]
    assert body["model"] == "m" and body["temperature"] == 0.7 and body["top_p"] == 0.95 and body["max_tokens"] == 256
    assert len({body["seed"] for body in a.bodies + b.bodies}) == 30
    assert "counts other prompt tokens" in capsys.readouterr().err  # the fake says 7, whatever was asked


PROBLEMS = [(500, {}), (429, {"Retry-After": "0.01"}), "tear", "garbage", "odd", (503, {"Retry-After": "0"}), (429, {})]


def test_what_goes_wrong_is_tried_again(run: Run):
    """Each second request goes wrong, in turn in every way; no answer is lost or doubled."""
    with FakeServer(lambda number, _: "ok" if number % 2 else PROBLEMS[number // 2 % 7]) as fake:
        summary = run(fake)
    run.check()
    assert summary["answers"] == 30 and len(fake.bodies) > 70 and fake.answered == 40


@pytest.mark.parametrize("death", ["tear", (500, {}), "hang"])
def test_the_requests_of_a_dead_server_go_to_the_others(
    run: Run, death: Action, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # With fewer, a request could fail that often at b, between b's answers to others, and be given up.
    monkeypatch.setattr(servers, "RETRIES", 3)
    with FakeServer() as a, FakeServer(lambda number, _: "ok" if number < 6 else death) as b:
        run(a, b, timeout=1.0 if death == "hang" else 60.0, samples=20, samplings=((1.0, 1.0),))
        assert b.answered == 5 and a.answered >= 20 * 40 - 5
    if death != "hang":  # it takes several timeouts to see that a server hangs, and here the other is done by then
        assert f"'{b.url}/v1' is dropped" in capsys.readouterr().err
    counts = Counter((tuple(row["turns"]), row["sample"]) for row in run.rows())
    assert set(counts.values()) == {1} and {turns for turns, _ in counts} == set(run.turns)


def test_a_server_that_is_not_there(run: Run):
    with FakeServer() as gone:
        pass
    with FakeServer() as a:
        run(gone, a, samples=4)
    with FakeServer() as a:
        assert run(a)["answers_before"] == 30


def test_when_no_server_is_left_the_next_run_goes_on(run: Run):
    with FakeServer(lambda number, _: "ok" if number < 15 else (502, {})) as fake:
        with pytest.raises(ValueError, match="no server is left"):
            run(fake)
    before = run.rows()
    assert 5 < len(before) < 15
    run.out.write_text(run.out.read_text() + '{"turns": ["torn')
    with FakeServer() as fake:
        summary = run(fake)
    run.check()
    assert run.rows()[: len(before)] == before and summary["answers_before"] == len(before)


def test_rate_limits_do_not_count_as_death(run: Run):
    with FakeServer(lambda number, _: "ok" if number % 9 == 0 else (429, {"Retry-After": "0"})) as fake:
        run(fake, streams=1)
    run.check()


def test_a_request_that_always_fails_is_left_out(run: Run, capsys: pytest.CaptureFixture):
    def act(_: int, body: dict) -> Action:
        return (500, {}) if body["messages"][-1]["content"] in ("q1", "more3") else "ok"

    with FakeServer(act) as fake:
        summary = run(fake, samples=20, samplings=((1.0, 1.0),))
    assert summary["refused"] == 20 and summary["cut_short"] == 20 and summary["answers"] == 29 * 20
    assert "gave up after 7 failures" in capsys.readouterr().err


def test_a_refused_request_is_left_out_and_named(run: Run, capsys: pytest.CaptureFixture):
    with FakeServer(lambda _, body: (400, {}) if body["messages"][-1]["content"] == "q4" else "ok") as fake:
        assert run(fake)["refused"] == 1
    assert "prompts.jsonl' line 5: HTTP 400" in capsys.readouterr().err


def test_of_refused_requests_the_first_alone_is_named(run: Run, capsys: pytest.CaptureFixture):
    """Every one had a line on stderr, each said to be the first."""
    with FakeServer(lambda _, body: (400, {}) if body["messages"][-1]["content"] in ("q4", "q7", "q8") else "ok") as f:
        assert run(f)["refused"] == 3
    assert capsys.readouterr().err.count("servers refuse some requests, first") == 1


def test_what_cannot_work_ends_the_run(run: Run):
    with FakeServer(lambda number, _: (401, {})) as fake, pytest.raises(ValueError, match="cannot be used, HTTP 401"):
        run(fake)
    with FakeServer(models=("a", "b")) as fake, pytest.raises(ValueError, match="serves a, b: name one of them"):
        run(fake)
    with FakeServer(models=("a", run.model)) as fake:
        run(fake)
        assert fake.bodies[0]["model"] == run.model
    for url in ("localhost:8000", "ftp://host", "http://", "http://host:port", "nonsense"):
        with pytest.raises(ValueError, match="--server must be an address"):
            run(servers=(url,))


@pytest.mark.parametrize("content", ["half \ud83d", ["a", "part"], 5])
def test_an_answer_that_is_no_text_is_asked_for_again(run: Run, content: object, monkeypatch: pytest.MonkeyPatch):
    plain = servers.ServerPool.request
    spoilt = iter([True, False, True])

    async def request(self, server, method, path, body=None):
        reply = await plain(self, server, method, path, body)
        if method == "POST" and next(spoilt, False):
            reply["choices"][0]["message"]["content"] = content
        return reply

    monkeypatch.setattr(servers.ServerPool, "request", request)
    with FakeServer() as fake:
        run(fake)
    run.check()


def test_addresses():
    assert base_url("http://host:8000") == base_url("http://host:8000/") == "http://host:8000/v1"
    assert base_url("https://host/api/v1/") == "https://host/api/v1"


def test_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert [back_off(i) for i in (1, 2, 3, 6, 7, 99)] == [0.5, 1.0, 2.0, 16.0, 30.0, 30.0]
    assert retry_after("3") == 3.0 and retry_after("-1") == retry_after("nan") == 0.0
    assert retry_after("1e9") == LONGEST_RETRY_AFTER
    assert retry_after("") is retry_after("soon") is None
    assert retry_after(format_datetime(datetime.now(UTC) - timedelta(hours=1))) == 0.0
    assert retry_after(format_datetime(datetime.now(UTC) + timedelta(days=9), usegmt=True)) == LONGEST_RETRY_AFTER
