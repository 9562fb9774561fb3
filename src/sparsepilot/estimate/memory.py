"""Bytes in memory during a training step, part by part, on one rank; fp32 where nothing else is said.

What a step makes and drops again was counted tensor by tensor; tests/unit/estimate/test_memory.py counts it again.
B rows of a micro-batch, P active pairs, F latents, D width.
"""

from __future__ import annotations

from pathlib import Path

from sparsepilot.interop.fold import BLOCK_NUMBERS
from sparsepilot.ops.product import FULL_SPEED_ROWS, TILE_BYTES
from sparsepilot.ops.select import SAMPLE_ROWS, SPARE, SPARE_CERTAIN
from sparsepilot.ops.topk import GROUP_SIZE

MIB = 2**20
FP32, BF16 = 4, 2

HELD_SHARE = 1.0
"""On CPU: of what a step makes and drops again, so much more stays with malloc in pieces too small for the next step's
(process_memory.py has it keep what is freed). Taken from twelve measured runs (docs/log.md), on two machines."""
FIRST_STEPS_BYTES = 55 * MIB
"""On CPU: what libraries load and set up in the first steps, after everything was imported; measured."""
CUDA_BASE_BYTES = 600 * MIB
"""A CUDA context with its libraries and cuBLAS's workspace. An assumption: it differs between GPUs and drivers."""
HOST_BASE_BYTES = 1024 * MIB
"""A process beside a GPU: Python, torch with CUDA, Lightning. An assumption."""
CUDA_HELD_SHARE = 0.1
"""Of what a step makes and drops again, left over in blocks of torch's caching allocator. An assumption."""

DENSE_TILES = {"relu": 4.0, "jumprelu": 6.5, "gated": 7.0, "topk": 4.75, "batchtopk": 4.75}
"""Tensors of a whole tile that the dense path's backward pass holds at once, by architecture; counted."""
MOST_DENSE_TILES = max(DENSE_TILES.values())


