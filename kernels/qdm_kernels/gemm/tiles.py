"""Which tile a matrix product gets: measured entries of a file where there are some, else a model of the time (README: Tiles).

Keyed by the power of two above M, never by M itself: a new resolution compiles nothing and looks nothing up twice.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUP_M = 8
SHARED_BYTES = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448}  # per block
_SMALLEST_SHARED = 101_376
_SHARE_INPUTS = 512  # least inputs of one split: shorter loops do not fill the pipeline
_SPLITS = (1, 2, 4, 8)
_LATENCY_INPUTS = 256  # inputs whose time filling and draining a tile's pipeline takes
_OPS_PER_BYTE = 1979e12 / 3.0e12  # H100: operations at its peak in the time that one byte of device memory takes
_SHARES = {  # of the peak that full grids of a tile were measured to reach on an H100 or H200 (4608 x 12288 x 3072, 8-bit weights)
    (128, 128, 128): 0.55, (256, 128, 128): 0.50, (128, 256, 128): 0.49, (128, 128, 64): 0.49, (64, 128, 128): 0.41, (128, 64, 128): 0.39,
    (64, 256, 128): 0.37, (128, 64, 64): 0.33, (64, 128, 64): 0.33, (64, 64, 128): 0.31,
}  # fmt: skip
_LEAST_SHARE = 0.27
_SECOND_KERNEL = 3e-6 * 1979e12 / 132  # operations of one multiprocessor in the time that adding the shares takes at least
_ALONE = 1.4  # time of a program that shares its multiprocessor with no other, whose loads nothing hides


@dataclass(frozen=True)
class Tile:
    """Rows x outputs x inputs of one program, warps, pipeline stages.

    registers: cap per thread, None = the compiler's. swap: weights take the side of the rows, x that of the columns. since: least
    capability; 128 inputs of a 128 x 128 tile spill before 9.0. tma: the kernels of `hopper`, on 9.0 alone.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    registers: int | None = None
    swap: bool = False
    since: int = 80
    tma: bool = False

    def __str__(self) -> str:
        return f"{self.bm}x{self.bn}x{self.bk}"

    @property
    def shared_bytes(self) -> int:
        """int8 operands of every stage."""
        return (self.bm + self.bn) * self.bk * self.stages


@dataclass(frozen=True)
class Plan:
    """A tile, and into how many shares K is cut."""

    tile: Tile
    splits: int = 1


# Eight warps at 128 registers, or four at 255, let two programs share a multiprocessor.
TILES = (
    Tile(128, 128, 128, 4, 3, since=90),
    Tile(128, 128, 128, 8, 3, 128, since=90),
    Tile(128, 128, 64, 8, 4, 128),
    Tile(128, 64, 128, 4, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 128, 4, 3),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 128, 4, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(32, 64, 128, 4, 4, swap=True),
    Tile(32, 64, 64, 4, 5, swap=True),
    Tile(16, 64, 128, 4, 4, swap=True),
    Tile(16, 64, 64, 4, 5, swap=True),
)


# Where the copy engine runs (`why_not_tma`). Four multiplying warps leave room for a second program, eight do not.
TMA_TILES = (
    Tile(128, 128, 128, 4, 3, 128, since=90, tma=True),
    Tile(128, 128, 64, 4, 6, 128, since=90, tma=True),
    Tile(128, 64, 128, 4, 4, 128, since=90, tma=True),
    Tile(128, 64, 64, 4, 8, 128, since=90, tma=True),
    Tile(64, 128, 128, 4, 4, 128, since=90, tma=True),
    Tile(64, 64, 128, 4, 6, 96, since=90, tma=True),
    Tile(64, 64, 64, 4, 8, 96, since=90, tma=True),
    Tile(128, 256, 128, 8, 4, 168, since=90, tma=True),
    Tile(256, 128, 128, 8, 4, 168, since=90, tma=True),
)
# Packed weights on the rows' side go from registers to the tensor cores; on the columns' side once more through shared memory.
PACKED_TILES = (
    Tile(128, 128, 128, 8, 3, 128, swap=True, since=90),
    Tile(64, 128, 128, 4, 4, swap=True, since=90),
    Tile(128, 64, 64, 4, 5, swap=True, since=90),
)


