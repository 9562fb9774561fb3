"""What every architecture is: parameters, one training step on a micro-batch, and a knob for the controller."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsepilot import losses
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.prefixes import Prefixes
from sparsepilot.autoencoders.rescaling import Rescaling
from sparsepilot.autoencoders.revival import NoRevival, Revival
from sparsepilot.autoencoders.step import Dense, Knob, Moment, Response, Selection, Step, Sums
from sparsepilot.autoencoders.weights import Weights
from sparsepilot.ops.count import count_active
from sparsepilot.ops.product import EncoderProduct, Workspace, has_fast_half, tile_bytes
from sparsepilot.ops.sparse import at_pairs, decode_at, decode_plain, encode_at, encode_plain
from sparsepilot.parallel.latents import Shard
from sparsepilot.parallel.shards import own

DENSE_ABOVE = 1 / 24
"""Share of active (row, latent) pairs above which a step is cheaper dense: measured on two cores, see docs/log.md."""


class Common(TypedDict, total=False):
    """Settings that every architecture takes; their defaults are those of `Autoencoder`."""

    revival: Revival | None
    prefixes: Prefixes | None
    tile_latents: PositiveInt | None
    dense_above: NonNegativeFloat
    half_product: bool | None
    shard: Shard | None


class Autoencoder(Weights, ABC):
    """y_hat = b_dec + sum_i f_i(x) W_dec[i], with few f_i(x) > 0, where f comes from pre = W_enc (x - b_in) + b_enc.

    Inputs and targets are scaled so that E||x||^2 is the width of their site (the caller's job).

    A subclass gives `knob`; `select`, which pairs a step touches; `respond`, what becomes of their pre-activations,
    written once for the sparse and the dense layout; and `activate`, the plain form of its activation function.

    Args:
        blocks: the sites that are read and written.
        d_sae: number of latents.
        revival: what is done about dead latents; None: nothing.
        prefixes: Matryoshka's nested reconstructions; None: the whole dictionary only.
        tile_latents: the encoder product runs over so many latents at a time; None: as many as suit its tiles.
        dense_above: share of active pairs above which the step runs dense, tile by tile.
        half_product: the product that finds the active latents runs in bfloat16, and what its rounding leaves in doubt
            is computed again: the same choice and the same fp32 values, several times as fast on matrix units. None:
            where the hardware has them.
        shard: which of the latents this process holds; all that is [d_sae, ...] here is [its latents, ...] then. None:
            all of them.

    Raises:
        ConfigError: where the latents cannot be dealt out as wanted.
    """

    architecture: str
    """Name in saved files: `topk`, `jumprelu`, ..."""
    extra_terms: tuple[str, ...] = ()
    """Names of `Response.extras`."""
    measures: tuple[str, ...] = ()
    """Names of `Response.measures`, of what `select` measures, and of `Rescaling.measures`."""
    integrates: bool = False
    """Whether L0 goes on moving, at a pace, while the penalty is off its balance: thresholds under Adam do, and codes
    that a saturating penalty reaches one after the other."""
    slew_nats_per_lr: float | None = None
    """How far ln L0 can fall in one step, per unit of learning rate, however strong the penalty; None: not known."""
    rescaling: Rescaling | None
    """of all codes at inference; its `measures` are among the architecture's"""
    resampled_encoder_scale: float = 0.2
    """Norm of a resampled encoder row over the mean of the living ones (Bricken et al. 2023)."""

    def __init__(
        self,
        blocks: Blocks,
        d_sae: int,
        revival: Revival | None = None,
        prefixes: Prefixes | None = None,
        tile_latents: int | None = None,
        dense_above: float = DENSE_ABOVE,
        half_product: bool | None = None,
        shard: Shard | None = None,
    ) -> None:
        super().__init__(blocks, d_sae, shard or Shard(d_sae))
        self.revival = revival or NoRevival()
        self.prefixes = prefixes
        self.rescaling = None
        self.tile_latents = tile_latents
        self.dense_above = dense_above
        self.half_product = half_product
        self._workspace = Workspace()

    @property
    @abstractmethod
    def knob(self) -> Knob:
        """The knob, its range and where it starts."""

    @abstractmethod
    def select(self, product: Callable[..., EncoderProduct], now: Moment) -> Selection | Dense:
        """Which pairs the step touches, or that they are so many that the dense path is cheaper.

        `product(shift_F=None)` makes the tiled product of this micro-batch, `shift_F` added to its bias.
        """

    @abstractmethod
    def keep(self, pre_BF: Tensor, dense: Dense, now: Moment) -> tuple[Tensor | None, Tensor | None]:
        """The same choice on a dense tile, without a graph: bool masks [b, F] of the pairs that count and of the inner
        ones among them; None: all."""

    @abstractmethod
    def respond(self, pre: Tensor, at: Callable[[Tensor], Tensor], inner: Tensor | None, now: Moment) -> Response:
        """Codes and penalty of pre-activations, elementwise.

        Args:
            pre: [P] of the selected pairs, or [b, F].
            at: brings a per-latent tensor [F] to the shape of `pre`.
            inner: bool, as `Selection.inner_P`.
            now: where the run stands.
        """

    @abstractmethod
    def activate(self, pre_BF: Tensor) -> Tensor:
        """Dense codes [B, F] from dense pre-activations, as at inference."""

    # ------------------------------------------------------------------------------------------------ one step

    @property
    def term_names(self) -> tuple[str, ...]:
        """Every loss term and measure that `forward` may report, in a fixed order."""
        names = ["recon"]
        if self.prefixes is not None:
            names.append("prefixes")
        if self.knob.kind == "penalty":
            names.append("sparsity")
        names += self.extra_terms
        if self.revival.term_name is not None:
            names.append(self.revival.term_name)
        return (*names, *self.measures)

    def forward(self, x_BD: Tensor, y_BD: Tensor, now: Moment) -> Step:
        """One micro-batch.

        Args:
            x_BD: [B, d_in] scaled inputs.
            y_BD: [B, d_out] scaled targets; an autoencoder's are its inputs.
            now: where the run stands.
        """
        num_rows = x_BD.shape[0]
        selection = self._select(x_BD, now)
        if isinstance(selection, Dense):
            sums = self._dense(x_BD, y_BD, selection, now)
        else:
            sums = self._sparse(x_BD, y_BD, selection, now)
        terms = {"recon": sums.recon / num_rows}
        loss = terms["recon"]
        if self.prefixes is not None:
            terms["prefixes"] = sums.prefixes / num_rows
            loss = loss + terms["prefixes"]
        if self.knob.kind == "penalty":
            terms["sparsity"] = sums.penalty / num_rows
            loss = loss + now.strength * self.pressed(terms["sparsity"])
        for name, weight, total in zip(self.extra_terms, self._extra_weights(), sums.extras, strict=True):
            terms[name] = total / num_rows
            loss = loss + weight * terms[name]
        if self.revival.term_name is not None and not now.inference:
            num_dead = self.shard.total(now.dead_ids_A.numel(), x_BD.device)
            if num_dead > 0:
                value = self.revival.term(self, x_BD, (y_BD - sums.y_hat_BD).detach(), now, num_dead)
                terms[self.revival.term_name] = value
                loss = loss + self.revival.weight(self) * value
        for name, total in zip(self.measures, sums.measures, strict=True):
            terms[name] = selection.measures[name] if name in selection.measures else total / num_rows
        terms = {name: value.detach() for name, value in terms.items()}
        return Step(loss, terms, sums.y_hat_BD.detach(), sums.firings_F)

    def pressed(self, sparsity: Tensor) -> Tensor:
        """What the coefficient of the penalty multiplies, from the penalty's mean over rows."""
        return sparsity

    @torch.no_grad()
    def evaluate(self, x_BD: Tensor, y_BD: Tensor, strength: float) -> Step:
        """A step as at inference, for measuring: nothing is dead, nothing has a graph."""
        nobody_A = torch.empty(0, dtype=torch.int64, device=x_BD.device)
        now = Moment(strength, 0, 1, 1, nobody_A, x_BD.new_ones(()), inference=True)
        step: Step = self(x_BD, y_BD, now)
        return step

    @torch.no_grad()
    def _select(self, x_BD: Tensor, now: Moment) -> Selection | Dense:
        xc_BD = x_BD - self.b_in
        device = x_BD.device.type
        mixed = torch.is_autocast_enabled(device)
        use_half = x_BD.dtype == torch.float32 and (mixed or self._halves())

        def product(shift_F: Tensor | None = None) -> EncoderProduct:
            bias_F = self.b_enc if shift_F is None else self.b_enc + shift_F
            return EncoderProduct(
                xc_BD,
                self.W_enc,
                bias_F,
                self._workspace,
                self.tile_latents,
                half=torch.bfloat16 if use_half else None,
                certain=not mixed,
                readers=self.blocks.readers,
            )

        return self.select(product, now)

    def _sparse(self, x_BD: Tensor, y_BD: Tensor, selection: Selection, now: Moment) -> Sums:
        active = selection.active
        pre_P = encode_at(x_BD, self.W_enc, self.b_enc, self.b_read, selection.pre_P, active, self.blocks.readers)

        def at(values_F: Tensor) -> Tensor:
            return at_pairs(values_F, active)

        response = self.respond(pre_P, at, selection.inner_P, now)
        fired_P = (response.codes > 0).to(torch.int64)
        firings_F = torch.zeros(self.shard.num_latents, dtype=torch.int64, device=x_BD.device)
        firings_F.scatter_add_(0, active.ids_P, fired_P)

        def decode(codes_P: Tensor, W_dec_FD: Tensor) -> Tensor:
            return decode_at(codes_P, W_dec_FD, active)

        def decode_prefixes(prefixes: Prefixes, codes_P: Tensor, ends: Sequence[int]) -> Tensor:
            return prefixes.decode_at(codes_P, self.W_dec, active, ends)

        return self._sums(x_BD, y_BD, response, firings_F, decode, decode_prefixes, now)

    def _dense(self, x_BD: Tensor, y_BD: Tensor, dense: Dense, now: Moment) -> Sums:
        """The same sums over tiles of rows; each tile is computed again in the backward pass instead of being kept."""
        tile_rows = max(64, tile_bytes(x_BD.device) // (x_BD.element_size() * self.shard.num_latents))
        tiles: list[Sums] = []
        for x, y in zip(torch.split(x_BD, tile_rows), torch.split(y_BD, tile_rows), strict=True):
            if torch.is_grad_enabled():
                tiles.append(
                    checkpoint(self.dense_tile, x, y, dense, now, use_reentrant=False, preserve_rng_state=False)
                )
            else:
                tiles.append(self.dense_tile(x, y, dense, now))
        if len(tiles) == 1:
            return tiles[0]
        first = tiles[0]
        return Sums(
            torch.cat([t.y_hat_BD for t in tiles]),
            _total(t.recon for t in tiles),
            _total(t.prefixes for t in tiles),
            _total(t.penalty for t in tiles),
            _total(t.firings_F for t in tiles),
            tuple(_total(t.extras[i] for t in tiles) for i in range(len(first.extras))),
            tuple(_total(t.measures[i] for t in tiles) for i in range(len(first.measures))),
        )

    def dense_tile(self, x_BD: Tensor, y_BD: Tensor, dense: Dense, now: Moment) -> Sums:
        """The plain twin of the sparse step: every pre-activation, masked."""
        pre_BF = encode_plain(x_BD, self.W_enc, self.b_enc, self.b_read, self.blocks.readers)
        with torch.no_grad():
            keep_BF, inner_BF = self.keep(pre_BF.detach(), dense, now)
        response = self.respond(pre_BF, _as_is, inner_BF, now)
        if keep_BF is not None:
            extras = tuple(e._replace(codes=e.codes * keep_BF) for e in response.extras)
            response = response._replace(codes=response.codes * keep_BF, extras=extras)

        def decode_prefixes(prefixes: Prefixes, codes_BF: Tensor, ends: Sequence[int]) -> Tensor:
            return prefixes.decode_plain(codes_BF, self.W_dec, ends)

        firings_F = count_active(response.codes)
        return self._sums(x_BD, y_BD, response, firings_F, decode_plain, decode_prefixes, now)

    def _sums(
        self,
        x_BD: Tensor,
        y_BD: Tensor,
        response: Response,
        firings_F: Tensor,
        decode: Callable[[Tensor, Tensor], Tensor],
        decode_prefixes: Callable[[Prefixes, Tensor, Sequence[int]], Tensor],
        now: Moment,
    ) -> Sums:
        """What both layouts do with codes, given how theirs are decoded."""
        rest_BD = self.rest(x_BD)
        zero = y_BD.new_zeros(())
        prefixes = zero
        if self.prefixes is None or now.inference:
            # nothing here has a name of its own: a row's tensor would live on until the end of the step
            y_hat_BD = self._as_used(self.shard.sum(decode(response.codes, self.W_dec)), now.inference) + rest_BD
        else:
            ends = self.prefixes.ends(self.d_sae, now.seed, now.samples)
            y_hat_BGD = self.shard.sum(decode_prefixes(self.prefixes, response.codes, self.shard.ends(ends)))
            y_hat_BGD = y_hat_BGD + rest_BD[:, None]
            prefixes = (y_BD[:, None] - y_hat_BGD[:, :-1]).square().sum()
            y_hat_BD = y_hat_BGD[:, -1]
        # of all latents; what `select` measures is not among them
        measures = {name: self.shard.sum(value.detach()) for name, value in response.measures.items()}
        if self.rescaling is not None and not now.inference:
            measures |= self.rescaling.measure(y_hat_BD.detach(), y_BD, rest_BD.detach())
        extras = []
        for extra in response.extras:
            W_dec_FD, added_BD = (self.W_dec.detach(), rest_BD.detach()) if extra.frozen else (self.W_dec, rest_BD)
            y_hat_extra_BD = self.shard.sum(decode(extra.codes, W_dec_FD)) + added_BD
            extras.append((y_BD - y_hat_extra_BD).square().sum())
        return Sums(
            y_hat_BD,
            losses.squared_error(y_BD, y_hat_BD),
            prefixes,
            zero if response.penalty is None else self.shard.sum(response.penalty),
            firings_F,
            tuple(extras),
            tuple(measures.get(name, zero) for name in self.measures),
        )

    def _extra_weights(self) -> tuple[float, ...]:
        """Weights of `extra_terms`."""
        return (1.0,) * len(self.extra_terms)

    def _halves(self) -> bool:
        """Whether active latents are found by half-precision products."""
        return self.half_product if self.half_product is not None else has_fast_half(self.W_enc.device)

    def paths(self) -> str:
        """What the bits of a step, not its numbers, depend on: how it is computed here."""
        compiled = "dense_tile" in self.__dict__
        half = self._halves()
        return f"half {half}, tiles of {self.tile_latents}, dense above {self.dense_above:g}, compiled {compiled}"

    def compile(self, *args: Any, **options: Any) -> None:
        """`torch.compile` for the dense path, where it fuses the elementwise work between two products. The sparse path
        has nothing to fuse and is left alone. Names in the state dict stay what they are."""
        self.dense_tile = torch.compile(self.dense_tile, *args, **options)  # type: ignore[method-assign]

    # ------------------------------------------------------------------------------------------------ plain forms

    def encode(self, x_BD: Tensor) -> Tensor:
        """Dense codes [B, F] of scaled inputs: the plain form of what `forward` does sparsely."""
        return self.activate(encode_plain(x_BD, self.W_enc, self.b_enc, self.b_in, self.blocks.readers))

    def decode(self, codes_BF: Tensor) -> Tensor:
        """[B, d_out] scaled reconstruction of dense codes (without the skip's part)."""
        return self._as_used(codes_BF @ self.W_dec, inference=True) + self.b_dec

    def _as_used(self, decoded_BD: Tensor, inference: bool) -> Tensor:
        """Decoded latents with the factor that they have at inference alone."""
        return decoded_BD * self.rescaling.factor if inference and self.rescaling is not None else decoded_BD

    @torch.no_grad()
    def adopt(self, tensors: dict[str, Tensor]) -> None:
        super().adopt(tensors)
        if self.rescaling is not None:  # what was measured is of other weights
            self.rescaling.products_2.zero_()

    def inference_tensors(self) -> dict[str, Tensor]:
        tensors = super().inference_tensors()
        return tensors if self.rescaling is None else {**tensors, "codes_factor": self.rescaling.factor}

    def thresholds(self) -> Tensor:
        """[F] pre-activations above which latents fire."""
        return torch.zeros_like(self.b_enc)

    def threshold_coherence(self) -> Tensor:
        """Scalar, -1 to 1: sum of the thresholds' last motion over the sum of its sizes; 0 where they do not move."""
        return torch.zeros((), device=self.b_enc.device)

    @torch.no_grad()
    def shift_thresholds_(self, by: float) -> None:
        """Makes every latent fire from `by` higher pre-activations on; for disturbing a run."""
        own(self.b_enc).sub_(by)

    def encode_subset(self, x_BD: Tensor, ids_A: Tensor) -> Tensor:
        """[B, A] pre-activations of some latents (ids ascending), differentiable."""
        W_enc_AD, b_enc_A = self.W_enc.index_select(0, ids_A), self.b_enc.index_select(0, ids_A)
        readers = self.blocks.readers
        if readers == 1:
            return encode_plain(x_BD, W_enc_AD, b_enc_A, self.b_read)
        parts, width, per_reader = [], self.W_enc.shape[1], self.d_sae // readers
        for reader in range(readers):
            own_A = torch.div(ids_A, per_reader, rounding_mode="floor") == reader
            columns = slice(reader * width, (reader + 1) * width)
            parts.append(encode_plain(x_BD[:, columns], W_enc_AD[own_A], b_enc_A[own_A], self.b_in[columns]))
        return torch.cat(parts, dim=1)

    # ------------------------------------------------------------------------------------------------ around a step

    @torch.no_grad()
    def close_step(self, terms: dict[str, Tensor], now: Moment) -> None:
        """Called once per optimizer step with the terms' means over the global batch (on the device), before the
        controller acts; for architectures with running averages."""

    @torch.no_grad()
    def forget_motion(self) -> None:
        """Called once parameters were given other values between two steps, which is no motion of training."""

    def inference_config(self, strength: float) -> dict[str, Any]:
        """What a loader needs beside the tensors, with the knob at `strength`; JSON values only."""
        return {
            "architecture": self.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "d_out": self.d_out,
            "blocks": self.blocks.kind,
            "layers": self.blocks.readers,
            "skip": self.blocks.skip,
            "widths": list(self.blocks.read_widths),
            "widths_out": list(self.blocks.write_widths),
            **({} if self.prefixes is None else self.prefixes.inference_config(self.d_sae)),
        }


def _as_is(values_F: Tensor) -> Tensor:
    return values_F


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(dim=0)
