"""A dictionary inside a transformers model, as a context manager: spliced in, or chosen latents edited."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm.capture import capture, split_site
from sparsepilot.lm.load import LanguageModel
from sparsepilot.lm.seam import changed

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


class Codec(Protocol):
    """What `attach` needs of `interop.dictionary.Dictionary`."""

    cfg: dict[str, Any]
    W_dec: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """[..., d_in] raw activations -> [..., d_sae] codes."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]: the reconstruction."""


def attach(
    model: nn.Module,
    sae: Codec,
    site: str | tuple[str, str] | None = None,
    *,
    ablate: Iterable[int] = (),
    scale: Mapping[int, float] | None = None,
    clamp: Mapping[int, float] | None = None,
    keep_error: bool = False,
    skip_tokens: Collection[int] | None = None,
) -> AbstractContextManager[None]:
    """Puts a dictionary's reconstruction in a site's place for as long as the context lasts.

    With codes f and reconstruction x_hat = f @ W_dec + b_dec, each position's x becomes x_hat + (f' - f) @ W_dec, where
    f' is f with the edits; with `keep_error`, x + (f' - f) @ W_dec: what the dictionary does not explain stays, so that
    only the edit acts, and a position that no edit changes keeps its bits. A transcoder reads x at one site and acts at
    another.

        with sparsepilot.attach(model, sae, "model.layers.9", clamp={4242: 60.0}, keep_error=True):
            model.generate(**inputs)

    Works in every forward pass, so under `generate` with or without a cache of keys; with gradients. The model is as
    it was on exit, also after an exception. Several attachments may be open; at one site a later one sees what an
    earlier one made of it.

    Args:
        model: a transformers model; its dotted module paths are the site names.
        sae: from `sparsepilot.load`; it may be on another device. It reads fp32.
        site: as `lm.capture` names them (`model.layers.9`, `model.layers.9.mlp:in`), or (read, write) of a transcoder;
            None: those that the dictionary's file names.
        ablate: latents that are set to 0.
        scale: latent -> factor of its activation.
        clamp: latent -> activation that it has everywhere, active there or not.
        keep_error: add x - x_hat back.
        skip_tokens: token ids at whose positions nothing is changed; None: BOS, EOS and padding of the model's
            configuration, which a cache leaves out and a dictionary has never seen. Where the model is called with
            embeddings instead of ids, every position is changed.

    Raises:
        DataError: for a site that the model lacks, or where it has no vector per token.
        ConfigError: for a dictionary of another width or of several sites, a latent that it does not have, or one
            that is edited twice.
    """
    read, write = _sites(sae, site)
    ids_E, factors_E, values_E = _edits(
        sae.cfg["d_sae"], ablate, {} if scale is None else scale, {} if clamp is None else clamp
    )
    _check_widths(model, sae, read, write)
    if skip_tokens is None:
        config = getattr(model, "config", None)
        found = [getattr(config, name, None) for name in _SPECIAL]
        skip_tokens = [
            id for value in found if value is not None for id in (value if isinstance(value, list) else [value])
        ]
    attachment = _Attachment(sae, ids_E, factors_E, values_E, keep_error, torch.tensor(sorted(set(skip_tokens))))
    return _attached(model, attachment, read, write)


@contextmanager
def _attached(model: nn.Module, attachment: _Attachment, read: str, write: str) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(attachment.begin).remove)
        embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        stack.callback(embedding.register_forward_pre_hook(attachment.see_tokens).remove)
        if read != write:
            path, side = split_site(read)
            stack.enter_context(changed(model.get_submodule(path), side, attachment.see))
        path, side = split_site(write)
        stack.enter_context(changed(model.get_submodule(path), side, attachment.act if read != write else attachment))
        yield


