"""TPU names as users write them -> topologies as the compiler takes them, and the facts of each chip.

A name counts as Google's accelerator types do: v4, v5p and tpu7x in cores (two to a chip), v5e and v6e in chips. `x2` behind it
means two slices joined by the data-centre network: "v5p-128x2".
"""

import dataclasses
import difflib
import math
import os
import re
from typing import Any

from cogvideox_jax.core.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Facts of one chip (spec/tpu.md section 9), except where "device" is said: jax counts two devices to a tpu7x chip.

    Fields:
      peak_flops: bfloat16 FLOP/s.
      hbm_limit: bytes a device that the compiler lets a program have; more is RESOURCE_EXHAUSTED.
      hbm_bandwidth: bytes/s.
      clock_hz: what turns the compiler's estimated_cycles, of one device, into seconds (section 8; v4: arXiv 2304.01433). For
        tpu7x nothing is published: the clock at which a product of 8192^3 has the share of the peak that it has on v6e, 70 %.
    link_bandwidth: bytes/s of one inter-chip link, one way.
      torus: dimensions of the network of chips, two links each.
      network_bandwidth: bytes/s of a chip between slices (25 Gbit/s where nothing is published).
      attention_forward, attention_backward: share of the peak that splash attention reaches with heads of 64 (section 8); twice
        as much with heads of 128, which fill the matrix unit (section 3). For v4 and tpu7x: those of v5p and v6e.
    """

    name: str
    device_kind: str
    peak_flops: float
    hbm_limit: int
    hbm_bandwidth: float
    clock_hz: float
    link_bandwidth: float
    torus: int
    network_bandwidth: float
    devices: int
    names_count: int  # what the number in a name is per chip: 2 = cores, 1 = chips
    largest: int  # chips
    attention_forward: float
    attention_backward: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, int(30.75 * GIB), 1200e9, 1.05e9, 45e9, 3, 3.1e9, 1, 2, 4096, 0.44, 0.475),
        Chip("v5e", "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 1.5e9, 45e9, 2, 3.1e9, 1, 1, 256, 0.44, 0.475),
        Chip("v5p", "TPU v5", 459e12, int(95.74 * GIB), 2765e9, 1.75e9, 90e9, 3, 6.2e9, 1, 2, 8960, 0.44, 0.475),
        Chip("v6e", "TPU v6 lite", 918e12, int(31.25 * GIB), 1638e9, 1.75e9, 90e9, 2, 12.5e9, 1, 1, 256, 0.19, 0.24),
        Chip("tpu7x", "TPU7x", 2307e12, int(94.75 * GIB), 7380e9, 1.91e9, 90e9, 3, 12.5e9, 2, 2, 9216, 0.19, 0.24),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices of chips; `shape` is one slice's torus."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        return self.chips * self.chip.devices

    def devices(self) -> list[Any]:
        """The compiler's devices of this topology, on any machine. Loads libtpu; InputError where it is not installed."""
        # libtpu locks the machine for one process, of which there is no need without a TPU; and it would ask the network for
        # the TPU that it is not on
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        from jax.experimental import topologies

        options: dict[str, Any] = {}
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        if self.slices > 1:
            options["num_slices"] = self.slices
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # else the two cores of a chip are two devices
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=self.string, **options).devices)
        except Exception as error:
            if "libtpu" not in str(error) and "tpu" not in str(error).lower():
                raise
            raise InputError(
                f"the TPU compiler cannot describe {self.name} ({self.string}): {str(error).splitlines()[0]}; it comes with "
                "the extra tpu: pip install --require-hashes --requirement launch/locks/tpu.txt"
            ) from None

    @property
    def string(self) -> str:
        """The topology of one slice, as the compiler takes it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def axis_links(self, group: int) -> int:
        """Links of a chip that a collective over `group` neighbours in one slice can use at once.

        Groups fill the torus dimension by dimension; each dimension has two links, or one where it is two chips long.
        """
        links, covered = 0, 1
        for size in sorted(self.shape):
            if covered >= group or size == 1:
                continue
            links += 2 if size > 2 else 1
            covered *= size
        return max(links, 1)


def shapes(chip: Chip) -> dict[int, tuple[int, ...]]:
    """Chips -> the torus that Google gives for them, smallest first.

    Two dimensions: 1, 4, 8, ... 256 chips. Three: 4, 8, 16, 32, then whole cubes of 4x4x4 as near to a cube as they come.
    """
    if chip.torus == 2:
        return {a * b: (a, b) for a, b in ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))}
    found: dict[int, tuple[int, ...]] = {1: (1, 1, 1)} if chip.name == "tpu7x" else {}
    found |= {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
    for cubes in range(1, chip.largest // 64 + 1):
        sides = [
            (a, b, cubes // (a * b))
            for a in range(1, cubes + 1)
            if a**3 <= cubes and cubes % a == 0
            for b in range(a, cubes + 1)
            if b * b <= cubes // a and cubes % (a * b) == 0
        ]
        a, b, c = min(sides, key=sum)
        found[64 * cubes] = (4 * a, 4 * b, 4 * c)
    return found


def parse(name: str) -> Topology:
    """ "v5p-128", "v6e-256x2", ... -> topology. Raises InputError, naming the nearest, for what is not sold."""
    match = re.fullmatch(r"([a-z]+\d+[a-z]*)-(\d+)(?:x(\d+))?", name)
    known = ", ".join(f"{chip}-N" for chip in CHIPS)
    if not match:
        raise InputError(f"{name!r} is not a TPU's name: they look like v5p-128, or v5p-128x2 for two slices ({known})")
    kind, number, slices = match[1], int(match[2]), int(match[3] or 1)
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, 1, cutoff=0.3)
        hint = f", did you mean {near[0]}-{number}?" if near else ""
        raise InputError(f"unknown TPU {kind!r}{hint} (known are {known})")
    chip = CHIPS[kind]
    sold = shapes(chip)
    counts = [chips * chip.names_count for chips in sold]
    if number not in counts:
        near = sorted(sorted(counts, key=lambda count: abs(count - number))[:2])
        what = "cores, two to a chip" if chip.names_count == 2 else "chips"
        raise InputError(
            f"there is no {kind}-{number} (the number counts {what}): the nearest are "
            + " and ".join(f"{kind}-{count}" for count in near)
        )
    if slices < 1:
        raise InputError(f"{name!r} has no slice: write {kind}-{number}, or {kind}-{number}x2 for two")
    return Topology(name, chip, sold[number // chip.names_count], slices)
