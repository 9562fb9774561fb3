"""Cutting a language model open at a site: what lies below it is computed once, what lies above as often as wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsepilot.errors import ConfigError
from sparsepilot.lm.capture import capture, first_tensor, split_site
from sparsepilot.lm.load import LanguageModel

_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_OF_HALVES = 2e-2
"""Largest difference of a logit between the short way and the whole model, as a share of the largest logit, before the
short way is given up. On a CPU the two have equal bits; kernels may choose by shape."""


class Kept(NamedTuple):
    """What is kept of some contexts [C, L]."""

    tokens_CL: Tensor
    entry_ND: Tensor | None
    """[C * L, D] what enters the layers above the site; None where the whole model is run each time"""
    x_ND: Tensor | None
    """[C * L, D] the site that is read; None where that is `entry_ND`"""

    @property
    def read_ND(self) -> Tensor:
        """[C * L, D] the clean activations of the site that is read."""
        x_ND = self.entry_ND if self.x_ND is None else self.x_ND
        assert x_ND is not None
        return x_ND

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self if x is not None)


class Seam:
    """A model cut at the site that a dictionary writes, with the site that it reads in the same forward pass.

    A pass starts at the decoder block that holds the written site: the blocks below hand on what they are given, and
    the block's input (or the block's output, where that is the site) is the one that was kept. Embedding, masks and
    rotary tables are the model's own, as the pass is a call of the model. The language-model head is run by itself on
    the positions asked for: the model is called with its trunk handing over the wanted states. Both short ways are
    compared with the whole model once, on a few tokens; where they differ (a later layer that reads a lower one's
    keys) or do not apply (a site outside the blocks), the whole model runs each time with a hook at the site.

    Args:
        lm: the language model; no pass leaves a trace in it.
        read, write: sites as in `lm.capture`.

    Attributes:
        restarts: whether a pass starts at the site's block.
        head_apart: whether the head runs by itself.

    Raises:
        DataError: for a site that does not exist or run.
        ConfigError: where the site that is read is computed after the one that is written.
    """

    def __init__(self, lm: LanguageModel, read: str, write: str) -> None:
        self.lm, self.read, self.write = lm, read, write
        self._path, self._side = split_site(write)
        vocabulary = lm.model.get_input_embeddings().weight.shape[0]
        tokens_CL = (torch.arange(16) % vocabulary).reshape(2, 8)
        order: list[str] = []

        def take(site: str, x_ND: Tensor) -> Tensor:
            order.append(site)
            return x_ND.clone()

        clean = capture(lm, list(dict.fromkeys((read, write))), tokens_CL, take)
        self.width = clean[write].shape[1]
        if order[-1] != write:
            raise ConfigError(
                f"model.sites = {{read: {read}, write: {write}}}: {lm.id} computes {read} after {write}, so the "
                "reconstruction cannot take its place; use cross_entropy=none"
            )
        self._base = lm.model.base_model
        self._blocks, self._block = _blocks_down_to(lm.model, self._path)
        self._templates: list[Any] = []
        self._base_template: Any = None
        self.restarts = self.head_apart = False
        self._take_short_ways(tokens_CL)

    @property
    def _is_block_output(self) -> bool:
        """The site is what its block gives: the block itself need not run."""
        return self._side == "out" and self._path == self._block

    @property
    def _entry(self) -> str:
        """The site that a pass starts from."""
        return self._path if self._is_block_output else f"{self._block}:in"

    # ------------------------------------------------------------------------------------------------ a pass

    def keep(self, tokens_CL: Tensor) -> Kept:
        """Runs the clean model up to the site, and keeps what later passes start from."""
        entry = self._entry if self.restarts else None
        wanted = list(dict.fromkeys(site for site in (entry, self.read) if site is not None))
        found = capture(self.lm, wanted, tokens_CL)
        return Kept(
            tokens_CL,
            None if entry is None else found[entry],
            None if entry == self.read else found[self.read],
        )

    def states(self, kept: Kept, rows_R: Tensor | None = None, y_RD: Tensor | None = None) -> Tensor:
        """[C * L, D] the final states of a pass, for `logits`; with `y_RD` in place of the written site at `rows_R`.

        Args:
            kept: contexts.
            rows_R: [R] flat positions, ascending.
            y_RD: [R, width of the site] raw; None for the clean model.
        """
        tokens_CL = kept.tokens_CL
        put = _Put(rows_R, y_RD)
        cut_at_output = self.restarts and self._is_block_output
        with torch.no_grad(), ExitStack() as stack:
            if kept.entry_ND is not None:
                # a copy: a model may change a tensor in place
                entry_CLD = kept.entry_ND.clone().reshape(*tokens_CL.shape, -1)
                *below, block = self._blocks
                for module, template in zip(below, self._templates, strict=False):
                    stack.enter_context(_replaced_forward(module, _handing_on(template)))
                if cut_at_output:
                    given = with_first_tensor(self._templates[-1], put(entry_CLD))
                    stack.enter_context(_replaced_forward(block, lambda *_, **__: given))
                else:
                    stack.enter_context(changed(block, "in", lambda _: entry_CLD))
            if not cut_at_output and y_RD is not None:
                stack.enter_context(changed(self.lm.model.get_submodule(self._path), self._side, put.once))
            run = self._base if self.head_apart else self.lm.model
            output = run(input_ids=tokens_CL.to(self.lm.device), use_cache=False)
        x = first_tensor(output) if self.head_apart else output.logits
        assert x is not None
        return x.flatten(0, 1)

    def logits(self, states_ND: Tensor) -> Tensor:
        """[N, vocabulary] fp32 logits of some final states."""
        if not self.head_apart:
            return states_ND.float()
        output = with_first_tensor(self._base_template, states_ND[None])
        tokens_CL = torch.zeros(1, len(states_ND), dtype=torch.long, device=self.lm.device)
        with torch.no_grad(), _replaced_forward(self._base, lambda *_, **__: output):
            logits: Tensor = self.lm.model(input_ids=tokens_CL, use_cache=False).logits
        return logits[0].float()

    # ------------------------------------------------------------------------------------------------ is it the same

    def _take_short_ways(self, tokens_CL: Tensor) -> None:
        """Looks at a whole pass and takes the short ways that give the same."""
        seen: dict[int, Any] = {}
        with torch.no_grad(), ExitStack() as stack:
            for number, module in enumerate([self._base, *self._blocks]):
                handle = module.register_forward_hook(lambda _, __, output, n=number: seen.__setitem__(n, output))
                stack.callback(handle.remove)
            logits_CLV = self.lm.model(input_ids=tokens_CL.to(self.lm.device), use_cache=False).logits
        self._base_template = seen.get(0)
        self._templates = [seen.get(number + 1) for number in range(len(self._blocks))]
        logits_NV = logits_CLV.flatten(0, 1).float()
        below_head = {id(module) for module in self._base.modules()}
        if self._base is not self.lm.model and id(self.lm.model.get_submodule(self._path)) in below_head:
            self.head_apart = True
            self.head_apart = self._gives(logits_NV, tokens_CL)
        # a block that gives more than its states gives something that a stand-in could not
        if self._blocks and all(_num_tensors(template) == 1 for template in self._templates):
            self.restarts = True
            self.restarts = self._gives(logits_NV, tokens_CL)

    def _gives(self, logits_NV: Tensor, tokens_CL: Tensor) -> bool:
        kept = self.keep(tokens_CL)
        self.keep(tokens_CL.flip(1))  # what a module remembers of its last pass must not help
        try:
            found_NV = self.logits(self.states(kept))
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError):
            return False  # the model wants more of its parts than a stand-in gives
        if found_NV.shape != logits_NV.shape:
            return False
        tolerance = _TOLERANCE.get(self.lm.dtype, _TOLERANCE_OF_HALVES)
        return bool((found_NV - logits_NV).abs().max() <= tolerance * logits_NV.abs().max())


class _Put:
    """Puts a reconstruction in place of some rows of a tensor."""

    def __init__(self, rows_R: Tensor | None, y_RD: Tensor | None) -> None:
        self._rows_R, self._y_RD = rows_R, y_RD
        self._done = False

    def __call__(self, x: Tensor) -> Tensor:
        if self._y_RD is None or self._rows_R is None:
            return x
        x_ND = x.reshape(-1, x.shape[-1])
        y_RD = self._y_RD.to(device=x.device, dtype=x.dtype)
        return x_ND.index_copy(0, self._rows_R.to(x.device), y_RD).reshape(x.shape)

    def once(self, x: Tensor) -> Tensor | None:
        """A module that runs twice in a pass counts the first time, as in `capture`."""
        if self._done:
            return None
        self._done = True
        return self(x)


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """What a module gave, with another tensor in place of the first (the one that `lm.capture` takes).

    >>> with_first_tensor((None, torch.zeros(1)), torch.ones(1))
    (None, tensor([1.]))
    """
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, dict):  # includes transformers' ModelOutput
        key = next(key for key, item in value.items() if first_tensor(item) is not None)
        replaced = with_first_tensor(value[key], tensor)
        if dataclasses.is_dataclass(value):
            return dataclasses.replace(value, **{key: replaced})
        return {**value, key: replaced}
    at = next(i for i, item in enumerate(value) if first_tensor(item) is not None)
    return type(value)([*value[:at], with_first_tensor(value[at], tensor), *value[at + 1 :]])


def _num_tensors(value: Any) -> int:
    if isinstance(value, Tensor):
        return 1
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_num_tensors, value)) if isinstance(value, (tuple, list)) else 0


def _handing_on(template: Any) -> Callable[..., Any]:
    """A block that gives what it is given, in the form in which it gave it before."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = first_tensor((*args, *kwargs.values()))
        assert x is not None
        return with_first_tensor(template, x)

    return forward


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@contextmanager
def changed(module: nn.Module, side: str, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Changes the first tensor that a module gives (`out`) or is given (`in`); a change to None leaves it."""

    def change_first(value: Any) -> Any:
        x = first_tensor(value)
        new = None if x is None else change(x)
        return None if new is None else with_first_tensor(value, new)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if first_tensor(args) is not None:
            changed = change_first(args)
            return None if changed is None else (changed, kwargs)
        changed = change_first(kwargs)
        return None if changed is None else (args, changed)

    if side == "out":
        handle = module.register_forward_hook(lambda _, __, output: change_first(output))
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _blocks_down_to(model: nn.Module, path: str) -> tuple[list[nn.Module], str]:
    """Of the outermost list of blocks that a path goes through, those up to its own, and that one's path; or none."""
    modules = dict(model.named_modules())
    parts = path.split(".")
    for end in range(1, len(parts)):
        blocks = modules[".".join(parts[:end])]
        if isinstance(blocks, nn.ModuleList):
            return list(blocks)[: int(parts[end]) + 1], ".".join(parts[: end + 1])
    return [], ""
