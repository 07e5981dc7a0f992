"""What this machine is: figures that were measured on it belong to nothing else."""

import os
import platform
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
