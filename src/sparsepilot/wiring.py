"""Which of the data's sites a dictionary reads and writes."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from typing_extensions import TypedDict

from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.data.datamodule import RunData
from sparsepilot.data.sites import expand_sites
from sparsepilot.errors import ConfigError
from sparsepilot.training.trainee import Sites, SiteStats

WIRING = ("sites", "skip")
"""Fields of the model group that `wire` reads."""
STARTING = ("init_from",)
"""Those that `starting.py` reads; the rest belongs to the architecture."""


class ReadWrite(TypedDict, total=False):
    """`model.sites` of a transcoder."""

    read: list[str]
    write: list[str]
    cross_layer: bool


class Wired(NamedTuple):
    """The shape of a dictionary and the statistics of its sites."""

    blocks: Blocks
    sites: Sites


def check_sites(sites: list[str] | ReadWrite | None = None, skip: bool = False) -> None:
    """What can be said of `model.sites` before there is a cache.

    Raises:
        ConfigError: naming the field.
    """
    if isinstance(sites, dict):
        if set(sites) - {"read", "write", "cross_layer"} or not sites.get("read") or not sites.get("write"):
            raise ConfigError(f"model.sites = {sites}: a transcoder wants read: [sites] and write: [sites]")
        if skip and sites.get("cross_layer"):
            raise ConfigError(
                "model.skip = True: a linear skip over all layers would let later ones explain earlier ones; a "
                "cross-layer transcoder has none"
            )
    elif skip:
        raise ConfigError(
            "model.skip = True: only a transcoder has a skip; set model.sites={read: [...], write: [...]}"
        )
    elif sites == []:
        raise ConfigError("model.sites = []: names nothing to read; name a site of the data, or null for all of them")


def wire(data: RunData, sites: list[str] | ReadWrite | None = None, skip: bool = False) -> Wired:
    """Blocks and sites for `model.sites`, which names sites (or globs) among the data's.

    None or a list: those are read and written, one as an autoencoder, several as a crosscoder. `{read, write}`: a
    transcoder; with `cross_layer` latents are shared out evenly over the sites that are read, and those of the l-th
    write the l-th site of `write` and all after it.

    Raises:
        ConfigError, DataError: naming the field, when a site is not among the data's or the shape is impossible.
    """
    check_sites(sites, skip)
    widths = dict(zip(data.sites, (data.cache.widths[site] for site in data.sites), strict=True))
    ends = list(accumulate(widths.values()))
    columns = {site: slice(end - width, end) for (site, width), end in zip(widths.items(), ends, strict=True)}

    def stats(patterns: list[str], field: str) -> list[SiteStats]:
        found = []
        for name in expand_sites(patterns, data.sites, field):
            s = data.cache.stats(name)
            found.append(SiteStats(name, columns[name], s.mean_D, s.variance_D, s.scale))
        return found

    if not isinstance(sites, dict):
        both = stats(sites if sites is not None else list(data.sites), "model.sites")
        return Wired(Blocks.autoencoder(*(widths[s.name] for s in both)), Sites(both, None))

    reads, writes = stats(sites["read"], "model.sites.read"), stats(sites["write"], "model.sites.write")
    read_widths, write_widths = (tuple(widths[s.name] for s in side) for side in (reads, writes))
    cross_layer = sites.get("cross_layer", False)
    if cross_layer and (len(set(read_widths)) > 1 or len(reads) != len(writes)):
        raise ConfigError(
            f"model.sites.cross_layer = True: reads {read_widths} and writes {write_widths}; as many sites on both "
            "sides and one width for all that are read are needed"
        )
    return Wired(
        Blocks(read_widths, write_widths, same=False, skip=skip, cross_layer=cross_layer), Sites(reads, writes)
    )
