"""Training data written by the real model: answers, self-written prompts, and a run that was killed."""

import json

import pytest

from dspark.engine.llm import LLM
from dspark.train.data import Prompt, read_examples
from dspark.train.generate import DataConfig, done_ids, self_written_prompts, write_answers

PROMPTS = [Prompt((text,), "chat") for text in ("Name a colour.", "Name a river.", "Name a fruit.")]
CONFIG = DataConfig(max_new_tokens=8)


@pytest.mark.model
def test_answers_and_self_written_prompts(tmp_path):
    llm = LLM("smollm2-135m", "none")
    path = tmp_path / "answers.jsonl"
    write_answers(llm, PROMPTS, path, CONFIG, lambda tokens: None)
    whole = sorted(path.read_text().splitlines())
    rows = [json.loads(line) for line in whole]
    assert [r["id"] for r in rows] == [0, 1, 2]
    assert [r["temperature"] for r in rows] == [0.2, 1.0, 0.2]
    for row in rows:
        assert llm.tokenizer.decode(row["answer_ids"], skip_special_tokens=True) == row["answer"]
        assert row["prompt_ids"] == llm.encode(row["turns"][0])
    assert len(read_examples(path, 49_152, 512)) == 3

    # Killed in the middle of its second line, the run continues without a lost or doubled answer.
    path.write_text(whole[0] + "\n" + whole[1][:20])
    assert done_ids(path) == {0}
    write_answers(llm, PROMPTS, path, CONFIG, lambda tokens: None)
    assert sorted(path.read_text().splitlines()) == whole

    prompts = self_written_prompts(llm, 4, seed=3, on_finish=lambda i: None)
    assert all(p.turns[0].strip() and "<|im_" not in p.turns[0] for p in prompts)
