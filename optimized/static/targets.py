"""The processors that kernels are compiled for, and what one of their cores holds."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """One processor.

    backend, arch, lanes   how Triton calls it;  family: its row in `optimized.kernels.blocks`
    registers              32-bit registers of one core, in `granule` per warp;  most_registers: of one lane
    warps, programs        resident at once;  core_shared, program_shared: bytes of shared memory of a core, and of one program at most
    reserved               bytes of shared memory that each program costs beside its own
    matrix                 the matrix instruction that tiles of at least 64 rows must use
    """

    backend: str
    arch: int | str
    lanes: int
    family: str
    registers: int
    granule: int
    most_registers: int
    warps: int
    programs: int
    core_shared: int
    program_shared: int
    reserved: int
    matrix: str

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs that one core holds at once: by registers, shared memory, warps, and their number."""
        each = -(-max(registers, 1) * self.lanes // self.granule) * self.granule
        by_registers = self.registers // (each * warps)
        by_shared = self.core_shared // max(shared + self.reserved, 1)
        return min(by_registers, by_shared, self.warps // warps, self.programs)

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Resident warps, as a share of the warps that a core can hold."""
        return round(self.resident(registers, shared, warps) * warps / self.warps, 3)


KIB = 1024
# CUDA C Programming Guide, table of technical specifications per compute capability; AMD CDNA3 instruction set, and LLVM's user guide of
# the AMDGPU backend: 512 registers of 64 lanes on each of four SIMDs, 8 waves on each, 64 KiB of local data share.
TARGETS: dict[str, Target] = {
    "sm80": Target("cuda", 80, 32, "sm80", 65536, 256, 255, 64, 32, 164 * KIB, 163 * KIB, KIB, "mma"),
    "sm90": Target("cuda", 90, 32, "sm90", 65536, 256, 255, 64, 32, 228 * KIB, 227 * KIB, KIB, "wgmma"),
    "sm100": Target("cuda", 100, 32, "sm100", 65536, 256, 255, 64, 32, 228 * KIB, 227 * KIB, KIB, "tcgen05"),
    "gfx942": Target("hip", "gfx942", 64, "amd", 4 * 512 * 64, 512, 512, 32, 32, 64 * KIB, 64 * KIB, 0, "mfma"),
}
