"""What a request with penalties, bias, minimum length and stop strings must give, computed in the plainest way.

Shapes: V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dspark.models.decoder import Decoder
from dspark.sampling import SamplingParams, truncated_probs
from tests.tiny import PlainTarget, plain_logits


def naive_adjusted(
    logits: Tensor, params: SamplingParams, prefix: Sequence[int], prompt_length: int, end_ids: frozenset[int]
) -> Tensor:
    """`adjusted_logits` of one row [V], token by token."""
    logits = logits.clone()
    generated = list(prefix[prompt_length:])
    for token in range(len(logits)):
        logits[token] += params.biases.get(token, 0.0)
        if token in prefix:
            positive = logits[token] > 0
            logits[token] = (
                logits[token] / params.repetition_penalty if positive else logits[token] * (params.repetition_penalty)
            )
        if token in generated:
            logits[token] -= params.frequency_penalty * generated.count(token) + params.presence_penalty
        if token in end_ids and len(generated) < params.min_new_tokens:
            logits[token] = -torch.inf
    return logits


class AdjustedTarget(PlainTarget):
    """Knows penalties too, for prompts of one length; to be the target of the drafters in tests/tiny.py."""

    def __init__(self, target: Decoder, prompt_length: int, end_ids: frozenset[int] = frozenset()):
        super().__init__(target)
        self.prompt_length, self.end_ids = prompt_length, end_ids

    def probs(self, prefix: Sequence[int], params: SamplingParams) -> Tensor:
        key = (tuple(prefix), replace(params, seed=None))
        if key not in self._probs:
            logits = plain_logits(self.target, prefix)[-1]
            logits = naive_adjusted(logits, params, prefix, self.prompt_length, self.end_ids)[None]
            values = (params.temperature, params.top_k, params.top_p, params.min_p)
            self._probs[key] = truncated_probs(logits, *(torch.tensor([v]) for v in values))[0]
        return self._probs[key]


class Answer(NamedTuple):
    token_ids: list[int]
    text: str
    finish_reason: str
    stopped_by: int | str | None


def plain_answer(
    plain: AdjustedTarget, prompt: Sequence[int], params: SamplingParams, decode: Callable[[list[int]], str]
) -> Answer:
    """The greedy answer token by token, all text decoded anew after each."""
    output: list[int] = []
    while True:
        before = decode(output).rstrip("\ufffd")
        output.append(int(plain.probs([*prompt, *output], params).argmax()))
        text = decode(output)
        if len(output) > params.min_new_tokens:
            # Stop strings of complete characters that end in this token's text.
            found = [(text.find(stop, max(0, len(before) - len(stop) + 1)), stop) for stop in params.stop]
            found = [f for f in found if f[0] >= 0] if not text.endswith("\ufffd") else []
            if found:
                return Answer(output, text[: min(found)[0]], "stop", min(found)[1])
            if output[-1] in plain.end_ids:
                return Answer(output, text, "stop", output[-1])
        if len(output) == params.max_new_tokens:
            return Answer(output, text, "length", None)
