"""The benchmark: its arithmetic on made-up times, its rows at tiny shapes. Nothing here asserts a speed."""

import csv
import io
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_sparse import __version__
from dit_sparse.kernels import bench
from dit_sparse.kernels.bench import COLUMNS, SHAPES, Case, Row, Shape, compared, measure, memory, write_csv
from dit_sparse.kernels.contenders import CONTENDERS, DEFAULT, DENSE, chosen

TINY = Case(Shape(200, 2, 24, (64, 32)), density=0.4)


def by_contender(rows: list[Row]) -> dict[str, Row]:
    return {row.contender: row for row in rows}


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that gets twice as slow with each round, and a contender that is 4 times as fast as dense."""
    dense = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    row = compared(dense / 4, dense, density=0.2)
    assert row["rounds"] == 5
    assert row["speedup"] == pytest.approx(4)
    assert [row[name] for name in ("eta_p20", "eta", "eta_p80")] == pytest.approx([0.8, 0.8, 0.8])
    assert [row[name] for name in ("p20_ms", "p50_ms", "p80_ms")] == pytest.approx([450, 1000, 2400])
    assert row["dense_p50_ms"] == pytest.approx(4000)


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    dense, taken = torch.tensor([[2.0, 9.0, 4.0], [1.0, 1.0, 4.0]], dtype=torch.float64)
    row = compared(taken, dense, density=0.5)
    assert row["speedup"] == pytest.approx(2)
    assert row["eta"] == pytest.approx(1)
    assert row["eta_p80"] == pytest.approx(0.5 * (2 + 0.6 * 7))


def test_dense_has_no_eta_and_without_dense_there_are_no_ratios() -> None:
    taken = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    assert "eta" not in compared(taken, taken, density=None)
    assert compared(taken, taken, density=None)["speedup"] == 1
    assert set(compared(taken, None, density=0.5)) == {"rounds", "p20_ms", "p50_ms", "p80_ms"}


def test_contenders_alternate_and_the_order_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 1e-12)
    log: list[str] = []
    calls = {name: lambda name=name: log.append(name) for name in "abc"}
    times = bench.alternate(calls, 0, lambda: None)
    assert "".join(log) == "abc" + "abc" + "cba" + "abc" + "cba" + "abc"
    assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abc", bench.MIN_ROUNDS)


def test_short_calls_are_repeated_and_one_call_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += 0.003

    times = bench.alternate({"a": call}, 0, lambda: None)
    assert times["a"].tolist() == pytest.approx([0.003] * bench.MIN_ROUNDS)
    assert clock[0] == pytest.approx(0.003 + bench.MIN_ROUNDS * 4 * 0.003)


def test_every_contender_computes_the_plan_or_says_why_not() -> None:
    """On lengths that no block divides. The rms error is to a loop of dense calls in float64."""
    if chosen("auto", "cpu") != ["cpu"]:
        pytest.skip("no C++ compiler")
    rows = by_contender(measure(TINY, CONTENDERS, seconds=0))
    assert list(rows) == list(CONTENDERS)
    elsewhere = {"triton", "flash-attn", "spas-sage-attn"}
    for name, row in rows.items():
        assert bool(row.note) == (name in elsewhere), row.note
        assert (row.p50_ms is None) == (name in elsewhere)
        if name not in DENSE | elsewhere:
            assert 0 < row.rms_error < 2e-6
            assert row.eta == pytest.approx(row.density * row.speedup)
            assert row.eta_p20 <= row.eta <= row.eta_p80
            assert row.dense_p50_ms == rows["dense"].p50_ms
    assert rows["dense"].speedup == 1
    assert rows["dense"].eta is None
    assert "needs tensors on a GPU" in rows["triton"].note


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "spas_sage_attn", None)
    rows = by_contender(measure(TINY, ("flash-attn", "spas-sage-attn"), seconds=0))
    assert rows["dense"].p50_ms > 0
    assert rows["flash-attn"].note == "flash_attn is not installed"
    assert rows["spas-sage-attn"].p50_ms is None


def test_backward_is_a_direction_of_its_own() -> None:
    rows = by_contender(measure(TINY, ("gathered", "sdpa-loop", "flex"), backward=True, seconds=0))
    assert {row.direction for row in rows.values()} == {"forward+backward"}
    assert rows["gathered"].p50_ms > 0
    assert rows["sdpa-loop"].eta > 0
    assert "flex gives no gradients on the CPU" in rows["flex"].note


def test_a_contender_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(plan: object, tokens: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def wrapped(plan: object, tokens: int) -> None:
        raise RuntimeError("a compiler's wrapping") from ValueError("the reason\nand more")

    def detached(plan: object, tokens: int) -> bench.Attention:
        return lambda q, k, v: q.detach()

    for name, contender in (("dense", exhausted), ("flex", wrapped), ("triton", detached)):
        monkeypatch.setitem(CONTENDERS, name, contender)
    rows = by_contender(measure(TINY, ("gathered", "flex", "triton"), backward=True, seconds=0))
    assert rows["dense"].note == "out of memory"
    assert rows["flex"].note == "ValueError: the reason"
    assert rows["triton"].note == "ValueError: gives no gradients"
    assert rows["gathered"].p50_ms > 0
    assert rows["gathered"].speedup is None
    assert all(row.density == rows["gathered"].density for row in rows.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (128, 128)], ids=str)
def test_on_a_gpu(block: tuple[int, int], backward: bool) -> None:
    case = Case(Shape(3000, 2, 128, block), 0.3, "cuda", "bfloat16")
    names = chosen(DEFAULT["cuda"], "cuda", backward=backward)
    rows = by_contender(measure(case, names, backward=backward, seconds=0))
    for name in ("dense", *chosen("auto,flexattention", "cuda", backward=backward)):
        assert not rows[name].note
        assert rows[name].peak_mib >= 3000 * 2 * 128 * 2 / 2**20
        assert name == "dense" or rows[name].rms_error < 8e-3


def test_auto_is_named_once() -> None:
    assert chosen("auto,cpu,gathered", "cpu") in (["cpu", "gathered"], ["gathered", "cpu"])


def test_the_named_shapes() -> None:
    tokens = {name: [shape.tokens for shape in shapes] for name, shapes in SHAPES.items()}
    assert tokens["wan2.1-14b-720p"] == [75_600]
    assert tokens["wan2.1-1.3b-480p"] == [32_760]
    assert tokens["hunyuanvideo-720p"] == [119_056]
    assert tokens["tiny-wan"] == [4_224]
    found = [(c.shape.tokens, c.shape.head_dim, c.shape.block[0], c.density) for c in bench.cases()]
    assert found == [
        (8192, 128, 128, 0.2),
        (8192, 128, 128, 0.5),
        (16384, 128, 128, 0.1),
        (4096, 64, 64, 0.25),
    ]


def test_options_replace_what_a_shape_brings() -> None:
    asked = bench.cases(shapes=("yardstick", "100,3,16"), densities=(0.1,), block="128x64", dtype="float16")
    assert [case.shape.block for case in asked] == [(128, 64)] * 4
    assert {(case.density, case.dtype) for case in asked} == {(0.1, "float16")}
    assert asked[-1].shape == Shape(100, 3, 16, (128, 64))


@pytest.mark.parametrize("pattern", ["random", "uneven"])
def test_plans_have_the_density_that_rows_report(pattern: str) -> None:
    case = Case(Shape(1000, 4, 16, (32, 48)), 0.3, pattern=pattern)
    plan = case.plan()
    assert plan.same(case.plan())
    assert (plan.counts.unique().numel() == 1) == (pattern == "random")
    assert plan.counts.min() >= 1
    keep = plan.to_blocks().repeat_interleave(32, 2)[:, :, :1000].repeat_interleave(48, 3)[..., :1000]
    assert case.density_of(plan) == pytest.approx(keep.double().mean().item())
    assert case.density_of(plan) == pytest.approx(0.3, abs=0.05)
    assert all(torch.equal(a, b) for a, b in zip(case.tensors(), case.tensors(), strict=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads Linux's /proc and trims glibc's heap")
def test_memory_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the most that was held, whatever was freed before. A huge page rounds up by 2 MiB."""

    def hundred(plan: object, tokens: int) -> bench.Attention:
        return lambda q, k, v: [torch.ones(100 << 18), torch.ones(40 << 18)][1]

    monkeypatch.setitem(CONTENDERS, "flex", hundred)
    rows = by_contender(memory(TINY, ("flex", "triton")))
    assert rows["flex"].peak_mib == pytest.approx(140, abs=6)
    assert rows["flex"].p50_ms is None
    assert rows["triton"].peak_mib is None
    assert "needs tensors on a GPU" in rows["triton"].note


