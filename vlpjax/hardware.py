"""What accelerators can do: the one table of peaks, memories and links that estimates are made from.

Every figure is the vendor's for one chip, dense and not sparse, and says where it is published.  A device that is not
here gets no estimate: a share of a wrong peak is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlpjax.errors import UserError

GIB = 2**30
CLOUD_TPU = "https://docs.cloud.google.com/tpu/docs"
SCALING_BOOK = "https://jax-ml.github.io/scaling-book/tpus/"  # "How to Scale Your Model", Austin et al., 2025


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator; all rates are per chip and per second.

    Attributes:
      name: as topologies spell it (``"v5p"``) or the product's name.
      kind: regular expression of what JAX calls the device (``device_kind``).
      bf16_flops: dense bfloat16 operations; ``int8_ops`` and ``fp8_flops`` likewise, None where there are none faster.
      hbm_bytes: memory.
      hbm_bandwidth: bytes between memory and chip.
      ici_bandwidth: bytes in one direction over one link to a neighbour (TPUs), or from a chip into the switch that
        joins all chips of a domain (NVLink).  What a transfer reaches, about nine tenths of the signalling rate.
      torus_dims: dimensions of the torus that links make, two links each; 0 is a switch.
      domain: most chips that links join: a pod, or an NVLink domain.
      dcn_bandwidth: bytes in one direction per chip over the data-centre network.
      host_bandwidth: bytes in one direction between chip and host (PCIe).
      clock_hz: cycles, by which the compiler's estimates are turned into seconds: peak over operations per cycle of the
        matrix units.  None where there is no such compiler.
      devices: devices that JAX shows for a chip; each has its share of operations and memory.
      sources: where the figures are published.
    """

    name: str
    kind: str
    bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    torus_dims: int
    domain: int
    dcn_bandwidth: float
    host_bandwidth: float
    sources: tuple[str, ...]
    int8_ops: float | None = None
    fp8_flops: float | None = None
    clock_hz: float | None = None
    devices: int = 1

    def rings(self, sizes: Sequence[int]) -> list[bool]:
        """Which axes of a slice of TPUs, with so many chips along each, have a link from their end to their start.

        All of a slice that is made of cubes of 4 x 4 x 4; where there are two dimensions, those that a pod is long
        (:data:`SCALING_BOOK`).
        """
        if self.torus_dims == 3:
            return [all(size % 4 == 0 for size in sizes)] * len(sizes)
        return [size == 16 for size in sizes]


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e", kind=r"TPU v5 ?(lite|e)", bf16_flops=197e12, int8_ops=394e12,
            hbm_bytes=16 * GIB, hbm_bandwidth=0.81e12,
            ici_bandwidth=45e9, torus_dims=2, domain=256, dcn_bandwidth=3.125e9, host_bandwidth=15e9,
            clock_hz=197e12 / (2 * 4 * 128 * 128),  # 4 matrix units of 128 x 128
            sources=(f"{CLOUD_TPU}/v5e", SCALING_BOOK),
        ),
        Chip(
            name="v5p", kind=r"TPU v5p?", bf16_flops=459e12, int8_ops=918e12,
            hbm_bytes=95 * GIB, hbm_bandwidth=2.765e12,
            ici_bandwidth=90e9, torus_dims=3, domain=8960, dcn_bandwidth=6.25e9, host_bandwidth=15e9,
            clock_hz=459e12 / (2 * 8 * 128 * 128),  # 2 cores, joined into one device
            sources=(f"{CLOUD_TPU}/v5p", SCALING_BOOK),
        ),
        Chip(
            name="v6e", kind=r"TPU v6 ?(lite|e)", bf16_flops=918e12, int8_ops=1836e12, fp8_flops=918e12,
            hbm_bytes=32 * GIB, hbm_bandwidth=1.64e12,
            ici_bandwidth=90e9, torus_dims=2, domain=256, dcn_bandwidth=12.5e9, host_bandwidth=32e9,
            clock_hz=918e12 / (2 * 4 * 256 * 256),
            sources=(f"{CLOUD_TPU}/v6e", SCALING_BOOK),
        ),
        Chip(
            name="TPU7x", kind=r"TPU ?(7x|v7x?)", bf16_flops=2307e12, fp8_flops=4614e12,
            hbm_bytes=192 * GIB, hbm_bandwidth=7.38e12,
            ici_bandwidth=90e9, torus_dims=3, domain=9216, dcn_bandwidth=12.5e9, host_bandwidth=32e9,
            clock_hz=2307e12 / (2 * 8 * 256 * 256), devices=2,
            sources=(f"{CLOUD_TPU}/tpu7x", SCALING_BOOK),
        ),
        Chip(
            name="H100", kind=r".*H100.*", bf16_flops=989e12, int8_ops=1979e12, fp8_flops=1979e12,
            hbm_bytes=80 * 10**9, hbm_bandwidth=3.35e12,
            ici_bandwidth=450e9, torus_dims=0, domain=8, dcn_bandwidth=50e9, host_bandwidth=64e9,
            sources=("https://www.nvidia.com/en-us/data-center/h100/",),  # sparse figures there, twice these
        ),
        Chip(
            name="H200", kind=r".*H200.*", bf16_flops=989e12, int8_ops=1979e12, fp8_flops=1979e12,
            hbm_bytes=141 * 10**9, hbm_bandwidth=4.8e12,
            ici_bandwidth=450e9, torus_dims=0, domain=8, dcn_bandwidth=50e9, host_bandwidth=64e9,
            sources=("https://www.nvidia.com/en-us/data-center/h200/",),
        ),
        Chip(
            name="B200", kind=r".*B200.*", bf16_flops=2250e12, fp8_flops=4500e12,
            hbm_bytes=180 * 10**9, hbm_bandwidth=8e12,
            ici_bandwidth=900e9, torus_dims=0, domain=8, dcn_bandwidth=50e9, host_bandwidth=64e9,
            sources=("https://www.nvidia.com/en-us/data-center/dgx-b200/",),
        ),
    )
}  # fmt: skip


def chip_named(name: str) -> Chip:
    """The chip of this name.

    Raises:
      UserError: there is none; the known ones are listed.
    """
    for chip in CHIPS.values():
        if chip.name.lower() == name.lower():
            return chip
    raise UserError(f"No figures are known of the chip {name!r}; there are {', '.join(CHIPS)}.")


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls ``device_kind`` (``jax.devices()[0].device_kind``), or None if it is not known."""
    return next((chip for chip in CHIPS.values() if re.fullmatch(chip.kind, device_kind)), None)
