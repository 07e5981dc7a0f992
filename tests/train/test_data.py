"""Reading prompts and examples: what is accepted, and errors that name the file and the line."""

from pathlib import Path

import pytest

from dspark.train.data import Example, Prompt, read_examples, read_prompts

GOOD = '{"prompt": "hello"}\n'


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_three_forms_of_a_prompt(tmp_path: Path):
    path = write(
        tmp_path,
        '{"turns": ["a", "b"], "domain": "chat", "task": "mt"}\n\n'
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}\n' + GOOD,
    )
    assert read_prompts(path) == [Prompt(("a", "b"), "chat", "mt"), Prompt(("u",)), Prompt(("hello",))]
    assert len(read_prompts(path, limit=2)) == 2


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
        '{"messages": [{"role": "assistant", "content": "a"}]}',
        '{"messages": [{"role": "user"}]}',
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
        with pytest.raises(ValueError, match="cannot read"):
            read_prompts(path)


def test_examples_are_cut_to_length_and_empty_ones_left_out(tmp_path: Path):
    path = write(
        tmp_path,
        '{"prompt_ids": [1, 2], "answer_ids": [3, 4, 5, 6], "domain": "code"}\n'
        '{"prompt_ids": [1, 2], "answer_ids": [3]}\n'
        '{"prompt_ids": [1, 2, 3, 4, 5, 6], "answer_ids": [3, 4, 5]}\n',
    )
    assert read_examples(path, 10, max_length=5) == [Example((1, 2), (3, 4, 5), "code")]


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