def choose_plan(op: str, m: int, n: int, k: int, device: torch.device) -> Plan:
    """Plan for x [m, k] and w [n, k], k a multiple of 64. A device without CUDA (the interpreter) counts as an H100."""
    capability, count = processors(device)
    return _plan(op, bucket(m), n, k, capability, count, user_file())


def bucket(m: int) -> int:
    """The power of two at or above m, from 16 up: what a plan depends on."""
    return max(16, 1 << (m - 1).bit_length())


@cache
def _plan(op: str, m: int, n: int, k: int, capability: int, count: int, file: Path | None) -> Plan:
    return measured(op, m, n, k, capability, file) or modelled(m, n, k, capability, count)


def modelled(m: int, n: int, k: int, capability: int, count: int) -> Plan:
    """Plan of least modelled time on `count` multiprocessors: waves of tiles against bytes moved. Of equals, the first."""
    plans = (Plan(tile, splits) for tile in _fitting(m, k, capability) for splits in _SPLITS if _may_split(tile, splits, m, n, k, count))
    return min(plans, key=lambda plan: _time(plan, m, n, k, count))


def _may_split(tile: Tile, splits: int, m: int, n: int, k: int, count: int) -> bool:
    """Splits are for grids that leave multiprocessors idle, with enough inputs each."""
    return splits == 1 or (cdiv(m, tile.bm) * cdiv(n, tile.bn) < count and k // splits >= _SHARE_INPUTS)


def runs(tile: Tile, capability: int) -> bool:
    """Does a tile run on a GPU of this capability, with the triton that is installed?"""
    return tile.since <= capability and (not tile.tma or why_not_tma(capability) is None)


@cache
def why_not_tma(capability: int) -> str | None:
    """Why the kernels of `hopper` do not run; None = they do."""
    if capability != 90:
        return f"the copy engine and its products are those of capability 9.0, this is {capability / 10}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "the interpreter has no Gluon"
    try:
        import_module("qdm_kernels.hopper.triton")
    except ImportError as error:
        return f"this triton has another Gluon: {error}"
    return None


def _fitting(m: int, k: int, capability: int) -> list[Tile]:
    limit = SHARED_BYTES.get(capability, _SMALLEST_SHARED)
    shapes = (*TMA_TILES, *(t for t in TILES if t.swap)) if why_not_tma(capability) is None else TILES
    tiles = [tile for tile in shapes if k % tile.bk == 0 and tile.since <= capability and tile.shared_bytes <= limit]
    return [tile for tile in tiles if (tile.bm == m if tile.swap else m > 32)]


def _time(plan: Plan, m: int, n: int, k: int, count: int) -> float:
    """Modelled time, in operations of one multiprocessor."""
    tile, splits = plan.tile, plan.splits
    programs = -(-m // tile.bm) * -(-n // tile.bn) * splits
    per_input = 2 * tile.bm * tile.bn / _SHARES.get((tile.bm, tile.bn, tile.bk), _LEAST_SHARE)
    work = -(-programs // count) * per_input * (k / splits + _LATENCY_INPUTS) * (_ALONE if programs <= count else 1.0)
    traffic = m * k + n * k + 2 * m * n + (8 * m * n * splits if splits > 1 else 0)
    return max(work, traffic * _OPS_PER_BYTE / count) + (_SECOND_KERNEL if splits > 1 else 0)


def user_path() -> Path:
    """Where the user's own measurements are kept: QDM_TUNED, else ~/.cache/qdm/tuned.json."""
    return Path(os.environ.get("QDM_TUNED") or Path.home() / ".cache/qdm/tuned.json")


@cache
def user_file() -> Path | None:
    """`user_path()` if there is such a file, looked for once."""
    path = user_path()
    return path if path.is_file() else None


def measured(op: str, m: int, n: int, k: int, capability: int, file: Path | None) -> Plan | None:
    """Entry of the user's file, else of the shipped one of this capability; None = none that runs here."""
    shipped = Path(__file__).parents[1] / f"tuned/sm{capability}.json"
    for path in (file, shipped):
        found = _entries(path).get((op, m, n, k)) if path is not None and path.is_file() else None
        if found is not None and runs(found.tile, capability):
            return found
    return None


@cache
def _entries(path: Path) -> dict[tuple[str, int, int, int], Plan]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {(e["op"], e["m"], e["n"], e["k"]): Plan(Tile(**e["tile"]), e["splits"]) for e in content["entries"]}


def entry(op: str, m: int, n: int, k: int, plan: Plan, **measured_values: Any) -> dict[str, Any]:
    """One entry of a file of measurements, for the shapes of m's bucket."""
    return {"op": op, "m": bucket(m), "n": n, "k": k, "tile": asdict(plan.tile), "splits": plan.splits, **measured_values}


@cache
def processors(device: torch.device) -> tuple[int, int]:
    """(capability as 80 or 90, multiprocessors) of a GPU; of an H100 where there is none."""
    if device.type != "cuda":
        return 90, 132
    found = torch.cuda.get_device_properties(device)
    return found.major * 10 + found.minor, found.multi_processor_count


def cdiv(size: int, block: int) -> int:
    """How many blocks cover a size; `triton.cdiv` is a constexpr function, which takes ten times as long."""
    return -(-size // block)


def aligned(x: Tensor) -> Tensor:
    """x contiguous and on a 16-byte boundary, copied only if it is not: an odd address would compile a slow variant."""
    if not x.is_contiguous():
        return x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


# Few rows: so many stages that all of a short K is under way at once; such a layer only reads its weights.
WEIGHT_ONLY_TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(64, 128, 128, 8, 3),
    Tile(64, 128, 64, 8, 4),
    Tile(32, 64, 128, 4, 6),
    Tile(32, 64, 64, 4, 8),
    Tile(16, 64, 128, 4, 8),
    Tile(16, 64, 64, 4, 10),
)


def weight_only_tile(m: int, n: int, k: int, group: int, device: torch.device, bits: int = 4) -> Tile:
    """Tile of the weight-only product, weights on the side of the rows: a measured one, else the least bm that holds x, up to 128.

    group: inputs of a group of scales, 0 = none.
    """
    return _weight_only_tile(bucket(m), n, k, group, processors(device)[0], bits, user_file())


@cache
def _weight_only_tile(m: int, n: int, k: int, group: int, capability: int, bits: int, file: Path | None) -> Tile:
    found = measured(f"linear_w{bits}a16", m, n, k, capability, file)
    if found is not None and (group == 0 or group % found.tile.bk == 0):
        return found.tile
    tiles = [tile for tile in WEIGHT_ONLY_TILES if k % tile.bk == 0 and (group == 0 or group % tile.bk == 0)]
    return next(tile for tile in tiles if tile.bm <= min(m, 128))


# Of `few_rows`, in which a warp has 16 outputs; tuned under an op of their own, `few_rows_w4` or `few_rows_w8`.
FEW_ROWS_TILES = tuple(Tile(16, 16 * warps, 256, warps, 4) for warps in (1, 2, 4, 8))


def few_rows_tile(n: int, k: int, device: torch.device, bits: int) -> Tile:
    """Tile of the weight-only product of few rows: a measured one, else the most warps that leave every multiprocessor two programs."""
    return _few_rows_tile(n, k, *processors(device), bits, user_file())


@cache
def _few_rows_tile(n: int, k: int, capability: int, count: int, bits: int, file: Path | None) -> Tile:
    found = measured(f"few_rows_w{bits}", 16, n, k, capability, file)
    if found is not None:
        return found.tile
    return next((t for t in reversed(FEW_ROWS_TILES) if t.warps <= 4 and cdiv(n, t.bn) >= 2 * count), FEW_ROWS_TILES[0])
