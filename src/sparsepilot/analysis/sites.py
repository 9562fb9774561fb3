"""Which sites of a cache a dictionary reads and writes, though another tool may have named them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsepilot.data.cache import Cache
from sparsepilot.data.together import known_sites
from sparsepilot.errors import ConfigError, nearest
from sparsepilot.interop.names import model_of, place_of


def sites_in_cache(
    cfg: Mapping[str, Any], path: str | Mapping[str, str], site: str | Sequence[str] | None, field: str
) -> tuple[list[str], list[str]]:
    """The cache's own names of what a dictionary reads and writes.

    A name that the cache does not have is another tool's, `blocks.9.hook_resid_post` or `layers.9` for
    `model.layers.9`: it stands for the one site of the cache that is the same place in the language model
    (`interop.names.place_of`).

    Args:
        cfg: of the dictionary.
        path: of the cache, or of several by their names, whose sites are taken by their own names only.
        site: the user's word for it, of a dictionary with one site: its name, or of a transcoder [read, write].
        field: begins the message.

    Raises:
        ConfigError: where it is not known which sites are meant; the message says how to name them.
        DataError: where there is no cache.
    """
    known = known_sites(path)
    sides = [list(cfg.get(name) or []) for name in ("sites", "sites_out")]
    transcodes = cfg["blocks"] in ("transcoder", "cross_layer_transcoder")
    name_it = "site=[<read>,<write>]" if transcodes else "site=..."
    if site is not None:
        return _named(site, known, path, transcodes, several=any(len(side) > 1 for side in sides))
    if not all(sides):
        raise ConfigError(
            f"{field}: its file does not name the sites that the dictionary reads and writes; name them as the cache "
            f"at {path} does, {name_it}; {nearest('', known)}"
        )
    return _translated(sides[0], known, path, field, name_it), _translated(sides[1], known, path, field, name_it)


def _named(site: Any, known: list[str], path: Any, transcodes: bool, several: bool) -> tuple[list[str], list[str]]:
    wanted = "[<read>,<write>], as a transcoder has two" if transcodes else "one name"
    names = site if isinstance(site, list | tuple) else [site]
    if several:
        raise ConfigError(f"site = {site}: the dictionary has several sites, and one cannot take their place")
    if len(names) != 1 + transcodes:
        raise ConfigError(f"site = {site}: give {wanted}; {nearest('', known)}")
    for name in names:
        if name not in known:
            raise ConfigError(f"site = {name}: the cache at {path} has no such site; {nearest(str(name), known)}")
    return [names[0]], [names[-1]]


def _translated(sites: list[str], known: list[str], path: Any, field: str, name_it: str) -> list[str]:
    foreign = [site for site in sites if site not in known]
    model = model_of({"source": Cache(path).source}) if foreign and isinstance(path, str) else None
    found = {site: site for site in sites if site in known}
    for site in foreign:
        place = place_of(site, model)
        same = [own for own in known if place is not None and place_of(own, model) == place]
        if len(same) != 1 or not isinstance(path, str):
            raise ConfigError(
                f"{field}: the dictionary's site {site!r} is none that the cache at {path} has; {nearest(site, known)} "
                f"If it goes by another name there, give {name_it}"
            )
        found[site] = same[0]
    return [found[site] for site in sites]
