"""Peak speed and memory of known GPUs, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        matches: words that all occur in the name reported by the driver.
        bf16, fp32: floating-point operations per second: matrix units without sparsity, and plain float32.
        memory: GB (10⁹ bytes).
        bandwidth: of its memory, in bytes per second.
    """

    matches: tuple[str, ...]
    bf16: float
    fp32: float
    memory: float
    bandwidth: float


# NVIDIA's data sheets "H100 Tensor Core GPU", "H200 Tensor Core GPU", "DGX B200" and "HGX B200" (an eighth of each
# sum), "A100 Tensor Core GPU", "L40S", "L4", "A10" and "Ada GPU architecture" (RTX 4090, products summed in float32),
# AMD's "Instinct MI300X". Numbers that a sheet gives with sparsity are halved. If several match, the first counts.
DEVICES = {
    "b200": Device(("B200",), 2.25e15, 75e12, 180, 8e12),
    "h200": Device(("H200",), 989e12, 67e12, 141, 4.8e12),
    "h100-pcie": Device(("H100", "PCIe"), 756e12, 51e12, 80, 2.0e12),
    "h100": Device(("H100",), 989e12, 67e12, 80, 3.35e12),
    "a100-40": Device(("A100", "40GB"), 312e12, 19.5e12, 40, 1.555e12),
    "a100": Device(("A100",), 312e12, 19.5e12, 80, 2.039e12),
    "l40s": Device(("L40S",), 362e12, 91.6e12, 48, 864e9),
    "l4": Device(("L4",), 121e12, 30.3e12, 24, 300e9),
    "a10": Device(("A10",), 125e12, 31.2e12, 24, 600e9),
    "rtx4090": Device(("RTX", "4090"), 165e12, 82.6e12, 24, 1.008e12),
    "mi300x": Device(("MI300X",), 1.307e15, 163.4e12, 192, 5.3e12),
}


def known_device(name: str) -> Device | None:
    """Return the device with a name as the driver reports it."""
    words = name.replace("-", " ").split()
    for device in DEVICES.values():
        if all(word in words for word in device.matches):
            return device
    return None
