"""Features on disk: what was computed comes back, after kills and damage too, and what does not fit is refused."""

import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dspark.train.feature_cache
from dspark.models.decoder import Decoder
from dspark.train.config import TrainConfig
from dspark.train.data import Example
from dspark.train.feature_cache import FeatureCache, model_digest
from dspark.train.features import FeatureSource
from dspark.train.trainer import Trainer
from tests.tiny import make_example, tiny_config, tiny_model, tiny_state_dict, tiny_target
from tests.train.test_features import EXAMPLES, TARGET, CountingSource, assert_same

ROOM = 1 << 20


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch):
    """Two shards of two examples each."""
    monkeypatch.setattr(dspark.train.feature_cache, "SHARD_BYTES", 9_000)


def make_cache(folder: Path, target: Decoder = TARGET, examples: list[Example] = EXAMPLES, room: int = ROOM, taps=(0,)):
    return FeatureCache(CountingSource(target, taps, 0), folder, examples, room)


def computed(cache: FeatureCache) -> int:
    assert isinstance(cache.source, CountingSource)
    return cache.source.computed


def read_all(cache: FeatureCache):
    return cache.get(EXAMPLES)


def test_what_comes_back_is_what_was_computed(tmp_path: Path):
    """By this process, by the next one, and by one whose examples are split and ordered otherwise."""
    direct = [next(FeatureSource(TARGET, (0,), 0).compute_all([e])) for e in EXAMPLES]
    first, second = make_cache(tmp_path / "a"), make_cache(tmp_path / "a", examples=EXAMPLES[::-1])
    for cache, count in ((first, 4), (first, 4), (second, 0)):
        for found, expected in zip(read_all(cache), direct, strict=True):
            torch.testing.assert_close(found.taps, expected.taps, atol=1e-2, rtol=2**-7)
            torch.testing.assert_close(found.hidden, expected.hidden, atol=1e-2, rtol=2**-7)
            torch.testing.assert_close(found.logsumexp, expected.logsumexp, atol=1e-4, rtol=0)
        assert computed(cache) == count
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_conversations_of_several_turns(tmp_path: Path):
    """Rows begin at the first answer, not at the last: once the shard's later examples were read from wrong rows."""
    talks = [make_example(tuple(range(20)), tuple(range(n)), earlier=((4, 9), (12, 15))) for n in (5, 9, 7)]
    for cache in (make_cache(tmp_path, examples=talks), make_cache(tmp_path, examples=talks)):
        for talk, found in zip(talks, cache.get(talks), strict=True):
            (expected,) = FeatureSource(TARGET, (0,), 0).compute([talk])
            assert found.hidden.shape == expected.hidden.shape
            torch.testing.assert_close(found.logsumexp, expected.logsumexp, atol=1e-4, rtol=0)
        used = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert cache.num_bytes - 2 * 2048 < used <= cache.num_bytes


def test_the_predicted_size_is_the_size(tmp_path: Path):
    cache = make_cache(tmp_path)
    assert not list(tmp_path.iterdir())
    read_all(cache)
    used = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert cache.num_bytes - 2 * 2048 < used <= cache.num_bytes


def test_a_shard_is_computed_when_one_of_its_examples_is_asked_for(tmp_path: Path):
    cache = make_cache(tmp_path)
    cache.get(EXAMPLES[:1])
    assert computed(cache) == 2 and len(list(tmp_path.iterdir())) == 1


def test_too_much_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"of 4 examples take 0.00 GiB, --feature-cache-gib allows 0.00 GiB"):
        make_cache(tmp_path, room=10_000)
    usage = dspark.train.feature_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(dspark.train.feature_cache.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ValueError, match=r"take 0.00 GiB more in '.*', its disk has 0.00 GiB free"):
        make_cache(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_on_disk_needs_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read_all(make_cache(tmp_path))
    usage = dspark.train.feature_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(dspark.train.feature_cache.shutil, "disk_usage", lambda _: usage._replace(free=0))
    read_all(make_cache(tmp_path))


def test_features_of_something_else_are_refused(tmp_path: Path):
    read_all(make_cache(tmp_path))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"target": tiny_target(seed=1)}, "model"),
        ({"target": tiny_target(torch.bfloat16)}, "model and other dtype"),
        ({"taps": (1,)}, "tap layers"),
        ({"examples": EXAMPLES[:3]}, "examples"),
        ({"examples": [*EXAMPLES[:3], make_example(range(1, 30), range(10, 30))]}, "examples"),
    ]
    for change, what in changes:
        with pytest.raises(ValueError, match=f"made from another {what}; choose another"):
            make_cache(tmp_path, **change)


