"""Training data written by the embedded engine: every answer once, whatever stops the run, and never two writers."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark.cli import main
from dspark.engine.engine import EngineConfig
from dspark.engine.llm import LLM
from dspark.sampling import SamplingParams
from dspark.train.conversation import Conversation
from dspark.train.data import Prompt, read_examples
from dspark.train.generate import answer_by_engine, write_data
from dspark.train.output import only_writer, write_row, written_rows
from dspark.train.work import DataConfig
from tests.tiny_folder import write_tiny_folder
from tests.train.fake_server import FakeServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """24 prompts, every third of three turns; the last line is the first again."""
    rows = [{"turns": [f"q{i}"] if i % 3 else [f"q{i}", "and?", "so?"], "domain": "chat"} for i in range(24)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return path


def config(prompts: Path | None, model: Path, **changes) -> DataConfig:
    fixed = {"model": str(model), "dtype": "fp32", "streams": 4, "max_new_tokens": 10}
    out = changes.pop("out", model / "unused.jsonl")
    return DataConfig(out, prompts, **{**fixed, **changes})


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_turn_is_answered_into_the_history(tmp_path: Path, prompts: Path, model: Path):
    out = tmp_path / "answers.jsonl"
    summary = write_data(config(prompts, model, out=out, samples=2))
    rows = rows_of(out)
    assert summary["answers"] == len(rows) == 48 and summary["duplicates"] == 1 and summary["prompts"] == 24
    assert 0 < summary["tokens"] <= 10 * (32 + 16 * 3) and len(read_examples(out, 263, 9999)) == 48
    llm = LLM(str(model), "none", dtype="fp32")
    for row in rows:
        assert len(row["answers"]) == len(row["turns"]) == len(row["earlier"]) + 1
        assert llm.decode(row["answer_ids"]) == row["answers"][-1]
        first = row["prompt_ids"][: row["earlier"][0][0]] if row["earlier"] else row["prompt_ids"]
        assert first == llm.encode(row["turns"][0])
        for (start, end), answer in zip(row["earlier"], row["answers"]):
            assert llm.decode(row["prompt_ids"][start:end]) in (answer, answer.strip())
    settings = Counter((row["temperature"], row["top_p"]) for row in rows)
    assert set(settings) == {(0.0, 1.0), (0.2, 0.9), (0.7, 0.95), (1.0, 1.0)}
    pairs = {tuple(row["turns"]): set() for row in rows}
    for row in rows:
        pairs[tuple(row["turns"])].add(row["temperature"])
    assert all(len(temperatures) == 2 for temperatures in pairs.values())


def test_an_answer_depends_on_its_prompt_alone(tmp_path: Path, prompts: Path, model: Path):
    """Not on the order of the file, on what else it holds, or on how many streams there are."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(reversed(prompts.read_text().splitlines(keepends=True)[:9])))
    write_data(config(prompts, model, out=tmp_path / "a.jsonl"))
    write_data(config(few, model, out=tmp_path / "b.jsonl", streams=2))
    a, b = ({tuple(row["turns"]): row for row in rows_of(tmp_path / name)} for name in ("a.jsonl", "b.jsonl"))
    assert len(b) == 9 and all(a[turns] == row for turns, row in b.items())


def test_prompts_that_are_too_long_are_left_out(tmp_path: Path, prompts: Path, model: Path):
    out = tmp_path / "answers.jsonl"
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "long " * 200}) + "\n")
    summary = write_data(config(prompts, model, out=out, max_prompt_tokens=60))
    assert summary["too_long"] == 1 and summary["answers"] == 24 and summary["cut_short"] == 8
    assert all(len(row["prompt_ids"]) <= 60 for row in rows_of(out))


def test_the_streams_stay_full(model: Path):
    """Requests are added while others run, never so many that they pile up."""
    llm = LLM(str(model), "none", dtype="fp32", config=EngineConfig(4))
    lengths, waiting, finished = [3, 9, 27, 5] * 10, [], []

    class FortyAnswers:
        def __iter__(self) -> Iterator[Conversation]:
            for i, length in enumerate(lengths):
                waiting.append(i + 1 - len(finished))
                params = SamplingParams(max_new_tokens=length, ignore_eos=True)
                yield Conversation(Prompt(("a",)), params, i, asked=([1, 2, 3], []))

        def answer(self, conversation: Conversation, *_: object) -> bool:
            finished.append(conversation.sample)
            return False

    answer_by_engine(llm, FortyAnswers())  # pyright: ignore
    assert sorted(finished) == list(range(40)) and max(waiting) == 8
    rounds = llm.engine.times.rounds
    assert rounds < sum(lengths) / 4 * 1.2  # 4 streams, all but always busy


