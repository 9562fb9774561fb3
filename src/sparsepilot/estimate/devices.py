"""GPUs by name: the figures of their makers' public data sheets, and how much of them is assumed to be reached."""

from __future__ import annotations

from typing import NamedTuple

from sparsepilot.errors import ConfigError, nearest


class Device(NamedTuple):
    """One GPU. FLOP/s are of dense products; link and node figures are bytes per second in one direction."""

    title: str
    memory_bytes: float
    bf16_flops: float
    """with fp32 accumulation, without sparsity"""
    fp32_flops: float
    """without TF32, which this project does not use"""
    memory_bandwidth: float
    link_bandwidth: float
    """to the other GPUs of a machine"""
    source: str


GB, T = 1e9, 1e12

DEVICES: dict[str, Device] = {
    "l4": Device(
        "NVIDIA L4", 24 * GB, 121 * T, 30.3 * T, 300 * GB, 32 * GB,
        "NVIDIA L4 Tensor Core GPU data sheet; PCIe Gen4 x16",
    ),
    "rtx4090": Device(
        "NVIDIA GeForce RTX 4090", 24 * GB, 165.2 * T, 82.6 * T, 1008 * GB, 32 * GB,
        "NVIDIA Ada GPU Architecture white paper; PCIe Gen4 x16",
    ),
    "l40s": Device(
        "NVIDIA L40S", 48 * GB, 362.05 * T, 91.6 * T, 864 * GB, 32 * GB,
        "NVIDIA L40S data sheet; PCIe Gen4 x16",
    ),
    "a100-40gb": Device(
        "NVIDIA A100 40GB SXM", 40 * GB, 312 * T, 19.5 * T, 1555 * GB, 300 * GB,
        "NVIDIA A100 Tensor Core GPU data sheet; NVLink 600 GB/s both ways",
    ),
    "a100": Device(
        "NVIDIA A100 80GB SXM", 80 * GB, 312 * T, 19.5 * T, 2039 * GB, 300 * GB,
        "NVIDIA A100 Tensor Core GPU data sheet; NVLink 600 GB/s both ways",
    ),
    "h100": Device(
        "NVIDIA H100 SXM", 80 * GB, 989.4 * T, 66.9 * T, 3350 * GB, 450 * GB,
        "NVIDIA H100 Tensor Core GPU data sheet; NVLink 900 GB/s both ways",
    ),
    "h200": Device(
        "NVIDIA H200 SXM", 141 * GB, 989.4 * T, 66.9 * T, 4800 * GB, 450 * GB,
        "NVIDIA H200 Tensor Core GPU data sheet; NVLink 900 GB/s both ways",
    ),
    "b200": Device(
        "NVIDIA B200 (HGX)", 180 * GB, 2250 * T, 80 * T, 7700 * GB, 900 * GB,
        "NVIDIA HGX B200 data sheet; NVLink 1.8 TB/s both ways",
    ),
}  # fmt: skip


class Efficiency(NamedTuple):
    """Shares of a data sheet's figures that a step is assumed to reach. Assumptions, not measurements."""

    products: float = 0.5
    memory: float = 0.6
    links: float = 0.7
    launch_s: float = 3e-3
    """per micro-batch: some 300 kernels, one after the other, at 10 microseconds each"""


NODE_BANDWIDTH = 50 * GB
"""Bytes per second and GPU between machines, in one direction: one 400 Gb/s adapter each. An assumption, too."""


def device(name: str) -> Device:
    """The device of that name.

    Raises:
        ConfigError: listing the known ones.

    >>> device("h100").title
    'NVIDIA H100 SXM'
    """
    if name not in DEVICES:
        raise ConfigError(f"device = {name}: is not known; {nearest(name, DEVICES)}")
    return DEVICES[name]
