"""Training data from the target itself: prompts it writes, answers it gives, by our own batched engine.

Output lines hold `id`, `turns`, `prompt_ids`, `answer_ids`, `answer`, `temperature`, `top_p`, `finish`, `domain`,
`task`. A run that was stopped continues where it was: ids that are already in the file are skipped.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dspark.engine.llm import LLM, Completion
from dspark.sampling import SamplingParams
from dspark.train.data import Prompt, read_jsonl

WINDOW = 256  # requests handed to the engine at once: memory stays bounded, streams stay full
MARK = "PROMPT-GOES-HERE"


@dataclass(frozen=True)
class DataConfig:
    """How answers are sampled. Prompt i uses the i-th sampling setting, round and round."""

    max_new_tokens: int = 256
    samplings: tuple[tuple[float, float], ...] = ((0.2, 0.9), (1.0, 1.0))  # (temperature, top_p)
    seed: int = 0


def self_written_prompts(llm: LLM, count: int, seed: int, on_finish: Callable[[int], None]) -> list[Prompt]:
    """User turns that an instruction-tuned target writes when started right after its user header.

    Empty and repeated ones are dropped, so fewer than `count` may come back.
    """
    template = str(llm.tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False))
    if MARK not in template:
        raise ValueError("the model has no chat template to write prompts from; give a prompts file")
    header = llm.tokenizer(template.split(MARK)[0], add_special_tokens=False)["input_ids"]
    params = [SamplingParams(temperature=1.0, top_p=0.95, max_new_tokens=128, seed=seed + i) for i in range(count)]
    answers = llm.generate([header] * count, params, lambda i, _: on_finish(i))  # pyright: ignore
    texts = dict.fromkeys(a.text.strip() for a in answers if a.finish_reason == "stop" and a.text.strip())
    return [Prompt((text,), task="self-written") for text in texts]


def done_ids(path: Path) -> set[int]:
    """Ids already answered in `path`; a line torn by a kill is cut off first."""
    if not path.exists():
        return set()
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) != len(raw):
        path.write_bytes(whole)
    return {row["id"] for _, row in read_jsonl(path) if "id" in row} if whole.strip() else set()


def write_answers(
    llm: LLM, prompts: list[Prompt], path: Path, config: DataConfig, on_answer: Callable[[int], None]
) -> None:
    """Answer every prompt that `path` does not hold yet; a line is written as each answer ends.

    on_answer(tokens) after each. Prompts too long for the engine are left out.
    """
    done = done_ids(path)
    pending = [i for i in range(len(prompts)) if i not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        for start in range(0, len(pending), WINDOW):
            window = []
            for i in pending[start : start + WINDOW]:
                prompt_ids = llm.encode(prompts[i].turns[0])
                if len(prompt_ids) + config.max_new_tokens <= llm.engine.longest_request:
                    window.append((i, prompt_ids))
            samplings = [config.samplings[i % len(config.samplings)] for i, _ in window]
            params = [
                SamplingParams(t, top_p=p, seed=config.seed + i, max_new_tokens=config.max_new_tokens)
                for (t, p), (i, _) in zip(samplings, window)
            ]

            def write(position: int, answer: Completion, window=window, samplings=samplings) -> None:
                i, prompt_ids = window[position]
                temperature, top_p = samplings[position]
                row = {
                    "id": i,
                    "turns": list(prompts[i].turns[:1]),
                    "answer": answer.text,
                    "prompt_ids": prompt_ids,
                    "answer_ids": answer.token_ids,
                    "temperature": temperature,
                    "top_p": top_p,
                    "finish": answer.finish_reason,
                    "task": prompts[i].task,
                    "domain": prompts[i].domain,
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                on_answer(len(answer.token_ids))

            llm.generate([ids for _, ids in window], params, write)
