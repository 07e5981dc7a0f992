"""Reading prompts and examples: what is accepted, and errors that name the file and the line."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspark.train.data import Example, Prompt, mix, read_examples, read_prompts, split_by_prompt
from tests.tiny import make_example

GOOD = '{"prompt": "hello"}\n'


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_forms_of_a_prompt(tmp_path: Path):
    path = write(
        tmp_path,
        '{"turns": ["a", "b"], "domain": "chat", "task": "mt"}\n\n'
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}\n'
        '{"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}\n' + GOOD,
    )
    prompts = [Prompt(("a", "b"), "chat", "mt"), Prompt(("u",), system="s"), Prompt(("h",)), Prompt(("hello",))]
    assert read_prompts(path) == prompts
    assert [prompt.place for prompt in read_prompts(path)][:2] == [f"'{path}' line 1", f"'{path}' line 3"]
    assert len(read_prompts(path, limit=2)) == 2
    assert len({prompt.number for prompt in prompts}) == 4


def test_an_answer_that_is_blank_ends_what_is_kept(tmp_path: Path):
    """The next answer used to be taken for the one to the question before."""
    texts = [
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", " "),
        ("user", "q3"),
        ("assistant", "a3"),
    ]
    line = json.dumps({"messages": [{"role": role, "content": text} for role, text in texts]})
    assert read_prompts(write(tmp_path, line))[0].answers == ("a1",)


@pytest.mark.parametrize(
    "roles, answers",
    [("uaua", ("1", "3")), ("suau", ("2",)), ("uau", ("1",)), ("uu", ()), ("uaau", ()), ("duau", ("2",))],
)
def test_given_answers_are_kept_where_turns_alternate(tmp_path: Path, roles: str, answers: tuple[str, ...]):
    names = {"u": "user", "a": "assistant", "s": "system", "d": "developer"}
    messages = [{"role": names[role], "content": str(i)} for i, role in enumerate(roles)]
    assert read_prompts(write(tmp_path, json.dumps({"messages": messages})))[0].answers == answers


@pytest.mark.parametrize("roles", [("assistant", "user"), ("user", "tool", "assistant"), ("user", "system"), ("bot",)])
def test_conversations_that_cannot_be_continued_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], roles: tuple[str, ...]
):
    line = json.dumps({"messages": [{"role": role, "content": "text"} for role in roles]})
    assert len(read_prompts(write(tmp_path, GOOD + line + "\n" + line + "\n" + GOOD))) == 2
    assert capsys.readouterr().err.startswith(f"left out 2 of 4 rows, the first: '{tmp_path / 'data.jsonl'}' line 2: ")
    with pytest.raises(ValueError, match=r"holds no prompts: .* line 1: "):
        read_prompts(write(tmp_path, line))


@pytest.mark.parametrize(
    "line",
    [
        "{oops",
        "[1, 2]",
        "{}",
        '{"prompt": ""}',
        '{"prompt": 3}',
        '{"turns": []}',
        '{"turns": "text"}',
        '{"turns": ["a", null]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": ["text"]}',
        '{"prompt": "half a \\ud83d character"}',
    ],
)
def test_a_bad_prompt_is_named_by_file_and_line(tmp_path: Path, line: str):
    with pytest.raises(ValueError, match=r"data\.jsonl' line 3 "):
        read_prompts(write(tmp_path, GOOD + "\n" + line + "\n" + GOOD))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str):
    with pytest.raises(ValueError, match=r"data\.jsonl' holds no prompts"):
        read_prompts(write(tmp_path, text))


def test_an_unreadable_file_is_named(tmp_path: Path):
    for path in (tmp_path / "missing.jsonl", tmp_path, write(tmp_path, b"\xff\xfe\x00")):
        with pytest.raises(ValueError, match=r"cannot read|line 1 is not JSON: .utf-8"):
            read_prompts(path)


def test_examples_are_cut_to_length_and_empty_ones_left_out(tmp_path: Path):
    path = write(
        tmp_path,
        '{"prompt_ids": [1, 2], "answer_ids": [3, 4, 5, 6], "domain": "code"}\n'
        '{"prompt_ids": [1, 2], "answer_ids": [3]}\n'
        '{"prompt_ids": [1, 2, 3, 4, 5, 6], "answer_ids": [3, 4, 5]}\n',
    )
    assert read_examples(path, 10, max_length=5) == [make_example((1, 2), (3, 4, 5), "code")]


@pytest.mark.parametrize(
    "max_length, expected",
    [
        (99, make_example((1, 2, 3, 4, 5, 6, 7), (8, 9), earlier=((1, 3), (4, 6)))),
        (8, make_example((1, 2, 3, 4), (5, 6), earlier=((1, 3),))),  # one token of the last answer trains nothing
        (5, make_example((1,), (2, 3))),
    ],
)
def test_examples_of_several_turns(tmp_path: Path, max_length: int, expected: Example):
    path = write(tmp_path, '{"prompt_ids": [1,2,3,4,5,6,7], "answer_ids": [8,9], "earlier": [[1,3], [4,6]]}')
    (example,) = read_examples(path, 10, max_length)
    assert example == expected
    assert example.answer_tokens == [i for s, e in example.answer_spans for i in example.token_ids[s:e]]
    assert example.opening == (1,)


@pytest.mark.parametrize(
    "earlier", ["3", "[3]", "[[1]]", "[[2, 1]]", "[[1, 2], [0, 1]]", "[[0, 4]]", "[[-1, 1]]", '["ab"]']
)
def test_bad_spans_are_named_by_file_and_line(tmp_path: Path, earlier: str):
    line = f'{{"prompt_ids": [1, 2, 3], "answer_ids": [4, 5], "earlier": {earlier}}}'
    with pytest.raises(ValueError, match=r"data\.jsonl' line 1: 'earlier' must hold"):
        read_examples(write(tmp_path, line), 10, 100)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt_ids": [1]}',
        '{"prompt_ids": [1], "answer_ids": "2, 3"}',
        '{"prompt_ids": [1], "answer_ids": [2, 10]}',
        '{"prompt_ids": [-1], "answer_ids": [2, 3]}',
        '{"prompt_ids": [1.0], "answer_ids": [2, 3]}',
        '{"prompt_ids": [true], "answer_ids": [2, 3]}',
    ],
)
def test_a_bad_example_is_named_by_file_and_line(tmp_path: Path, line: str):
    good = '{"prompt_ids": [1], "answer_ids": [2, 3]}\n'
    with pytest.raises(ValueError, match=r"data\.jsonl' line 2 .*below 10"):
        read_examples(write(tmp_path, good + line), 10, 100)


def test_a_file_without_an_example_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no example"):
        read_examples(write(tmp_path, '{"prompt_ids": [1], "answer_ids": [2]}'), 10, 100)


def test_line_separators_inside_a_text_do_not_split_the_line(tmp_path: Path):
    """JSON allows U+2028 and U+0085 unescaped in strings; str.splitlines cut such prompts in two."""
    path = write(tmp_path, '{"prompt": "a\u2028b\u0085c"}\r\n' + GOOD)
    assert [p.turns for p in read_prompts(path)] == [("a\u2028b\u0085c",), ("hello",)]


LOCAL = st.lists(st.integers(0, 12), max_size=20)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LOCAL, min_size=1, max_size=3), st.integers(0, 15), LOCAL)
def test_no_prompt_is_on_both_sides(prompts: list[list[int]], count: int, added: list[int]):
    """Whatever the order of files, and what is trained on is never held out once data is added."""
    files = [[make_example((p,), (i, i)) for i, p in enumerate(of_file)] for of_file in prompts]
    heldout, rest = split_by_prompt(files, count)
    trained = [e for of_file in rest for e in of_file]
    assert len(heldout) + len(trained) == sum(map(len, files))
    held = {e.opening for e in heldout}
    assert not held & {e.opening for e in trained}
    assert len(heldout) >= count or not trained
    assert held == {e.opening for e in split_by_prompt(files[::-1], count)[0]}
    more = split_by_prompt([*files, [make_example((p,), (99, 99)) for p in added]], count)[0]
    assert not {e.opening for e in more} & {e.opening for e in trained}


def test_files_are_mixed_by_weight():
    a, b = ([make_example((i, 0), (0, 0)) for i in r] for r in (range(4), range(10, 22)))
    epoch = mix([a, b], (2.0, 1.0))
    assert epoch == a * 6 + b  # 24 : 12, b once
    assert mix([a, b], (1.0, 3.0)) == a + b
    assert mix([a, []], (1.0, 1.0)) == a


# ---- datasets


def test_a_dataset_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (tmp_path, Path("HuggingFaceH4/ultrachat_200k")):
        with pytest.raises(ValueError, match=rf"cannot read the dataset '{name}': pip install datasets"):
            read_prompts(name)


def test_a_dataset_folder(tmp_path: Path):
    pytest.importorskip("datasets")
    from pyarrow import Table, parquet  # pyright: ignore[reportMissingImports]

    (tmp_path / "data").mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(5)
    ]
    parquet.write_table(Table.from_pylist(rows[:3]), tmp_path / "data" / "train-00000-of-00001.parquet")
    parquet.write_table(Table.from_pylist(rows[3:]), tmp_path / "data" / "test-00000-of-00001.parquet")
    prompts = read_prompts(tmp_path)
    assert prompts == [Prompt((f"q{i}",)) for i in range(3)] and prompts[2].answers == ("a",)
    assert prompts[2].place == f"'{tmp_path}' row 3"
    assert read_prompts(tmp_path, split="test", limit=1) == [Prompt(("q3",))]
    with pytest.raises(ValueError, match="cannot read the dataset"):
        read_prompts(tmp_path, split="nonsense")


def test_bad_rows_of_a_dataset_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("datasets")
    write(tmp_path, GOOD + '{"prompt": ""}\n' + GOOD)
    assert len(read_prompts(tmp_path)) == 2
    assert f"left out 1 of 3 rows, the first: '{tmp_path}' row 2 needs" in capsys.readouterr().err
    write(tmp_path, '{"prompt": ""}\n')
    with pytest.raises(ValueError, match=f"'{tmp_path}' holds no prompts: '{tmp_path}' row 1 needs"):
        read_prompts(tmp_path)


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot read the dataset 'nobody/nothing-here'"):
        read_prompts(Path("nobody/nothing-here"))


def test_a_prompt_is_on_one_side_though_its_first_answer_trains_nothing(tmp_path: Path):
    """Answers of one token are left out of the mask; the prompt used to end at the second answer then."""
    rows = [
        {"prompt_ids": [1, 2, i, *first, 5], "answer_ids": [5, 6, 7], "earlier": [[3, 3 + len(first)]]}
        for i in range(20)
        for first in ([9], [9, 9, 9])
    ]
    examples = read_examples(write(tmp_path, "\n".join(map(json.dumps, rows))), 64, 99)
    heldout, (rest,) = split_by_prompt([examples], 8)
    assert len(heldout) == 8 and not {e.opening for e in heldout} & {e.opening for e in rest}
    assert {len(e.opening) for e in examples} == {3}


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": "a", "domain": "\\ud83d"}', '{"a": ' + "9" * 10_000 + "}"])
def test_hostile_lines_are_named(tmp_path: Path, line: str):
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(write(tmp_path, '{"prompt": "good"}\n' + line))
