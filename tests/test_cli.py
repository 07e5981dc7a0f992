"""The command line: bad input ends in one sentence and exit code 2, and `--help` needs no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dspark.cli import main
from dspark.commands import parse_weighted


def error_of(capsys, *argv: str) -> str:
    """Run a command that must fail; returns its one line on stderr."""
    assert main(list(argv)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-p", "1.5"], "top_p"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--min-new-tokens", "300"], "min_new_tokens"),
        (["--presence-penalty", "3"], "presence_penalty"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--logit-bias", "5"], "--logit-bias"),
        (["--logit-bias", "5=1000"], "logit_bias"),
        (["--stop", ""], "stop"),
        (["--n", "0", "--json"], "n must"),
        (["--n", "2"], "--json"),
        (["--logprobs", "21", "--json"], "logprobs"),
    ],
)
def test_impossible_sampling_parameters(capsys, options, message):
    assert message in error_of(capsys, "generate", "hello", *options)


def test_empty_prompt(capsys):
    assert "prompt is empty" in error_of(capsys, "generate", "  ")


def test_missing_model(capsys):
    assert "no model" in error_of(capsys, "generate", "hello", "--model", "/nowhere/model.gguf")


def test_prompts_files(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    out = str(tmp_path / "out.jsonl")
    assert "cannot read" in error_of(capsys, "data", "--prompts", str(path), "--out", out)
    path.write_text("")
    assert "holds no prompts" in error_of(capsys, "data", "--prompts", str(path), "--out", out)
    path.write_text('{"turns": ["hello"]}\nnot json\n')
    assert "line 2 is not JSON" in error_of(capsys, "data", "--prompts", str(path), "--out", out)
    assert "line 2 is not JSON" in error_of(capsys, "bench", "--prompts", str(path))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--samplings", "0.7/x"], "--samplings"),
        (["--samplings", "0.7/2"], "top_p"),
        (["--samples", "0"], "samples must be above 0"),
        (["--limit", "0"], "limit must be above 0"),
        (["--server", "localhost"], "--server must be an address"),
        (["--server", "http://127.0.0.1:999999"], "--server must be an address"),
        (["--server", "http://[bad"], "--server must be an address"),
        (["--server", "http://a", "--keep-answers"], "either kept or asked"),
        (["--samples", "2", "--keep-answers"], "either kept or asked"),
    ],
)
def test_data_options(capsys, tmp_path, options, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["hello"]}\n')
    assert message in error_of(capsys, "data", "--prompts", str(path), "--out", str(tmp_path / "out"), *options)


def test_weights_of_training_files(capsys):
    assert parse_weighted("a.jsonl:2.5") == (Path("a.jsonl"), 2.5)
    assert parse_weighted("a.jsonl") == (Path("a.jsonl"), None)
    assert parse_weighted("C:\\a.jsonl") == (Path("C:\\a.jsonl"), None)
    assert parse_weighted("7") == (Path("7"), None)
    assert "the weight in 'a:-1' must be above 0" in error_of(capsys, "train", "--data", "a:-1", "--out", "b")


@pytest.mark.parametrize(
    "options, message",
    [(["--systems", "vllm"], "--systems"), (["--streams", "x"], "--streams"), (["--limit", "0"], "--limit")],
)
def test_bench_options(capsys, options, message):
    assert message in error_of(capsys, "bench", *options)


def test_options_of_bench_load_stand_behind_its_name(capsys):
    assert "--rates" in error_of(capsys, "bench", "load", "--rates", "0")
    with pytest.raises(SystemExit):
        main(["bench", "--limit", "3", "load"])
    assert "unrecognized arguments: load" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys, dspark.cli\n"
        "try: dspark.cli.main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.model
def test_generate_prints_one_json_object(capsys):
    assert main(["generate", "What is the capital of France?", "--drafter", "ngram", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert "Paris" in row["text"] and row["finish_reason"] == "stop"


@pytest.mark.model
def test_a_prompt_longer_than_the_context(capsys):
    assert main(["generate", "word " * 9000]) == 2
    assert "do not fit the limit" in capsys.readouterr().err


@pytest.mark.model
def test_generate_with_stop_strings_bias_and_several_answers(capsys):
    argv = ["generate", "Count from 1 to 9.", "--drafter", "ngram", "--json", "--stop", "7", "--logprobs", "2"]
    assert main([*argv, "--n", "2", "--temperature", "0.5", "--seed", "1", "--presence-penalty", "0.1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert "7" not in row["text"]
        assert len(row["logprobs"]) == len(row["token_ids"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["eval", "--plot", "figure.xyz"], "--plot must be a file of .png"),
        (["calibrate", "--plot", "/"], "--plot must be a file of .png"),
        (["profile", "--repeats", "0"], "--repeats must be at least 1"),
        (["profile", "--context", "-1"], "--context must be at least 1"),
        (["data", "--self-written", "2", "--out", "/dev/null"], "is no file that could be written"),
        (["calibrate", "--out", "/dev"], "is no file that could be written"),
        (["profile", "--out", "/dev"], "is no file that could be written"),
        (["train", "--data", "a", "--out", "b", "--initial", "c", "--drafter", "mtp"], "leave out --drafter"),
        (["train", "--data", "a", "--out", "b", "--initial", "c", "--window", "4"], "leave out --window"),
        (["train", "--data", "a", "--out", "b", "--initial", "c", "--draft-vocab-size", "9"], "leave out --draft-v"),
        *(
            (["train", "--data", "a", "--out", "b", option, value], option[2:].replace("-", "_").removesuffix("_gib"))
            for option in ("--learning-rate", "--minutes", "--epochs", "--cache-gib", "--feature-cache-gib")
            for value in ("nan", "inf", "-1")
        ),
        (["train", "--data", "a", "--out", "b", "--seed", "9" * 23], "seed"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(capsys, argv, message):
    assert message in error_of(capsys, *argv)
