"""How fast activations come off the disk: memmap, zarr and the shuffled loader side by side, warm and cold.

    python benchmarks/read_cache.py --gib 1 --json
    python benchmarks/read_cache.py --gib 4 --chunk-rows 4096 --shard-rows 65536 --json

Writes a raw file and a cache of the same rows into a temporary folder (`--keep FOLDER` keeps and reuses them), reads
each whole and reports GB/s of rows (10^9 bytes). Warm: read once before. Cold: fsync, then posix_fadvise(DONTNEED) on
every file, and mincore() afterwards says which share of the pages was really dropped (`resident_before`). Every loader
figure is a whole pass with 2 threads, every row touched by the consumer; the memmap shuffle gathers single rows.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zarr
from zarr.core.buffer import default_buffer_prototype

from sparsepilot.data import layout
from sparsepilot.data.cache import Cache
from sparsepilot.data.loader import TrainLoader
from sparsepilot.data.order import Order
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.window import window_rows_per_stream
from sparsepilot.data.writer import CacheWriter, create, seal

SITE = "x"


def write(folder: Path, rows: int, width: int, chunk_rows: int, shard_rows: int) -> tuple[Cache, Path]:
    """The cache and the raw file, both of the same bf16 rows; what lies there from before is finished or reused."""
    plan = CachePlan(rows, 0, {SITE: width}, "bfloat16", chunk_rows, shard_rows, {"kind": "read_cache benchmark"})
    path, raw = folder / "cache", folder / "raw.bin"
    create(path, plan)
    writer = CacheWriter(path)
    for part in writer.pending():
        generator = torch.Generator().manual_seed(part.start)
        x = torch.randn(len(part), width, generator=generator).to(torch.bfloat16)
        numbers = np.arange(len(part))
        writer.write_shard(part, {SITE: x}, numbers, numbers, numbers)
    cache = seal(path)
    if not raw.exists() or raw.stat().st_size != rows * width * 2:
        with raw.open("wb") as file:
            for start in range(0, rows, 65536):
                file.write(cache.read(SITE, start, min(start + 65536, rows)).view(torch.uint16).numpy().data)
            os.fsync(file.fileno())
    return cache, raw


def files_of(cache: Cache, raw: Path) -> list[Path]:
    name = layout.site_array(SITE)
    return [raw, *(layout.shard_file(cache.path, name, s) for s in range(cache.manifest.plan.num_shards))]


def drop(files: list[Path]) -> float:
    """Asks the kernel to forget the files' pages; returns the share that it still holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = total = 0
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
                pages = -(-len(mapped) // mmap.PAGESIZE)
                flags = (ctypes.c_ubyte * pages)()
                view = np.frombuffer(mapped, dtype=np.uint8)
                address = ctypes.c_void_p(view.ctypes.data)
                if libc.mincore(address, ctypes.c_size_t(len(mapped)), flags) != 0:
                    raise OSError(ctypes.get_errno(), "mincore cannot tell whether the pages were dropped")
                resident += int((np.frombuffer(flags, dtype=np.uint8) & 1).sum())
                total += pages
                del view
        finally:
            os.close(descriptor)
    return resident / max(1, total)


def candidates(cache: Cache, raw: Path, window_mb: int, batch: int, streams: int) -> dict[str, Callable[[], None]]:
    rows, width = cache.num_train_rows, cache.widths[SITE]
    out = torch.empty(16384, width, dtype=torch.bfloat16)
    view = out.view(torch.uint16).numpy()

    def memmap_sequential() -> None:
        data = np.memmap(raw, dtype=np.uint16, mode="r", shape=(rows, width))
        for start in range(0, rows, 16384):
            part = data[start : start + 16384]
            view[: len(part)] = part

    def memmap_shuffled() -> None:
        data = np.memmap(raw, dtype=np.uint16, mode="r", shape=(rows, width))
        order = np.random.default_rng(0).permutation(rows)
        for start in range(0, rows, batch):
            which = order[start : start + batch]
            np.take(data, which, axis=0, out=view[: len(which)], mode="clip")

    def cache_sequential() -> None:
        for start in range(0, rows, 16384):
            cache.read_into(SITE, start, out[: min(16384, rows - start)])

    def loader_shuffled() -> None:
        window = window_rows_per_stream(window_mb, streams, 2 * width)
        order = Order(rows, cache.chunk_rows, streams, window, seed=0)
        for item in TrainLoader(cache, [SITE], order, batch, 1, rows):
            item.x_BD.view(torch.uint16)[:, 0].sum()

    def zarr_sequential(pipeline: str) -> Callable[[], None]:
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            array = zarr.open_array(cache.path / layout.GROUP_FOLDER, path=layout.site_array(SITE), mode="r")

        def run() -> None:
            for start in range(0, rows, 16384):
                part = view[: min(16384, rows - start)]
                array.get_basic_selection(
                    slice(start, start + len(part)), out=default_buffer_prototype().nd_buffer.from_numpy_array(part)
                )

        return run

    found: dict[str, Callable[[], None]] = {
        "memmap sequential": memmap_sequential,
        "memmap shuffled rows": memmap_shuffled,
        "zarr-python sequential": zarr_sequential("zarr.core.codec_pipeline.BatchedCodecPipeline"),
    }
    if importlib.util.find_spec("zarrs"):
        found["zarrs sequential (unchecked)"] = zarr_sequential("zarrs.ZarrsCodecPipeline")
    return found | {"cache sequential": cache_sequential, "loader shuffled": loader_shuffled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the rows, GiB")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--chunk-rows", type=int, default=0, help="0: the default of a new cache")
    parser.add_argument("--shard-rows", type=int, default=0, help="0: the default of a new cache")
    parser.add_argument("--window-mb", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    rows = int(args.gib * 2**30 / (2 * args.width)) // args.batch * args.batch
    if rows == 0:
        parser.error(f"--gib {args.gib} holds less than one batch of {args.batch} rows")
    folder = args.keep or Path(tempfile.mkdtemp(prefix="read-cache-"))
    try:
        cache, raw = write(folder, rows, args.width, args.chunk_rows, args.shard_rows)
        files = files_of(cache, raw)
        size = rows * args.width * 2
        runs = candidates(cache, raw, args.window_mb, args.batch, args.streams)
        figures: dict[str, dict[str, list[float]]] = {name: {"warm": [], "cold": []} for name in runs}
        resident: list[float] = []
        for repeat in range(args.repeats + 1):
            for name, run in runs.items():
                for state in ("cold", "warm"):  # the cold run warms the cache for the warm one
                    if state == "cold":
                        resident.append(drop(files))
                    began = time.perf_counter()
                    run()
                    if repeat or args.repeats == 0:  # the first round also pays for imports and page faults
                        figures[name][state].append(size / 1e9 / (time.perf_counter() - began))
        result = {
            "gb_per_s": {n: {s: round(statistics.median(v), 3) for s, v in f.items()} for n, f in figures.items()},
            "all": {n: {s: [round(x, 3) for x in v] for s, v in f.items()} for n, f in figures.items()},
            "gib": round(size / 2**30, 3),
            "chunk_rows": cache.chunk_rows,
            "shard_rows": cache.manifest.plan.shard_rows,
            "window_mb": args.window_mb,
            "cold": "fsync + posix_fadvise(DONTNEED) on every file before each cold run",
            "resident_before": round(max(resident), 4),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "python": platform.python_version(),
        }
    finally:
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['gib']} GiB, chunks of {result['chunk_rows']} rows in shards of {result['shard_rows']}, GB/s")
    for name, values in result["gb_per_s"].items():
        print(f"  {name:28} warm {values['warm']:6.2f}   cold {values['cold']:6.2f}")


if __name__ == "__main__":
    main()
