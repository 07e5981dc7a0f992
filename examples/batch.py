"""Many prompts at once, with and without a drafter: the same greedy answers, fewer target forwards.

python examples/batch.py
"""

from dspark import LLM, SamplingParams

PROMPTS = [
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Name three uses of a paper clip.",
]


def main() -> None:
    answers = {}
    for drafter in ("none", "dspark"):
        llm = LLM("smollm2-135m", drafter=drafter)
        answers[drafter] = llm.generate(PROMPTS, SamplingParams(max_new_tokens=64))
        for answer in answers[drafter]:
            print(f"[{drafter}, {answer.accepted_length:.2f} tokens a round] {answer.text}\n")
    same = all(a.token_ids == b.token_ids for a, b in zip(*answers.values(), strict=True))
    print("identical:", same)


if __name__ == "__main__":
    main()
