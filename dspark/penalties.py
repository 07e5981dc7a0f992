"""What a request's bias, penalties and minimum length make of the target's logits, before any temperature.

Each row is adjusted by its own prefix, drafted tokens included, so the adjusted row is the distribution that plain
decoding would have had there: verification stays lossless. Rules: OpenAI's API for presence and frequency,
Transformers (Keskar et al. 2019, CTRL) for repetition.

Shapes: N = rows (tokens to predict), V = vocabulary size, T = most tokens that come before a row, repeated ones once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.sampling import SamplingParams

__all__ = ["Prefix", "adjusted_logits"]


class Prefix(NamedTuple):
    """All that a row's adjustment depends on: a request and its tokens before the row."""

    params: SamplingParams
    token_ids: list[int]  # prompt and generated; at least one token. The same list in all rows of a request
    prompt_length: int
    end_ids: frozenset[int] = frozenset()  # tokens that end the answer
    drafted: Sequence[int] = ()  # behind token_ids

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) + len(self.drafted) - self.prompt_length


def adjusted_logits(logits: Tensor, prefixes: list[Prefix]) -> Tensor:
    """logits [N, V] and the prefix of each row -> logits [N, V]. Rows without adjustments are passed on as they are."""
    rows = [row for row, prefix in enumerate(prefixes) if prefix.params.adjusts_logits]
    if not rows:
        return logits
    index = torch.tensor(rows, device=logits.device)
    prefixes = [prefixes[row] for row in rows]
    adjusted = logits[index]  # a copy
    _add_bias(adjusted, prefixes)
    if any(prefix.params.penalises for prefix in prefixes):
        _penalise(adjusted, prefixes)
    _ban_early_ends(adjusted, prefixes)
    return adjusted if len(rows) == len(logits) else logits.index_copy(0, index, adjusted)


def _add_bias(logits: Tensor, prefixes: list[Prefix]) -> None:
    entries = [(row, token, bias) for row, p in enumerate(prefixes) for token, bias in p.params.biases.items()]
    if entries:
        rows, tokens, biases = zip(*entries)
        index = torch.tensor([rows, tokens], device=logits.device)
        logits[index[0], index[1]] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)


def _penalise(logits: Tensor, prefixes: list[Prefix]) -> None:
    """Penalties touch only tokens of the prefix: these are gathered, changed and put back."""
    tokens, counts = (torch.from_numpy(values).to(logits.device) for values in _occurrences(prefixes))  # [N, T]

    def column(name: str) -> Tensor:
        values = [[getattr(p.params, name)] for p in prefixes]
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)  # [N, 1]

    repetition = column("repetition_penalty")
    values = logits.gather(-1, tokens)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= column("frequency_penalty") * counts
    values -= column("presence_penalty") * (counts > 0)
    logits.scatter_(-1, tokens, values)  # a token that is there twice gets the same value twice


def _occurrences(prefixes: list[Prefix]) -> NDArray[np.int64]:
    """[2, N, T]: the tokens before each row, and how often each was generated. A token may be there twice, with the
    same count; so padding is. What all rows of a request share is counted once."""
    known: dict[int, tuple[NDArray, NDArray]] = {}  # by the request's list of tokens
    rows = []
    for p in prefixes:
        if id(p.token_ids) not in known:
            tokens, place = np.unique(p.token_ids, return_inverse=True)
            known[id(p.token_ids)] = tokens, np.bincount(place[p.prompt_length :], minlength=len(tokens))
        tokens, counts = known[id(p.token_ids)]
        drafted = np.array(p.drafted, np.int64)
        place = np.searchsorted(tokens, drafted).clip(max=len(tokens) - 1)
        before = tokens[place] == drafted
        counts = counts + np.bincount(place[before], minlength=len(tokens))
        of_drafted = np.where(before, counts[place], (drafted[:, None] == drafted).sum(1))
        rows.append(np.stack([np.append(tokens, drafted), np.append(counts, of_drafted)]))
    padded = np.empty((2, len(rows), max(row.shape[1] for row in rows)), np.int64)
    for i, row in enumerate(rows):
        padded[:, i] = row[:, -1:]
        padded[:, i, : row.shape[1]] = row
    return padded


def _ban_early_ends(logits: Tensor, prefixes: list[Prefix]) -> None:
    for row, p in enumerate(prefixes):
        if p.num_generated < p.params.min_new_tokens and p.end_ids:
            logits[row, list(p.end_ids)] = -torch.inf
