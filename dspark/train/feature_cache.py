"""Features on disk, bounded: computed once, read back by every later epoch and every later run on the same data.

Shards are safetensors files of consecutive examples in the order of their keys, written when the first of them is
asked for, so a killed run loses one shard at most. Each carries in its header what it was made from (model, precision,
tap layers, examples) and the SHA-256 of its tensors, checked when a process first reads it.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.models.decoder import Decoder
from dspark.train.data import Example
from dspark.train.features import Features, FeatureSource

SHARD_BYTES = 64 << 20
HEADER_BYTES = 512  # of a shard and of each example in it, more than it takes
DIGEST_COLUMNS = 8  # of every linear map that the fingerprint of a model reads


class FeatureCache:
    """Features in front of the target, like `FeatureSource`, but on disk."""

    def __init__(self, source: FeatureSource, folder: Path, examples: Iterable[Example], max_bytes: int):
        """examples: all that will ever be asked for, in any order.

        Raises ValueError, before anything is written, if they take more than max_bytes or than the disk has free, or
        if the folder holds the features of another model or of other examples.
        """
        self.source, self.folder = source, folder
        self._shards: list[dict[str, Example]] = []  # in the order of their keys, whatever the split and its order
        self._shard_of: dict[str, int] = {}  # by key
        self._open: dict[int, safe_open] = {}
        size = SHARD_BYTES
        for key, example in sorted({example_key(e): e for e in examples}.items()):
            size += self._bytes(example)
            if size > SHARD_BYTES:
                self._shards.append({})
                size = self._bytes(example)
            self._shards[-1][key] = example
            self._shard_of[key] = len(self._shards) - 1
        self.made_from = {
            "model": model_digest(source.target),
            "dtype": str(source.target.dtype).removeprefix("torch."),
            "tap layers": ",".join(map(str, source.tap_layers)),
            "examples": hashlib.sha256("".join(self._shard_of).encode()).hexdigest(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("features-*.tmp"):
            if left.stat().st_mtime < time.time() - 3600:  # of a killed process; no write takes that long
                left.unlink(missing_ok=True)
        self._refuse_others()
        self._refuse_too_much(max_bytes)

    def get(self, examples: Sequence[Example]) -> list[Features]:
        """See `FeatureSource.get`. Raises ValueError if a shard cannot be written."""
        found = []
        for key in map(example_key, examples):
            shard = self._shard_of[key]
            if shard not in self._open:
                self._open[shard] = self._load(shard) or self._write(shard)
            tensors = (self._open[shard].get_tensor(f"{key}.{name}") for name in Features._fields)
            found.append(Features(*(t.to(self.source.target.device) for t in tensors)))
        return found

    @property
    def num_bytes(self) -> int:
        """Of all shards, an upper bound that is hardly more than what they take."""
        return sum(map(self._shard_bytes, range(len(self._shards))))

    def path(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}.safetensors"

    # -- what is there and what it takes ------------------------------------------------------------

    def _bytes(self, example: Example) -> int:
        width = 2 * self.source.target.config.hidden_size  # bytes of a hidden state in bf16
        length, prompt = len(example), example.answer_spans[0][0]
        return len(self.source.tap_layers) * width * (length - 2) + (width + 4) * (length - 1 - prompt)

    def _shard_bytes(self, shard: int) -> int:
        examples = self._shards[shard].values()
        return HEADER_BYTES * (1 + len(examples)) + sum(map(self._bytes, examples))

    def _refuse_others(self) -> None:
        for path in sorted(self.folder.glob("features-*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
            except (OSError, SafetensorError):
                continue  # damaged: it will be computed again
            other = [name for name, value in self.made_from.items() if metadata.get(name) != value]
            if other:
                raise ValueError(
                    f"the features in '{self.folder}' were made from another {' and other '.join(other)}; "
                    "choose another --feature-cache or remove the folder"
                )

    def _refuse_too_much(self, max_bytes: int) -> None:
        present = sum(self._shard_bytes(i) for i in range(len(self._shards)) if self.path(i).exists())
        needed, missing, free = self.num_bytes, self.num_bytes - present, shutil.disk_usage(self.folder).free
        if needed > max_bytes:
            raise ValueError(
                f"the features of {len(self._shard_of)} examples take {gib(needed)}, --feature-cache-gib allows "
                f"{gib(max_bytes)}; allow more, or train without --feature-cache"
            )
        if missing > free:
            raise ValueError(
                f"the features take {gib(missing)} more in '{self.folder}', its disk has {gib(free)} free; "
                "free some, or train without --feature-cache"
            )

    # -- shards -------------------------------------------------------------------------------------

    def _load(self, shard: int) -> safe_open | None:
        """The shard, memory-mapped; None if it is not there or not whole."""
        try:
            file = safe_open(self.path(shard), "pt")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            whole = (file.metadata() or {}).get("sha256") == checksum(tensors)
        except (OSError, SafetensorError):
            return None
        return file if whole else None

    def _write(self, shard: int) -> safe_open:
        """Compute the shard and give it its name once it is whole. Raises ValueError if the disk refuses."""
        examples, path = self._shards[shard], self.path(shard)
        tensors = {
            f"{key}.{name}": t.cpu()
            for key, features in zip(examples, self.source.compute_all(list(examples.values())))
            for name, t in features._asdict().items()
        }
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may be at the same shard
        try:
            save_file(tensors, temporary, {**self.made_from, "sha256": checksum(tensors)})
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise ValueError(
                f"cannot write '{path}' ({gib(self._shard_bytes(shard))}): {error}; what was written before it stays"
            ) from None
        return safe_open(path, "pt")


def example_key(example: Example) -> str:
    """What an example's features depend on: its tokens and where its answer begins."""
    return hashlib.sha256(json.dumps([example.token_ids, example.answer_spans]).encode()).hexdigest()


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())  # pyright: ignore
    return digest.hexdigest()


@torch.inference_mode()
def model_digest(target: Decoder) -> str:
    """Hash of shape, norms and some columns of every linear map: one-hot inputs pick those out exactly anywhere."""
    c = target.config
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(c)).encode())

    def add(*tensors: Tensor) -> None:
        for t in tensors:
            digest.update((t.float() + 0.0).cpu().numpy().tobytes())  # -0 becomes 0

    def columns(linear: Callable[[Tensor], Tensor], inputs: int) -> Tensor:
        one_hot = torch.zeros(DIGEST_COLUMNS, inputs, dtype=target.compute_dtype, device=target.device)
        row = torch.arange(DIGEST_COLUMNS)
        one_hot[row, row * inputs // DIGEST_COLUMNS] = 1
        return linear(one_hot)

    add(target.final_norm, target.embedding[:: max(1, c.vocab_size // 64)], columns(target.lm_head, c.hidden_size))
    for layer in target.layers:
        add(layer.input_norm, layer.post_attention_norm)
        add(columns(layer.qkv_proj, c.hidden_size), columns(layer.o_proj, c.q_size))
        add(columns(layer.gate_up_proj, c.hidden_size), columns(layer.down_proj, c.intermediate_size))
        add(*([] if layer.qkv_bias is None else [layer.qkv_bias]), *(layer.qk_norms or []))
    return digest.hexdigest()


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
