"""Which device the language model of a rank is on."""

from __future__ import annotations

from sparsepilot.errors import ConfigError
from sparsepilot.ranks import ranks_here


def device_here(wanted: str | list[str], field: str) -> str:
    """The device of this process's language model; see `device_of`."""
    here = ranks_here()
    return device_of(wanted, *((0, 1) if here is None else (here.local_rank, here.local_world)), field)


def device_of(wanted: str | list[str], local_rank: int, local_world: int, field: str = "lm.device") -> str:
    """The device of one rank's language model: its own GPU, unless one is named, or one for each.

    Args:
        wanted: a device, or one for each rank of this machine.
        local_rank: the rank's number on this machine.
        local_world: how many there are.
        field: where it was set, for the error.

    Raises:
        ConfigError: for a list of another length.

    >>> device_of("cuda", 1, 4), device_of("cuda:7", 1, 4), device_of(["cuda:2", "cuda:3"], 1, 2)
    ('cuda:1', 'cuda:7', 'cuda:3')
    """
    if isinstance(wanted, str):
        return f"cuda:{local_rank}" if wanted == "cuda" and local_world > 1 else wanted
    if len(wanted) != local_world:
        raise ConfigError(f"{field} = {list(wanted)}: {local_world} ranks run on this machine; name so many, or one")
    return wanted[local_rank]
