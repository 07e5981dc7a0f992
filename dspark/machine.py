"""What this machine is, and what a measurement was made on: figures measured here belong to nothing else."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine_name(device: torch.device | str = "cpu") -> str:
    """Processor, vector instructions, cores and threads in use, or the accelerator's name."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, {capability}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device.type}"


def provenance() -> dict:
    """`machine`, `versions`, `git` and `argv`, to be stored with every result."""
    import transformers

    import dspark

    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "native_bf16": torch.cpu._is_avx512_bf16_supported(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "dspark": dspark.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "git": git_revision(),
        "argv": sys.argv[1:],
    }


def git_revision() -> str | None:
    """Short revision of the checkout the code runs from, `+` appended where it was changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