def test_several_greedy_answers_would_be_one(tmp_path: Path, prompts: Path, model: Path):
    out = tmp_path / "answers.jsonl"
    write_data(config(prompts, model, out=out, samples=3, samplings=((0.0, 1.0), (1.0, 1.0)), limit=6))
    counts = Counter(tuple(row["turns"]) for row in rows_of(out) if row["temperature"] == 0)
    assert set(counts.values()) == {1} and len(counts) == 6


def test_given_answers_can_be_kept(tmp_path: Path, model: Path):
    prompts, out = tmp_path / "chats.jsonl", tmp_path / "answers.jsonl"
    texts = ["hi", "yes é", "more", " as it\nis "]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts)]
    prompts.write_text(json.dumps({"messages": [*messages, {"role": "user", "content": "unanswered"}]}) + "\n")
    for _ in range(2):
        write_data(config(prompts, model, out=out, keep_answers=True))
    (row,) = rows_of(out)
    assert row["turns"] == ["hi", "more"] and row["answers"] == ["yes é", " as it\nis "] and row["temperature"] is None
    prompts.write_text('{"prompt": "no answer"}\n')
    with pytest.raises(ValueError, match=r"chats\.jsonl' line 1 holds no answers to keep"):
        write_data(config(prompts, model, out=out, keep_answers=True))


def test_of_given_answers_each_is_kept_and_lines_without_one_are_left_out(tmp_path: Path, model: Path):
    prompts, out = tmp_path / "chats.jsonl", tmp_path / "answers.jsonl"
    answers = ["yes", "no", "yes", " "]
    rows = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}] for text in answers]
    prompts.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    summary = write_data(config(prompts, model, out=out, keep_answers=True))
    assert [row["answers"] for row in rows_of(out)] == [["yes"], ["no"]]
    assert (summary["answers"], summary["duplicates"], summary["unanswered"]) == (2, 1, 1)
    again = write_data(config(prompts, model, out=out, keep_answers=True))
    assert (again["answers"], again["answers_before"], len(rows_of(out))) == (0, 2, 2)


def test_more_new_tokens_than_the_engine_has_room_for_are_refused(tmp_path: Path, prompts: Path, model: Path):
    with pytest.raises(ValueError, match=r"--max-new-tokens 9999 leaves no room for a prompt"):
        write_data(config(prompts, model, out=tmp_path / "answers.jsonl", max_new_tokens=9_999))


# ---- self-written prompts


def test_self_written_prompts_are_kept_and_continued(tmp_path: Path, model: Path):
    """The tiny model ends about every other prompt: some attempts come to nothing, what is kept is unique."""
    out = tmp_path / "answers.jsonl"
    write_data(config(None, model, out=out, self_written=4))
    first = rows_of(tmp_path / "answers.prompts.jsonl")
    assert len(first) == 4 and [row["turns"] for row in rows_of(out)] != []
    with (tmp_path / "answers.prompts.jsonl").open("a") as file:
        file.write('{"prompt": "torn')
    summary = write_data(config(None, model, out=out, self_written=9))
    prompts = rows_of(tmp_path / "answers.prompts.jsonl")
    assert prompts[:4] == first and len({row["prompt"] for row in prompts}) == len(prompts) == 9
    assert min(row["attempt"] for row in prompts[4:]) > max(row["attempt"] for row in first)
    assert Counter(row["turns"][0] for row in rows_of(out)) == Counter(row["prompt"] for row in prompts)
    assert summary["answers_before"] == 4 and summary["answers"] == 5


def test_a_model_that_writes_no_prompts(tmp_path: Path):
    bare = write_tiny_folder(tmp_path / "bare", template="{{ 'nothing of it' }}")
    with pytest.raises(ValueError, match="no chat template to write prompts from"):
        write_data(config(None, bare, out=tmp_path / "answers.jsonl", self_written=2))


@pytest.mark.model
def test_answers_and_prompts_of_the_real_model(tmp_path: Path):
    out = tmp_path / "answers.jsonl"
    write_data(DataConfig(out, self_written=3, max_new_tokens=8, samplings=((0.2, 0.9),)))
    rows = rows_of(out)
    assert len(rows) == len(read_examples(out, 49_152, 512)) == 3
    assert all(row["turns"][0].strip() and "<|im_" not in row["turns"][0] for row in rows)


# ---- one writer, whole lines


def test_only_one_writer(tmp_path: Path):
    path = tmp_path / "new" / "answers.jsonl"
    with only_writer(path), pytest.raises(ValueError, match="another 'dspark data' is writing"):
        with only_writer(path):
            pass
    with only_writer(path):
        pass