def tile_shape(
    rows: int, latents: int, readers: int, element_bytes: int, device: str = "cpu", tile_latents: int | None = None
) -> tuple[int, int]:
    """Rows and latents of a tile of the encoder product, as ops/product.py cuts it.

    >>> tile_shape(4096, 16384, 1, FP32), tile_shape(4096, 262144, 1, BF16), tile_shape(4096, 16384, 1, BF16, "cuda")
    ((512, 16384), (512, 32768), (4096, 16384))
    """
    elements = TILE_BYTES.get(device, TILE_BYTES["cpu"]) // element_bytes
    width = min(tile_latents or max(16, elements // FULL_SPEED_ROWS), latents // readers)
    return max(1, min(rows, max(64, elements // width))), width


def operand_bytes(rows: int, latents: int, width: int, readers: int = 1) -> int:
    """Both factors of the encoder product in bfloat16 with three columns more, padded to 32 (ops/product.py).

    >>> operand_bytes(4096, 16384, 576) / MIB
    23.75
    """
    padded = -(-(width + 3) // 32) * 32
    return (rows * readers + latents) * padded * BF16


def packed_bytes(latents: int, width: int) -> int:
    """On CPU: the encoder once more, as the library of matrix products lays it out for itself, one tile at a time."""
    elements = TILE_BYTES["cpu"] // BF16
    return min(latents, max(16, elements // FULL_SPEED_ROWS)) * width * BF16


def workspace_bytes(
    rows: int,
    latents: int,
    width: int,
    *,
    half: bool,
    certain_topk: bool,
    readers: int = 1,
    device: str = "cpu",
    tile_latents: int | None = None,
) -> int:
    """Buffers that outlive a step: the tile, and with bfloat16 products their factors.

    Args:
        rows, latents, width: of the product; `width` is that of one latent's input.
        half: the product runs in bfloat16.
        certain_topk: TopK that computes rows in doubt again, in an fp32 tile (on CPU it counts twice: it grows with
            the number of such rows, and malloc keeps the smaller ones' places).
        readers, device, tile_latents: as in ops/product.py.

    >>> workspace_bytes(4096, 16384, 576, half=False, certain_topk=True) / MIB
    32.0
    >>> workspace_bytes(4096, 16384, 576, half=True, certain_topk=True) / MIB
    137.75
    """

    def tile_bytes(element_bytes: int) -> int:
        tall, wide = tile_shape(rows, latents, readers, element_bytes, device, tile_latents)
        return tall * wide * element_bytes

    if not half:
        return tile_bytes(FP32)
    packed = packed_bytes(latents, width) if device == "cpu" else 0
    again = (2 if device == "cpu" else 1) * tile_bytes(FP32) if certain_topk else 0
    return tile_bytes(BF16) + again + operand_bytes(rows, latents, width, readers) + packed


def topk_selection_bytes(tile_rows: int, k: int, latents: int, *, half: bool, certain: bool = True) -> int:
    """Of a tile's candidates: 16 values in each of the best groups, their places, and fp32 values of k and some more.

    >>> topk_selection_bytes(1024, 32, 16384, half=True) / MIB
    5.75
    """
    wide = min(latents, k + (SPARE_CERTAIN if certain else SPARE)) if half else k
    element = BF16 if half else FP32
    return tile_rows * wide * (GROUP_SIZE * element + 60)


def bound_selection_bytes(pairs: int, tile_share: float, batch_latents: int = 0) -> int:
    """Of pairs above a bound: in each tile 16 places for each group that holds one, then what the tiles found, joined
    and computed again. BatchTopK multiplies some rows first, in a tile of its own (`batch_latents`).

    >>> bound_selection_bytes(100_000, 0.25)
    9000000
    """
    sample = min(2 * SAMPLE_ROWS * batch_latents * FP32, TILE_BYTES["cpu"])
    return max(round(pairs * (200 * tile_share + 40)), sample)


def sparse_step_bytes(
    rows: int, d_in: int, d_out: int, pairs: int, *, same: bool = True, reconstructions: int = 1, wide: bool = False
) -> int:
    """Rows and pairs that a sparse step holds at its fullest.

    Forward: x, y where it is another, the reconstruction, its difference and that squared; with n nested
    reconstructions 4 n + 3 times the rows. Backward: x, x - b_in and the gradient, and the pairs sorted by latent.

    Args:
        rows: B.
        d_in, d_out: widths.
        pairs: P, all that the step touches.
        same: y is x.
        reconstructions: n, Matryoshka's prefixes.
        wide: a second reconstruction from more pairs (Multi-TopK, Gated).

    >>> sparse_step_bytes(4096, 576, 576, 4096 * 32) / MIB
    44.0
    """
    read, written = rows * d_in * FP32, rows * d_out * FP32
    forward = 3 + wide if reconstructions == 1 else 4 * reconstructions + 2
    at_loss = read + forward * written + (0 if same else written) + 24 * pairs
    at_gradients = 2 * read + 2 * written + 64 * pairs
    return max(at_loss, at_gradients) if reconstructions == 1 else at_loss + 40 * pairs


def dense_step_bytes(
    rows: int, latents: int, d_in: int, d_out: int, architecture: str, device: str = "cpu", matrix_bytes: int = 0
) -> int:
    """The dense path: a tile's tensors, the rows, and one matrix's gradient beside its sum over tiles.

    Args:
        rows, latents, d_in, d_out: B, F and the widths.
        architecture: see `DENSE_TILES`; one that is not there is taken for the largest.
        device: tiles are larger on CUDA.
        matrix_bytes: of the larger of both matrices.

    >>> dense_step_bytes(1024, 8192, 256, 256, "relu") / MIB
    132.0
    """
    tile_rows = min(rows, max(64, TILE_BYTES.get(device, TILE_BYTES["cpu"]) // (FP32 * latents)))
    tile = tile_rows * latents * FP32
    several = matrix_bytes if tile_rows < rows else 0
    rows_bytes = 2 * rows * (d_in + d_out) * FP32
    return round(DENSE_TILES.get(architecture, MOST_DENSE_TILES) * tile) + rows_bytes + several


def aux_k_bytes(
    rows: int,
    d_in: int,
    d_out: int,
    pairs: int,
    dead: int,
    k: int,
    matrix_bytes: int,
    dense_above: float,
    device: str = "cpu",
) -> int:
    """A step with AuxK where `dead` latents are dead, beyond the gradients: the largest of three moments.

    Forward, what the main loss keeps, the dead latents' encoder and the candidates of a tile of them (or three tiles of
    the dense path). Backward, their rows of both matrices with gradients and k pairs a row, while the step's gradients
    are not there yet. Then those spread out over both matrices, beside the main loss's own.

    Args:
        rows, d_in, d_out: B and the widths.
        pairs: P of the main loss.
        dead: dead latents.
        k: of them, each row's.
        matrix_bytes: of one matrix.
        dense_above: see `model.dense_above`.
        device: tiles are larger on CUDA.

    >>> aux_k_bytes(4096, 576, 576, 4096 * 32, dead=0, k=288, matrix_bytes=36 * MIB, dense_above=1 / 24)
    0
    >>> aux_k_bytes(4096, 576, 576, 4096 * 32, dead=8192, k=288, matrix_bytes=36 * MIB, dense_above=1 / 24) / MIB
    146.0
    """
    if dead == 0:
        return 0
    k = min(k, dead)
    kept = 2 * rows * (d_in + d_out) * FP32 + 16 * pairs
    tall, _ = tile_shape(rows, dead, 1, FP32, device)
    if k < dense_above * dead:
        aux_pairs = rows * k
        forward = kept + dead * d_in * FP32 + topk_selection_bytes(tall, k, dead, half=False)
        picked = 2 * dead * (d_in + d_out) * FP32
        backward = kept + picked + sparse_step_bytes(rows, d_in, d_out, aux_pairs) - 2 * matrix_bytes
    else:
        aux_pairs = 0
        forward = kept + dead * d_out * FP32 + tall * (3 * dead * FP32 + 17 * k)
        backward = 0
    spread = 2 * matrix_bytes + rows * d_in * FP32 + 36 * pairs + 28 * aux_pairs
    return max(forward, backward, spread)


def optimizer_step_bytes(matrix_bytes: int, *, projects: bool, muon: bool) -> int:
    """What clipping and the optimizer make on the way: the products along unit rows (one matrix); Muon's look ahead in
    fp32 and two versions of the orthogonal matrix in bfloat16 (two). Adam's kernel needs nothing.

    >>> optimizer_step_bytes(36 * MIB, projects=True, muon=False) / MIB
    36.0
    """
    return 2 * matrix_bytes if muon else matrix_bytes * projects


def folding_bytes(matrix_numbers: int) -> int:
    """At the end of a run: a block of latents in fp64, five times over, while what training scaled is folded in.

    >>> folding_bytes(2**30) / MIB
    40.0
    """
    return 5 * 8 * min(matrix_numbers, BLOCK_NUMBERS)


def window_bytes(num_rows: int, row_bytes: int, window_mb: int, num_streams: int, world: int = 1) -> int:
    """The shuffle window of one rank: two blocks of each of its streams, or all of a small cache twice.

    >>> round(window_bytes(10**9, 1152, 1024, 64) / MIB), window_bytes(1000, 1152, 1024, 10)
    (1024, 2304000)
    """
    block = window_mb * MIB // (2 * num_streams * row_bytes)
    return 2 * min(block, -(-num_rows // num_streams)) * row_bytes * num_streams // world


def batches_bytes(rows: int, row_bytes: int, prefetch_batches: int) -> int:
    """Batches in the stored format: those read ahead, the one being filled, the one in use.

    >>> batches_bytes(4096, 1152, 4) / MIB
    27.0
    """
    return (prefetch_batches + 2) * rows * row_bytes


def fsdp_bytes(parameter_bytes: int, world: int) -> int:
    """Beside a rank's share of all state: the gathered dictionary, and at the end of the backward pass its whole
    gradient with a copy laid out for the reduction. The parts of torch's FSDP2, from its source.

    >>> fsdp_bytes(1000, 8)
    3125
    """
    return 3 * parameter_bytes + parameter_bytes // world


def ddp_bytes(gradient_bytes: int, largest_bytes: int, world: int, *, bf16: bool, reproducible: bool) -> int:
    """Beside the gradients, which lie in DDP's buckets: their copies in bfloat16; with `reproducible` one parameter's
    gradient of every rank.

    >>> ddp_bytes(1000, 400, 8, bf16=False, reproducible=False), ddp_bytes(1000, 400, 8, bf16=True, reproducible=False)
    (0, 500)
    """
    if world == 1:
        return 0
    if reproducible:
        return world * largest_bytes
    return gradient_bytes // 2 if bf16 else 0


def resident_bytes() -> int:
    """What this process holds now; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)