def test_csv_there_and_back() -> None:
    rows = measure(TINY, ("gathered", "triton"), seconds=0)
    stream = io.StringIO()
    write_csv(stream, rows[:1])
    write_csv(stream, rows[1:], header=False)
    stream.seek(0)
    read = list(csv.DictReader(stream))
    assert [tuple(line) for line in read] == [COLUMNS] * 3
    for line, row in zip(read, rows, strict=True):
        for column, text in line.items():
            value = getattr(row, column)
            if isinstance(value, float):
                assert float(text) == pytest.approx(value, rel=1e-3)
            else:
                assert text == ("" if value is None else str(value))
    # STYLE's rule for a benchmark row.
    known = {"device", "commit", "torch", "triton", "threads", "B", "H", "S", "D", "block", "density"}
    assert all(line[column] for line in read for column in known)


def test_a_summary_shows_the_spread() -> None:
    row = Row(**dict.fromkeys(COLUMNS[:15], 1), p20_ms=1.0, p50_ms=2.0, p80_ms=3.0, note="a")
    cells = bench.summary(row)
    assert cells["ms (20-80 %)"] == "2 (1-3)"
    assert cells["eta (20-80 %)"] == ""
    assert cells["note"] == "a"


def test_the_commit_is_that_of_the_clone_or_else_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a clone of something else, as a virtual environment is, the version."""
    subprocess.run(("git", "init", "-q", tmp_path), check=True)
    copy = shutil.copy(bench.__file__, tmp_path / "bench.py")
    monkeypatch.setattr(bench, "__file__", copy)
    assert bench._commit() == __version__
    git = ("git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run((*git, "add", "bench.py"), check=True)
    subprocess.run((*git, "commit", "-q", "-m", "a"), check=True)
    head = subprocess.check_output((*git, "rev-parse", "--short", "HEAD"), text=True).strip()
    assert bench._commit() == head
    Path(copy).write_text("")
    assert bench._commit() == f"{head}-dirty"
