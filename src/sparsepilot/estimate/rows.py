"""Where a job's rows come from: a cache, the recipe of one that is not built yet, or sizes that were given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf

from sparsepilot.caching import is_sealed
from sparsepilot.data.dtypes import row_bytes
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.sites import expand_sites
from sparsepilot.data.synthetic import SITE
from sparsepilot.data.together import known_sites, open_sites
from sparsepilot.errors import ConfigError
from sparsepilot.estimate.wanted import Wanted


class Data(NamedTuple):
    """Where rows come from."""

    widths: dict[str, int]
    row_bytes: int
    """stored, of all sites of the run"""
    batch_row_bytes: int
    """as a batch holds them"""
    plan: CachePlan | None
    """None where there is no cache"""
    cache_bytes: int | None
    """measured, where the cache is there"""
    num_streams: int
    window_mb: int
    prefetch_batches: int
    notes: tuple[str, ...] = ()


def read_data(cfg: DictConfig, wanted: Wanted) -> Data:
    """Widths and sizes: of the cache where there is one, else of its recipe, else as given.

    Raises:
        ConfigError: where nobody says how wide the sites are, or how many rows there will be.
    """
    node = cast(dict[str, Any], OmegaConf.to_container(cfg.data, resolve=True))
    common: dict[str, Any] = {
        "num_streams": int(node.get("num_streams", 64)),
        "window_mb": int(node.get("window_mb", 1024)),
        "prefetch_batches": int(node.get("prefetch_batches", 4)),
    }
    path, build = node.get("path"), node.get("build")
    if path is not None and _is_there(path):
        sites = expand_sites(node["sites"], known_sites(path), str(path))
        cache = open_sites(path, sites)
        stored = sum(cache.row_bytes(site) for site in sites)
        widths = {site: cache.widths[site] for site in sites}
        items = [cache.row_bytes(site) / cache.widths[site] for site in sites]
        batch = round(sum(widths.values()) * (4 if min(items) < 2 else max(items)))
        plan = CachePlan(cache.num_train_rows, cache.num_val_rows, widths, "float32")  # only its rows are asked for
        return Data(widths, stored, batch, plan, cache.disk_bytes(), **common)
    notes = ["the language model beside it is not in these figures"] if path is None else []
    plan = planned(cfg, node, build, wanted, notes)
    stored = sum(row_bytes(width, plan.dtype) for width in plan.widths.values())
    item = {"float32": 4, "int8": 4}.get(plan.dtype, 2)
    has_cache = "path" in node
    return Data(
        plan.widths, stored, sum(plan.widths.values()) * item, plan if has_cache else None, None, **common,
        notes=tuple(notes),
    )  # fmt: skip


def _is_there(path: Any) -> bool:
    if isinstance(path, dict):
        return all(is_sealed(Path(one)) for one in path.values())
    return is_sealed(Path(path))


def planned(
    cfg: DictConfig, node: Mapping[str, Any], build: Mapping[str, Any] | None, wanted: Wanted, notes: list[str]
) -> CachePlan:
    """The plan of a cache that is not there yet; adds to `notes` what was taken for granted."""
    recipe = dict(build or (node if "path" not in node else {}))  # data=live says of itself what a cache's recipe does
    if str(recipe.get("_target_", "")).startswith("sparsepilot.data.synthetic"):
        return CachePlan(
            wanted.rows or recipe["num_rows"], recipe["num_val_rows"], {SITE: wanted.d_in or recipe["d_in"]},
            recipe.get("dtype", "float32"), recipe.get("chunk_rows", 0), recipe.get("shard_rows", 0),
        )  # fmt: skip
    if wanted.d_in is None:
        raise ConfigError(
            f"data.path = {node.get('path')}: no cache is there that says how wide its sites are; give d_in=... (the "
            "width of each site) and rows=... (training rows)"
        )
    rows = wanted.rows
    if rows is None:
        tokens = recipe.get("max_tokens")
        rows = int(cfg.samples) if tokens is None else round(tokens * (1 - recipe.get("val_fraction", 0.05)))
        notes.append(
            f"the data are taken to have {rows:,} training rows ({'samples' if tokens is None else 'max_tokens'}); "
            "rows=... says otherwise"
        )
    share = recipe.get("val_fraction", 0.05)
    val_rows = math.ceil(rows * share / (1 - share)) if build is not None else 0
    dtype = recipe.get("dtype", "bfloat16")
    if any("*" in site for site in node["sites"]):
        raise ConfigError(
            f"data.sites = {node['sites']}: which sites that means only the language model knows; name each of them"
        )
    widths = {site.removesuffix(":out").replace("/", "."): wanted.d_in for site in node["sites"]}
    return CachePlan(rows, val_rows, widths, dtype, recipe.get("chunk_rows", 0), recipe.get("shard_rows", 0))
