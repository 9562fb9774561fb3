"""The one dense product of a training step, tile by tile: nobody ever holds all of [batch, latents].

A tile of pre-activations is written into a buffer that the next tile overwrites. On CPU a fresh [batch, latents] tensor
costs more in page faults than the selection that reads it; with tiles memory does not grow with batch * latents.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsepilot.ops.sparse import pair_dots, table_rows

TILE_BYTES = {"cpu": 2**25, "cuda": 2**30}
"""Bytes of one tile: large enough for the matrix product to run at full speed."""


FULL_SPEED_ROWS = 512
"""Rows that a tile should have at least: with fewer the product is slower."""


def tile_bytes(device: torch.device) -> int:
    """Bytes of one tile on a device."""
    return TILE_BYTES.get(device.type, TILE_BYTES["cpu"])


U_HALF = 2.0**-8
"""Largest relative error of rounding to bfloat16 (float16's is smaller)."""


def has_fast_half(device: torch.device) -> bool:
    """Whether bfloat16 products run on matrix units here, several times as fast as fp32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


class Workspace:
    """Buffers that outlive a step."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of this shape whose content is whatever it was."""
        size = 1
        for n in shape:
            size *= n
        held = self._buffers.get(name)
        if held is None or held.numel() < size or held.dtype != dtype or held.device != like.device:
            held = self._buffers[name] = torch.empty(size, dtype=dtype, device=like.device)
        return held[:size].view(shape)


class EncoderProduct:
    """(x - b_in) @ W_enc.T + bias in tiles of rows and latents.

    Args:
        xc_BD: [B, D] inputs, b_in subtracted.
        W_enc_FD: [F, D / readers].
        bias_F: [F].
        tile_latents: at most so many latents in a tile; None: as many as leave it 512 rows.
        half: bfloat16 runs the product in it, with fp32 accumulation. A tile then holds *upper bounds* of the fp32
            values, and `exact` gives the values themselves where they are wanted. None: fp32.
        certain: with `half`, selections must be those of fp32 (ops/select.py computes again what is in doubt).
        readers: sites that the latents read from, see ops/sparse.py.
    """

    def __init__(
        self,
        xc_BD: Tensor,
        W_enc_FD: Tensor,
        bias_F: Tensor,
        workspace: Workspace,
        tile_latents: int | None = None,
        half: torch.dtype | None = None,
        certain: bool = False,
        readers: int = 1,
    ) -> None:
        self.num_rows, self.num_latents = xc_BD.shape[0], W_enc_FD.shape[0]
        self.xc_BD, self.W_enc_FD, self.bias_F = xc_BD.contiguous(), W_enc_FD, bias_F
        self.half, self.certain, self.readers = half, certain, readers
        self.tile_latents = tile_latents
        self._workspace = workspace
        per_element = 2 if half is not None else xc_BD.element_size()
        tile_elements = tile_bytes(xc_BD.device) // per_element
        per_reader = self.num_latents // readers
        width = max(1, min(tile_latents or max(16, tile_elements // FULL_SPEED_ROWS), per_reader))
        self.latent_tiles = [
            slice(start, min(start + width, reader * per_reader + per_reader))
            for reader in range(readers)
            for start in range(reader * per_reader, (reader + 1) * per_reader, width)
        ]
        self.tile_rows = max(1, min(self.num_rows, max(64, tile_elements // width)))
        if half is not None:
            self._left, self._right = self._operands(half)

    def row_tiles(self) -> Iterator[slice]:
        """Slices that cover the rows, in order."""
        for start in range(0, self.num_rows, self.tile_rows):
            yield slice(start, min(start + self.tile_rows, self.num_rows))

    def tile(self, rows: slice, latents: slice) -> Tensor:
        """[rows, latents] pre-activations, valid until the next call."""
        shape = (len(range(rows.start, rows.stop, rows.step or 1)), latents.stop - latents.start)
        dtype = self.half or self.xc_BD.dtype
        out = self._workspace.get(f"tile {dtype}", shape, self.xc_BD, dtype)
        reader = latents.start // (self.num_latents // self.readers)
        if self.half is not None:
            return torch.mm(self._left[reader][rows], self._right[latents].T, out=out)
        width = self.W_enc_FD.shape[1]
        columns = slice(reader * width, (reader + 1) * width)
        return torch.addmm(self.bias_F[latents], self.xc_BD[rows, columns], self.W_enc_FD[latents].T, out=out)

    def exact(self, rows_P: Tensor, ids_P: Tensor, offsets_B: Tensor) -> Tensor:
        """[P] values in fp32, computed pair by pair."""
        table_TD = self.xc_BD.view(-1, self.W_enc_FD.shape[1])
        rows_P = table_rows(rows_P, ids_P, self.num_latents, self.readers)
        return pair_dots(table_TD, rows_P, self.W_enc_FD, ids_P, offsets_B) + self.bias_F[ids_P]

    def in_full(self, rows: Tensor | slice) -> EncoderProduct:
        """The fp32 product of some of the rows."""
        return EncoderProduct(
            self.xc_BD[rows], self.W_enc_FD, self.bias_F, self._workspace, self.tile_latents, readers=self.readers
        )

    def _operands(self, half: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """Both factors in half precision with three more columns: the bias's high and low part, and what the rounding
        of the factors can take away at most.

        With x^ and w^ the rounded factors, |x^ w^ - x w| <= |x^ - x| |w^| + |x| |w^ - w| (Cauchy-Schwarz), where
        |x^ - x| is computed and |w^ - w| <= U_HALF |w|; accumulation in fp32 adds far less than 2^-12 |x| |w|. The
        factor 1 + 4 U_HALF covers |w^| <= (1 + U_HALF) |w| and the rounding of these columns themselves.
        """
        width = self.W_enc_FD.shape[1]
        padded = -(-(width + 3) // 32) * 32  # whole vector registers
        lefts = []
        for reader in range(self.readers):
            x_BD = self.xc_BD[:, reader * width : (reader + 1) * width]
            left = self._workspace.get(f"left{reader}", (self.num_rows, padded), self.xc_BD, half)
            left[:, :width] = x_BD
            lost_B = torch.linalg.vector_norm(left[:, :width] - x_BD, dim=1)
            left[:, width : width + 2] = 1
            norms_B = torch.linalg.vector_norm(x_BD, dim=1)
            left[:, width + 2] = (lost_B + (U_HALF + 2.0**-12) * norms_B) * (1 + 4 * U_HALF)
            left[:, width + 3 :] = 0
            lefts.append(left)
        right = self._workspace.get("right", (self.num_latents, padded), self.W_enc_FD, half)
        right[:, :width] = self.W_enc_FD
        right[:, width] = self.bias_F
        right[:, width + 1] = self.bias_F - right[:, width] + 2.0**-12 * self.bias_F.abs()
        right[:, width + 2] = torch.linalg.vector_norm(self.W_enc_FD, dim=1)
        right[:, width + 3 :] = 0
        return lefts, right
