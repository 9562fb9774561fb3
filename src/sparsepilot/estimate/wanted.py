"""What `scripts/estimate.py` takes beside a configuration of train.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wanted:
    """Each None is answered by the configuration, or not at all."""

    devices: int | None = None
    """GPUs (or CPU processes) in all; None: as the trainer says"""
    nodes: int | None = None
    """machines that they are on; None: as the trainer says"""
    device: str | None = None
    """a name of `devices.DEVICES`; None: this machine, or none in particular"""
    d_in: int | None = None
    """width of each site, where there is no cache yet that says so"""
    rows: int | None = None
    """training rows of a cache that is not there yet"""
    l0: float | None = None
    """active latents per row of a model with a penalty, once it has settled"""
    dead: float = 0.1
    """share of the latents that is dead, for AuxK"""
