"""The inner loop is found in disassembly as compilers write it."""

from dit_sparse.kernels.disassembly import Loop, inner_loop


def sass(*lines: str) -> str:
    """Lines of nvdisasm: labels at the margin, instructions numbered."""
    code = ["kernel:", ".text.kernel:"]
    for i, line in enumerate(lines):
        code.append(line if line.endswith(":") else f"        /*{16 * i:04x}*/              {line} ;")
    return "\n".join(code)


WORK = ["FFMA R1, R2, R3, R4"] * 10


def test_whole_blocks_before_partial_ones():
    text = sass(
        "LDC R1, c[0x0][0x28]",
        "@!P0 BRA `(.L_x_0)",
        ".L_x_1:",
        *WORK,
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P0 BRA `(.L_x_1)",
        ".L_x_0:",
        "@!P1 BRA `(.L_x_2)",
        ".L_x_3:",
        *WORK,
        *WORK,
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P1 BRA `(.L_x_3)",
        ".L_x_2:",
        "EXIT",
    )
    assert inner_loop(text) == Loop(1, 12)


def test_a_wait_behind_the_end_does_not_stretch_the_loop():
    text = sass(
        ".L_x_0:",
        *WORK,
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR5], R3",
        "@!P3 BRA `(.L_x_1)",
        ".L_x_2:",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR9], idesc[UR10], UPT",
        "@P0 BRA `(.L_x_0)",
        *WORK,
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR9], idesc[UR10], UPT",
        "EXIT",
        ".L_x_1:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR5], R3",
        "@!P3 BRA `(.L_x_1)",
        "BRA `(.L_x_2)",
        ".L_x_3:",
        "BRA `(.L_x_3)",
    )
    assert inner_loop(text) == Loop(1, 17)


def test_the_loop_inside_a_loop_counts():
    text = sass(
        ".L_x_0:",
        *WORK,
        "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT",
        ".L_x_1:",
        *WORK,
        "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88",
        "BRA.U !UP0, `(.L_x_1)",
        "@!P0 CALL.REL.NOINC `(.L_x_2)",
        "BRA `(.L_x_0)",
        ".L_x_2:",
        "EXIT",
    )
    assert inner_loop(text) == Loop(1, 12)


def test_a_loop_without_tensor_cores_is_no_reason_to_take_them_from_elsewhere():
    text = sass("IMMA.16816.S8.S8 R4, R8, R12, R4", ".L_x_0:", *WORK, "@P0 BRA `(.L_x_0)", "EXIT")
    assert inner_loop(text) == Loop(0, 11)


def test_a_kernel_without_loops_counts_as_a_whole():
    text = sass(
        "IMMA.16816.S8.S8 R4, R8, R12, R4",
        "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)",
        "@P0 EXIT",
        "QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4",
        "EXIT",
        "$__internal_0_$__cuda_sm20_div_s64:",
        *WORK,
        "RET.REL.NODEC R2 `(kernel)",
    )
    assert inner_loop(text) == Loop(2, 5)


def test_amd_assembly():
    text = "\n".join(
        [
            "kernel:                                 ; @kernel",
            "\ts_load_dwordx2 s[2:3], s[0:1], 0x0",
            "\ts_branch .LBB0_2",
            "\t.p2align\t8",
            ".LBB0_1:                                ; =>This Inner Loop Header: Depth=1",
            *["\tv_fma_f32 v1, v2, v3, v4             ; v_mfma in a comment"] * 10,
            "\t.loc\t1 84 12                         ; kernel.py:84:12",
            "\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]",
            ".LBB0_2:",
            "\ts_cbranch_scc1 .LBB0_1",
            "; %bb.3:",
            "\ts_endpgm",
        ]
    )
    assert inner_loop(text) == Loop(1, 12)