@pytest.mark.parametrize("name", ["o_proj", "down_proj", "q_proj", "up_proj"])
def test_one_changed_matrix_is_another_model(name: str):
    config = tiny_config()
    state = tiny_state_dict(config)
    before = model_digest(Decoder(config, state, dtype=torch.float32))
    assert model_digest(Decoder(config, state, dtype=torch.float32)) == before
    matrix = next(n for n in state if name in n)
    state[matrix] = state[matrix] * 1.01
    assert model_digest(Decoder(config, state, dtype=torch.float32)) != before


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rename_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    save_file({f"other.{name}": t for name, t in tensors.items()}, path, make_cache(path.parent / "x").made_from)


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty, rename_a_tensor])
def test_a_damaged_shard_is_computed_again(tmp_path: Path, damage):
    before = deepcopy(read_all(make_cache(tmp_path)))  # they lie in the mapped file otherwise
    damage(tmp_path / "features-00001.safetensors")
    cache = make_cache(tmp_path)
    for a, b in zip(read_all(cache), before, strict=True):
        assert_same(a, b)
    assert computed(cache) == 2
    assert computed(make_cache(tmp_path)) == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
import dspark.train.feature_cache as module
from tests.train.test_feature_cache import make_cache, read_all
module.SHARD_BYTES = 9_000
save, written = module.save_file, []
def killed(tensors, path, metadata):
    save(tensors, path, metadata)
    written.append(path)
    if len(written) == 2:
        path.write_bytes(path.read_bytes()[:-100])
        os.kill(os.getpid(), signal.SIGKILL)
module.save_file = killed
read_all(make_cache(Path(sys.argv[1])))
"""


def test_a_killed_run_keeps_its_whole_shards(tmp_path: Path):
    """Killed in the middle of the second file: the first is kept, and the rest of the second once it is old gone."""
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert run.returncode == -signal.SIGKILL
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors", ".tmp"]
    cache = make_cache(tmp_path)
    for found, expected in zip(read_all(cache), read_all(make_cache(tmp_path / "other")), strict=True):
        assert_same(found, expected)
    assert computed(cache) == 2
    for path in tmp_path.glob("*.tmp"):
        os.utime(path, (0, 0))
    make_cache(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


FULL = """
import resource, sys
from pathlib import Path
from typing import Any
import dspark.train.feature_cache as module
from tests.train.test_feature_cache import EXAMPLES, make_cache, read_all
module.SHARD_BYTES = 9_000
cache = make_cache(Path(sys.argv[1]))
cache.get(EXAMPLES[:1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
try:
    read_all(cache)
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_is_one_clear_error_and_leaves_nothing_broken(tmp_path: Path):
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"cannot write '{tmp_path}") and "stays" in run.stdout
    (kept,) = tmp_path.iterdir()  # the one before the disk was full
    assert kept.suffix == ".safetensors"
    cache = make_cache(tmp_path)
    read_all(cache)
    assert computed(cache) == 2


def test_training_from_disk_is_training_online(tmp_path: Path):
    """The same weights: bit for bit online, and up to how examples shared a forward from the disk."""
    weights = []
    for folder in (None, None, str(tmp_path)):
        config = TrainConfig(epochs=1, sequences_per_step=2, sequences_at_once=2, feature_cache=folder)
        trainer = Trainer(tiny_model(TARGET.config), TARGET, EXAMPLES, EXAMPLES[:1], config)
        trainer.step([0, 1])
        trainer.step([3, 2])
        weights.append([p.detach() for p in trainer.model.parameters()])
    for online, again, from_disk in zip(*weights, strict=True):
        assert torch.equal(online, again)
        torch.testing.assert_close(online, from_disk, atol=1e-5, rtol=1e-3)