def test_two_runs_on_one_file(tmp_path: Path, prompts: Path, model: Path, capsys: pytest.CaptureFixture):
    """Two runs once wrote the same answers twice into one file."""
    out = tmp_path / "answers.jsonl"
    with only_writer(out):
        assert main(["data", "--prompts", str(prompts), "--out", str(out), "--model", str(model)]) == 2
    assert "another 'dspark data' is writing" in capsys.readouterr().err and not out.exists()


def test_a_torn_line_is_cut_off(tmp_path: Path):
    """One that lacks nothing but its end is given it."""
    path = tmp_path / "rows.jsonl"
    assert list(written_rows(path)) == []
    for i in range(3):
        write_row(path, {"i": i, "text": "é\u2028"})
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        rows = [row["i"] for _, row in written_rows(path)]
        assert rows == list(range(whole[: size + 1].count(b"\n"))) and path.read_bytes() == whole[: 26 * len(rows)]


def test_a_file_of_one_line_that_is_no_json_is_left_alone(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text("not ours")
    with pytest.raises(ValueError, match=r"notes\.txt' line 1"):
        list(written_rows(path))
    assert path.read_text() == "not ours"


@pytest.mark.parametrize("text", ['{"prompt": "a"}\n', '{"prompt": "a"}', '{"prompt": "a"}\n{"prompt": "b"}'])
def test_a_file_of_something_else_is_left_alone(prompts: Path, model: Path, text: str):
    """The last line of one that did not end in a line break was once cut off before the file was refused."""
    prompts.write_text(text)
    before = prompts.read_bytes()
    with pytest.raises(ValueError, match=r"prompts\.jsonl' line 1 was not written by 'dspark data'"):
        write_data(config(prompts, model, out=prompts))
    assert prompts.read_bytes() == before


# ---- runs that are stopped


def start(out: Path, prompts: Path, model: Path, **options) -> subprocess.Popen:
    argv = [sys.executable, "-m", "dspark.cli", "data", "--prompts", prompts, "--out", out, "--model", model]
    argv += ["--dtype", "fp32", "--streams", "3", "--max-new-tokens", "100", "--json"]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_a_killed_run_goes_on_without_a_lost_or_doubled_line(tmp_path: Path, prompts: Path, model: Path):
    out, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    process = start(out, prompts, model)
    wait_for_lines(out, 5, process)
    process.kill()
    process.communicate()
    assert write_data(config(prompts, model, out=out, max_new_tokens=100))["answers_before"] >= 5
    write_data(config(prompts, model, out=whole, max_new_tokens=100))
    assert sorted(out.read_text().splitlines()) == sorted(whole.read_text().splitlines())


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_whole_lines(tmp_path: Path, prompts: Path, model: Path, number: signal.Signals):
    """A background job of a shell is started with SIGINT ignored; it must stop all the same."""
    out = tmp_path / "answers.jsonl"
    process = start(out, prompts, model, preexec_fn=ignore_interrupts)
    wait_for_lines(out, 2, process)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 130 and output == "" and "interrupted" in errors and "Traceback" not in errors
    assert 2 <= len(rows_of(out)) < 24 and out.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_of_servers_leaves_whole_lines(tmp_path: Path, prompts: Path, model: Path, number):
    out = tmp_path / "answers.jsonl"
    with FakeServer(lambda i, _: "ok" if i < 9 else "hang") as fake:
        argv = [sys.executable, "-m", "dspark.cli", "data", "--prompts", prompts, "--out", out, "--model", model]
        process = subprocess.Popen(
            [*argv, "--server", fake.url], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=ignore_interrupts
        )
        wait_for_lines(out, 2, process)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors
    assert 2 <= len(rows_of(out)) <= 8


def test_answers_of_two_models_are_not_mixed(tmp_path: Path, prompts: Path, model: Path):
    other, out = write_tiny_folder(tmp_path / "other"), tmp_path / "answers.jsonl"
    write_data(config(prompts, model, out=out, limit=2))
    with pytest.raises(ValueError, match=f"is an answer of '{model}', not of '{other}'"):
        write_data(config(prompts, other, out=out))


def test_when_no_prompt_fits_it_says_so(tmp_path: Path, prompts: Path, model: Path):
    with pytest.raises(ValueError, match="no prompt fits: all 24 are longer than 3 tokens"):
        write_data(config(prompts, model, out=tmp_path / "answers.jsonl", max_prompt_tokens=3))


def test_prompts_of_the_users_own_beside_the_output_are_left_alone(tmp_path: Path, model: Path):
    own = tmp_path / "answers.prompts.jsonl"
    own.write_text('{"prompt": "my own"}\n')
    with pytest.raises(ValueError, match="was not written by 'dspark data --self-written'"):
        write_data(config(None, model, out=tmp_path / "answers.jsonl", self_written=2))
    assert own.read_text() == '{"prompt": "my own"}\n'
