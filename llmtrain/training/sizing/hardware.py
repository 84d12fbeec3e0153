"""The numbers of a device: memory, rates, links. conf/hardware/ holds them with their sources."""

from __future__ import annotations

from functools import cache
from typing import Annotated

import torch
import yaml
from pydantic import Field

from llmtrain.config import Config

Positive = Annotated[float, Field(gt=0)]

ACHIEVED = 794.5 / 989.4
"""Part of the peak that large matrix products reach on an H100: where a device's own is not known."""


class HardwareConfig(Config):
    """A kind of device and the node it stands in. What is null is not known."""

    name: str
    """`auto`: the numbers of the device that is found, where none is set here."""
    devices: list[str]
    """What CUDA calls such devices."""
    gpus_per_node: Annotated[int, Field(gt=0)] | None
    memory_gib: Positive | None
    bf16_tflops: Positive | None
    matmul_tflops: Positive | None
    memory_gbps: Positive | None
    link_gbps: Positive | None
    network_gbps: Positive | None
    host_gbps: Positive | None

    def resolve(self, device: str | None) -> HardwareConfig:
        """`auto` with the numbers of the device that CUDA calls `device`; anything else as it is."""
        found = known_devices().get(device) if self.name == "auto" and device else None
        if found is None:
            return self
        ours = {key: value for key, value in self.model_dump().items() if key != "name" and value}
        return found.model_copy(update=ours)

    @property
    def unknown(self) -> list[str]:
        """What a prediction of time needs and nothing here tells."""
        needed = ("bf16_tflops", "memory_gbps", "link_gbps", "network_gbps", "host_gbps", "gpus_per_node")
        return [key for key in needed if getattr(self, key) is None]

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 peak in FLOP/s: what MFU is measured against."""
        return None if self.bf16_tflops is None else self.bf16_tflops * 1e12

    @property
    def matmul_flops(self) -> float | None:
        """What a large bf16 matrix product reaches, FLOP/s."""
        if self.matmul_tflops is not None:
            return self.matmul_tflops * 1e12
        return None if self.bf16_tflops is None else self.bf16_tflops * 1e12 * ACHIEVED


@cache
def known_devices() -> dict[str, HardwareConfig]:
    """The files of conf/hardware by the names of their devices."""
    from llmtrain.config.hydra import config_directory

    files = sorted((config_directory() / "hardware").glob("*.yaml"))
    numbers = [content for file in files if "devices" in (content := yaml.safe_load(file.read_text()))]
    configs = map(HardwareConfig.model_validate, numbers)
    return {device: config for config in configs for device in config.devices}


def device_name(device: torch.device | None = None) -> str | None:
    """What CUDA calls a device, the current one by default; None where there is none."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    return torch.cuda.get_device_name(device)
