"""Activations of any submodules, taken by forward hooks, with the forward pass stopped after the last one needed.

A site is the dotted path of a submodule: `model.layers.9` is its output, `model.layers.9.mlp:in` its input. Where a
module returns (or is given) several things, the first tensor counts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsepilot.errors import DataError, nearest
from sparsepilot.lm.load import LanguageModel


class _Stop(BaseException):
    """Ends a forward pass. Not an Exception, so that no `except Exception` inside a model swallows it."""


def expand_sites(lm: LanguageModel, patterns: Iterable[str]) -> list[str]:
    """Site names for globs, in the order of the patterns and, within one, of the model; duplicates once.

    `*` stands for one part of the path: `model.layers.*.mlp:in` is the input of every layer's MLP. `:out` is the
    default and is dropped. Raises DataError for a pattern that matches nothing, with the nearest names.
    """
    names = [name for name, _ in lm.model.named_modules() if name]
    sites: dict[str, None] = {}
    for pattern in patterns:
        path, side = split_site(pattern)
        parts = path.split(".")
        hits = [name for name in names if _matches(name.split("."), parts)]
        if not hits:
            raise DataError(f"site {pattern!r}: no such submodule in {lm.id}; {nearest(path, names)}")
        sites.update(dict.fromkeys(name + (":in" if side == "in" else "") for name in hits))
    if not sites:
        raise DataError("sites=[]: name at least one site, such as 'model.layers.9'")
    return list(sites)


def site_widths(lm: LanguageModel, sites: Sequence[str]) -> dict[str, int]:
    """Width of each site, seen in one forward pass over six tokens. Raises DataError where there is no such width."""
    tokens_CL = torch.zeros(2, 3, dtype=torch.long)
    return {site: x_ND.shape[-1] for site, x_ND in capture(lm, sites, tokens_CL).items()}


def capture(
    lm: LanguageModel,
    sites: Sequence[str],
    tokens_CL: Tensor,
    take: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Runs token ids [C, L] forward and returns {site: [C * L, D]}, rows context by context, without gradients.

    `take(site, x_ND)` may turn a site's tensor into what is kept (select rows, convert) the moment it exists; it must
    copy what it keeps, because a model may go on to change the tensor in place. Without it, a copy of the whole tensor
    is kept. The pass ends once every site was seen; a module that runs twice in a pass counts the first time. The
    model is left without hooks. Raises DataError for a site that does not exist, does not run, or has another shape.
    """
    modules = dict(lm.model.named_modules())
    num_rows = tokens_CL.shape[0] * tokens_CL.shape[1]
    kept: dict[str, Tensor] = {}

    def seen(site: str, value: Any) -> None:
        if site in kept:
            return
        x = first_tensor(value)
        if x is None or not x.is_floating_point() or x.ndim < 2 or x.numel() != num_rows * x.shape[-1]:
            found = "no tensor" if x is None else f"{x.dtype} {list(x.shape)}"
            raise DataError(
                f"site {site!r}: one vector per token is needed, found {found} for {list(tokens_CL.shape)} tokens"
            )
        x_ND = x.reshape(num_rows, x.shape[-1])
        kept[site] = x_ND.clone() if take is None else take(site, x_ND)
        if len(kept) == len(sites):
            raise _Stop

    handles = []
    try:
        for site in sites:
            path, side = split_site(site)
            if path not in modules:
                raise DataError(f"site {site!r}: no such submodule in {lm.id}; {nearest(path, modules)}")
            handles.append(_hook(modules[path], side, partial(seen, site)))
        with torch.no_grad(), suppress(_Stop):
            # No attention mask: contexts are packed, and right padding cannot reach back past a causal one.
            lm.model(input_ids=tokens_CL.to(lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for site in sites:
        if site not in kept:
            raise DataError(f"site {site!r}: this submodule does not run in a forward pass of {lm.id}")
    return {site: kept[site] for site in sites}


def split_site(site: str) -> tuple[str, str]:
    """The path of a site and its side, `in` or `out`. Raises DataError for another side."""
    path, colon, side = site.partition(":")
    if colon and side not in ("in", "out"):
        raise DataError(f"site {site!r}: after the colon stands 'in' or 'out', not {side!r}")
    return path, side or "out"


def _matches(parts: list[str], pattern: list[str]) -> bool:
    return len(parts) == len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern))


def _hook(module: nn.Module, side: str, seen: Callable[[Any], None]) -> torch.utils.hooks.RemovableHandle:
    if side == "out":
        return module.register_forward_hook(lambda _, __, output: seen(output))
    # Attention blocks are called with keyword arguments only.
    return module.register_forward_pre_hook(
        lambda _, args, kwargs: seen((*args, *kwargs.values())),
        with_kwargs=True,
    )


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of what a module was given or gave."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):  # includes transformers' ModelOutput
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((found for item in value if (found := first_tensor(item)) is not None), None)
    return None
