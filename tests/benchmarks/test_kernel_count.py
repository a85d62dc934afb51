"""What kernels take by their machine code: the counting by hand-made listings, and the tail's kernels for GPUs."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from benchmarks import kernel_count
from benchmarks.kernel_count import CARDS, Subject

LISTING = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;                 /* 0x0000000402047981 */
        /*0010*/                   MUFU.EX2 R4, R4 ;                                /* 0x0000000402047981 */
        /*0020*/              @!P1 FFMA R4, R4, R5, R6 ;                            /* 0x0000000402047981 */
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;             /* 0x0000000402047981 */
        /*0040*/                   LDSM.16.M88.4 R8, [R4] ;                         /* 0x0000000402047981 */
        /*0050*/               @P0 STG.E.128 desc[UR4][R2.64], R8 ;                 /* 0x0000000402047981 */
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                    /* 0x0000000402047981 */
        /*0070*/               @P2 BRA 0x10 ;                                       /* 0x0000000402047981 */
        /*0080*/                   LOP3.LUT R4, R4, R5, RZ, 0xc0, !PT ;             /* 0x0000000402047981 */
        /*0090*/               @P3 BRA 0x80 ;                                       /* 0x0000000402047981 */
        /*00a0*/                   EXIT ;                                           /* 0x0000000402047981 */
        /*00b0*/                   BRA 0xb0;                                        /* 0x0000000402047981 */
        /*00c0*/                   NOP;                                             /* 0x0000000402047981 */
"""


def test_the_loop_of_rows_is_found_and_its_instructions_are_told_apart() -> None:
    code = kernel_count.instructions(LISTING)
    assert [at for at, _ in code] == list(range(0, 0xB0, 16))
    body = kernel_count.loop(code)
    assert [at for at, _ in body] == list(range(0x10, 0x80, 16))
    by_hand = {"issue": 7, "special": 8, "fp32": 1, "tensor": 8, "shared memory": 16 + 16}
    assert kernel_count.total(body, CARDS[90]) == by_hand
    assert kernel_count.total(body, CARDS[80])["fp32"] == 2


def test_times_are_those_of_a_hand_calculation() -> None:
    """Two warps, blocks of 64 rows, 512 programs: 32,768 rounds of 7 instructions, and the other 4 once a program."""
    subject = Subject(None, 6, 64, {"num_warps": 2}, 512, 13 * 16, 100)
    pipes, traffic, most = kernel_count._times(subject, kernel_count.instructions(LISTING), "bf16", CARDS[90])
    assert pipes["issue"] == pytest.approx(2 * (7 * 32768 + 4 * 512) / (132 * 4 * 1.755e9) * 1e3)
    assert traffic == pytest.approx(2097152 * 13 * 32 / (0.8 * 3.35e12) * 1e3)
    assert most == pytest.approx(traffic + 2 * 512 * 100 * 4 / (0.8 * 3.35e12) * 1e3)


def check(capability: int) -> None:
    for index, subject in enumerate(kernel_count.subjects("bf16")):
        if subject.kernel.__name__.startswith("tail"):
            c = kernel_count.counted(index, capability)
            assert c.spilled <= 32, c
            assert c.ratio <= 1.3, c


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_tails_kernels_are_bound_by_their_traffic(capability: int) -> None:
    check(capability)
