"""The profile of the CPU kernels prints what it promises."""

import re

from dit_sparse.kernels import cpu_profile


def test_prints_rates_and_shares(capsys):
    cpu_profile.main(["--shape", "256,1,16", "--block", "32", "--density", "0.5", "--seconds", "0"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("256 tokens, 1 heads of 16, blocks of 32x32, density 0.5")
    found = [re.fullmatch(r"  (\S+) +([\d.]+) GFLOP/s +(\d+)%", line) for line in lines]
    assert [m[1] for m in found] == ["multiply-adds", "matmul", "forward", "backward"]
    assert found[0][3] == "100"
    assert all(float(m[2]) > 0 for m in found)