class _Attachment:
    """What happens at the site; it holds nothing from one forward pass to the next."""

    def __init__(
        self, sae: Codec, ids_E: Tensor, factors_E: Tensor, values_E: Tensor, keep_error: bool, skipped_S: Tensor
    ) -> None:
        self._sae, self._keep_error, self._skipped_S = sae, keep_error, skipped_S
        device = sae.W_dec.device
        self._ids_E, self._factors_E, self._values_E = ids_E.to(device), factors_E.to(device), values_E.to(device)
        self._skip_CL: Tensor | None = None
        self._x: Tensor | None = None

    def begin(self, *_: Any) -> None:
        """A pass begins: what an earlier one left, perhaps broken off, is forgotten."""
        self._x = self._skip_CL = None

    def see_tokens(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Notes where a pass has tokens that are left alone; the embedding is not run where embeddings are given."""
        if len(self._skipped_S):
            self._skip_CL = torch.isin(args[0], self._skipped_S.to(args[0].device))

    def see(self, x: Tensor) -> None:
        """Takes what is read, where that is not what is changed."""
        self._x = x

    def __call__(self, x: Tensor) -> Tensor | None:
        self._x = x
        return self.act(x)

    def act(self, y: Tensor) -> Tensor | None:
        """What takes the place of the written site's tensor; None leaves it."""
        x, self._x = self._x, None
        if x is None:
            raise DataError("attach: the site that is written runs before the one that is read")
        if self._keep_error and not len(self._ids_E):
            return None
        W_dec_FD = self._sae.W_dec
        x = x.to(W_dec_FD.device, torch.float32)
        # in at least fp32: where nothing changes, the sum has the bits of y
        kept = y.to(W_dec_FD.device, torch.promote_types(y.dtype, torch.float32))
        new = kept if self._keep_error else self._sae(x)
        if len(self._ids_E):
            codes_E = self._sae.encode(x)[..., self._ids_E]
            edited_E = torch.where(self._values_E.isnan(), codes_E * self._factors_E, self._values_E)
            new = new + (edited_E - codes_E) @ W_dec_FD[self._ids_E]
        new = new.to(y)
        if self._skip_CL is None:
            return new
        return torch.where(self._skip_CL.to(y.device).reshape(*y.shape[:-1], 1), y, new)


def _sites(sae: Codec, site: str | tuple[str, str] | None) -> tuple[str, str]:
    transcodes = sae.cfg.get("blocks") not in (None, "autoencoder", "crosscoder")
    if site is None:
        reads, writes = sae.cfg.get("sites") or [], sae.cfg.get("sites_out") or []
        if len(reads) != 1 or len(writes) != 1:
            raise ConfigError(
                f"attach: site = None: the dictionary reads {reads} and writes {writes}; "
                "one that reads one site and writes one is needed, or a site that is named"
            )
        return str(reads[0]), str(writes[0])
    if isinstance(site, str):
        if transcodes:
            raise ConfigError(f"attach: site = {site!r}: a transcoder wants two, (read, write), or None for its own")
        return site, site
    read, write = site
    return read, write


def _edits(
    d_sae: int, ablate: Iterable[int], scale: Mapping[int, float], clamp: Mapping[int, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, factors and values; a value is NaN where a factor counts."""
    ids: list[int] = []
    factors: list[float] = []
    values: list[float] = []
    try:
        ablated = list(ablate)
    except TypeError as error:
        raise ConfigError(f"attach: ablate = {ablate!r}: a list of latents is needed") from error
    for field, edits in (("scale", scale), ("clamp", clamp)):
        if not isinstance(edits, Mapping):
            raise ConfigError(f"attach: {field} = {edits!r}: a number for each latent is needed, {{latent: number}}")
    given: dict[str, list[tuple[Any, Any]]] = {
        "ablate": [(latent, 0.0) for latent in ablated], "scale": [*scale.items()], "clamp": [*clamp.items()],
    }  # fmt: skip
    for field, pairs in given.items():
        for named, number in pairs:
            latent = _integer(named)
            if latent is None or not 0 <= latent < d_sae:
                raise ConfigError(f"attach: {field}: there is no latent {named!r}; the dictionary has 0 to {d_sae - 1}")
            if field == "ablate" and latent in ids:
                continue
            if latent in ids:
                raise ConfigError(
                    f"attach: {field}: latent {latent} is edited twice; name it in one of {', '.join(given)}"
                )
            if not _is_finite(number):
                raise ConfigError(f"attach: {field}: latent {latent} has {number!r}; a finite number is needed")
            ids.append(latent)
            factors.append(0.0 if field == "clamp" else float(number))
            values.append(float(number) if field == "clamp" else math.nan)
    return torch.tensor(ids, dtype=torch.long), torch.tensor(factors), torch.tensor(values)


def _integer(value: Any) -> int | None:
    """Of an integer of Python, numpy or torch; None of anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _is_finite(number: Any) -> bool:
    try:
        return not isinstance(number, str) and math.isfinite(number)
    except (TypeError, ValueError, RuntimeError):  # of numpy's and torch's, too, where it is not one number
        return False


def _check_widths(model: nn.Module, sae: Codec, read: str, write: str) -> None:
    """One forward pass of six tokens, which ends at the sites."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    seen: list[str] = []

    def take(site: str, x_ND: Tensor) -> Tensor:
        seen.append(site)
        return x_ND[:1].clone()

    lm = LanguageModel(model, None, type(model).__name__, "", embedding.dtype)
    found = capture(lm, list(dict.fromkeys((read, write))), torch.zeros(2, 3, dtype=torch.long), take)
    for what, site, width in (("reads", read, sae.cfg["d_in"]), ("writes", write, sae.cfg["d_out"])):
        if found[site].shape[-1] != width:
            raise ConfigError(
                f"attach: site = {site!r}: is {found[site].shape[-1]} wide in {lm.id}, the dictionary {what} {width}"
            )
    if seen[-1] != write:
        raise ConfigError(f"attach: {lm.id} computes {read} after {write}, so the dictionary cannot act there")
