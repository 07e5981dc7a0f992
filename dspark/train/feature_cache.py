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
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.models.decoder import Decoder
from dspark.train.data import Example
from dspark.train.features import Features, FeatureSource

SHARD_BYTES = 64 << 20
HEADER_BYTES = 2048  # of a shard, more than it takes
DIGEST_COLUMNS = 8  # of every linear map that the fingerprint of a model reads


@dataclass(frozen=True)
class Place:
    """Where an example's rows lie: its shard, and its first rows in `taps` and in `hidden` and `logsumexp`."""

    shard: int
    taps: int
    hidden: int


class FeatureCache:
    """A `FeatureStore` on disk in front of the target."""

    def __init__(self, source: FeatureSource, folder: Path, examples: Iterable[Example], max_bytes: int):
        """examples: all that will ever be asked for, in any order.

        Raises ValueError, before anything is written, if they take more than max_bytes or than the disk has free, or
        if the folder holds the features of another model or of other examples.
        """
        self.source, self.folder = source, folder
        self._shards: list[list[Example]] = []
        self._places: dict[str, Place] = {}
        self._open: dict[int, safe_open] = {}
        self._place({example_key(e): e for e in examples})
        self.made_from = {
            "model": model_digest(source.target),
            "dtype": str(source.target.dtype).removeprefix("torch."),
            "tap layers": ",".join(map(str, source.tap_layers)),
            "examples": hashlib.sha256("".join(self._places).encode()).hexdigest(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("features-*.tmp"):
            if left.stat().st_mtime < time.time() - 3600:  # of a killed process; no write takes that long
                left.unlink(missing_ok=True)
        self._refuse_others()
        self._refuse_too_much(max_bytes)

    def get(self, indices: Sequence[int], examples: Sequence[Example]) -> list[Features]:
        """See `FeatureStore`; the numbers are not needed. Raises ValueError if a shard cannot be written."""
        return [self._read(example) for example in examples]

    @property
    def num_bytes(self) -> int:
        """Of all shards, an upper bound that is hardly more than what they take."""
        return sum(map(self._shard_bytes, range(len(self._shards))))

    def path(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}.safetensors"

    # -- what is where ------------------------------------------------------------------------------

    def _place(self, by_key: dict[str, Example]) -> None:
        """Fill shards with examples in the order of their keys, which does not depend on the split or its order."""
        taps = hidden = size = 0
        for key in sorted(by_key):
            example = by_key[key]
            if not self._shards or size + self._bytes(example) > SHARD_BYTES:
                self._shards.append([])
                taps = hidden = size = 0
            self._places[key] = Place(len(self._shards) - 1, taps, hidden)
            self._shards[-1].append(example)
            taps, hidden = taps + len(example.token_ids) - 2, hidden + hidden_rows(example)
            size += self._bytes(example)

    def _bytes(self, example: Example) -> int:
        width = 2 * self.source.target.config.hidden_size  # bytes of a hidden state in bf16
        taps = len(self.source.tap_layers) * width * (len(example.token_ids) - 2)
        return taps + (width + 4) * hidden_rows(example)

    def _shard_bytes(self, shard: int) -> int:
        return HEADER_BYTES + sum(map(self._bytes, self._shards[shard]))

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
                f"the features of {len(self._places)} examples take {gib(needed)}, --feature-cache-gib allows "
                f"{gib(max_bytes)}; allow more, or train without --feature-cache"
            )
        if missing > free:
            raise ValueError(
                f"the features take {gib(missing)} more in '{self.folder}', its disk has {gib(free)} free; "
                "free some, or train without --feature-cache"
            )

    # -- shards -------------------------------------------------------------------------------------

    def _read(self, example: Example) -> Features:
        place = self._places[example_key(example)]
        if place.shard not in self._open:
            self._open[place.shard] = self._load(place.shard) or self._write(place.shard)
        file = self._open[place.shard]
        device = self.source.target.device
        taps = slice(place.taps, place.taps + len(example.token_ids) - 2)
        hidden = slice(place.hidden, place.hidden + hidden_rows(example))
        rows = {"taps": taps, "hidden": hidden, "logsumexp": hidden}
        return Features(**{name: file.get_slice(name)[at].to(device) for name, at in rows.items()})

    def _load(self, shard: int) -> safe_open | None:
        """The shard, memory-mapped; None if it is not there or not whole."""
        try:
            file = safe_open(self.path(shard), "pt")
            tensors = {name: file.get_tensor(name) for name in ("taps", "hidden", "logsumexp")}
            whole = (file.metadata() or {}).get("sha256") == checksum(tensors)
        except (OSError, SafetensorError):
            return None
        return file if whole else None

    def _write(self, shard: int) -> safe_open:
        """Compute the shard and give it its name once it is whole. Raises ValueError if the disk refuses."""
        features = list(self.source.compute_all(self._shards[shard]))
        tensors = {
            name: torch.cat([getattr(f, name) for f in features]).cpu() for name in ("taps", "hidden", "logsumexp")
        }
        del features
        path = self.path(shard)
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


def hidden_rows(example: Example) -> int:
    """Rows of `Features.hidden` and `Features.logsumexp`."""
    return len(example.token_ids) - 1 - len(example.first_prompt)


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
