"""Quantised attention: the emulation against float64, and the Triton kernels against the emulation.

Without a GPU the kernels run in a process under TRITON_INTERPRET=1, which one of these tests starts. The
interpreter multiplies int8 and float8 as it should, but converts float32 to e4m3 wrongly (a carry never
reaches the exponent): PyTorch's conversion takes its place there. So untested without a GPU are the GPU's own
conversion to e4m3, and its sums of float8 products, made in fewer bits than float32 has. Compilation, spills
and tensor cores are checked along with those of all kernels, in ``test_aot.py``.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interpreter import INTERPRETED, run_under_interpreter

from dit_sparse.kernels import (
    block_sparse_attention,
    merge,
    quant_error,
    quant_reference,
    quantized_block_sparse_attention,
)
from dit_sparse.kernels.quant_ops import LIMITS, PV, QK, STORED, WEIGHT_OF_ONE, per_kv_head
from dit_sparse.kernels.targets import TARGETS
from dit_sparse.plan import Plan

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [
    *([pytest.param("cpu", id="triton")] if INTERPRETED else []),
    pytest.param("cuda", id="triton-cuda", marks=GPU),
]
FORMATS = list(itertools.product(QK, PV))
# RMS of the difference between kernel and emulation over RMS of the output: both round the weights, but under
# other peaks. 1.5 times the most that the interpreter gives for CASES: 2.7e-4, 2.1e-2 and 1.34e-2.
WEIGHT_BOUND = {"fp16": 4.1e-4, "fp8": 3.1e-2, "int8": 2e-2}


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison; ``plan`` and ``valid`` are the (batch, heads) of those two."""

    queries: int
    keys: int
    head_dim: int
    block: tuple[int, int]
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    plan: tuple[int, int] = (1, 1)
    valid: tuple[int, int] | None = None

    def __str__(self):
        sizes = f"{self.queries}x{self.keys}-D{self.head_dim}-block{self.block[0]}x{self.block[1]}"
        return f"{sizes}-H{self.heads}of{self.kv_heads}" + (
            "" if self.valid is None else f"-valid{self.valid[1]}"
        )


CASES = [
    Case(63, 127, 64, (32, 32), batch=2, heads=4, kv_heads=2, plan=(2, 4), valid=(2, 1)),
    Case(200, 300, 128, (128, 64), heads=4, kv_heads=2, valid=(1, 2)),
    Case(127, 127, 24, (24, 40), batch=2, heads=4, kv_heads=1, plan=(2, 1), valid=(2, 4)),
    Case(330, 330, 160, (160, 160), heads=1, kv_heads=1),
    Case(20, 96, 3, (1, 16), plan=(1, 2)),
]


def make(case, dtype=torch.float16, device="cpu", seed=0):
    """q, k, v, plan and valid of a case. Row 1 of the plan is empty, and key block 1 is all holes."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(case.batch, case.heads, case.queries, case.head_dim, generator=g)
    k, v = (torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim, generator=g) for _ in range(2))
    k += 2  # something to smooth
    rows, columns = -(-case.queries // case.block[0]), -(-case.keys // case.block[1])
    keep = torch.rand(*case.plan, rows, columns, generator=g) < 0.6
    keep[:, :, 0] = True
    keep[0, 0, 1] = False
    valid = None
    if case.valid is not None:
        valid = torch.rand(*case.valid, case.keys, generator=g) < 0.8
        valid[0, :, case.block[1] : 2 * case.block[1]] = False
        valid[..., : case.block[1]] = True
    plan = Plan.from_blocks(keep, case.block).to(device)
    tensors = [x.to(device, dtype) for x in (q, k, v)]
    return *tensors, plan, None if valid is None else valid.to(device)


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.fixture(autouse=True)
def interpreter_converts_to_float8(monkeypatch):
    if not INTERPRETED:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def correct(x, source, target, mode):
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.tensor(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", correct)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, in int8 127: a kernel that forgets to write shows."""
    empty = torch.empty

    def fill(*shape, dtype=torch.float32, **options):
        x = empty(*shape, dtype=dtype, **options)
        if dtype == torch.int32:
            return x
        return x.fill_(float("nan")) if x.element_size() > 1 else x.view(torch.uint8).fill_(127).view(dtype)

    monkeypatch.setattr(torch, "empty", fill)


def dequantized(case, q, k, v, valid, qk, pv):
    """Rounded q, k and v in float64, spelled out group by group, and the mean that k has lost."""
    group = case.heads // case.kv_heads
    q, k, v = q.double(), k.double(), v.double()
    mean = torch.zeros(case.batch, case.kv_heads, 1, case.head_dim, dtype=torch.float64)
    there = torch.ones(1, 1, case.keys, dtype=torch.bool) if valid is None else valid
    if there.shape[1] not in (1, case.kv_heads):
        there = there.unflatten(1, (case.kv_heads, group)).any(2)
    there = there.expand(case.batch, case.kv_heads, -1)

    def grid(x, kind):
        peak = x.abs().max().item() if x.numel() else 0.0
        unit = peak / LIMITS[kind] or 1.0
        scaled = x / unit
        return (scaled.round() if kind == "int8" else scaled.float().to(STORED[kind]).double()) * unit

    for b, h in itertools.product(range(case.batch), range(case.kv_heads)):
        some = there[b, h]
        mean[b, h] = k[b, h, some].mean(0, keepdim=True)
        k[b, h] -= mean[b, h]
        for d in range(case.head_dim):
            v[b, h, some, d] = grid(v[b, h, some, d], pv)
        for x, marks, block in (
            *(
                (q[b, h * group + i], torch.ones(case.queries, dtype=torch.bool), case.block[0])
                for i in range(group)
            ),
            (k[b, h], some, case.block[1]),
        ):
            starts = [
                s for first in range(0, len(x), block) for s in range(first, min(first + block, len(x)), 128)
            ]
            for start in starts:
                end = min(start + 128, (start // block + 1) * block, len(x))
                mine = torch.arange(start, end)[marks[start:end]]
                x[mine] = grid(x[mine], qk)
    return q, k, v, mean


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("qk", QK)
def test_reference_rounds_group_by_group(case, qk):
    """Float16 weights hardly round, so the emulation is attention over the rounded q, k and v."""
    q, k, v, plan, valid = make(case)
    rounded_q, rounded_k, rounded_v, mean = dequantized(case, q, k, v, valid, qk, "fp16")
    want, want_lse = block_sparse_attention(
        rounded_q, rounded_k, rounded_v, plan, valid=valid, scale=0.1, backend="reference"
    )
    lost = (q.double() * mean.repeat_interleave(case.heads // case.kv_heads, 1)).sum(-1) * 0.1
    out, lse = quantized_block_sparse_attention(
        q.float(), k.float(), v.float(), plan, qk=qk, valid=valid, scale=0.1, backend="reference"
    )
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    # A float32 sum here, a float64 sum there: now and then a number rounds the other way.
    assert rms(out - want) <= 2e-3 * rms(want)
    assert rms((lse - want_lse - lost)[~empty]) <= 1e-3


def step(x, kind):
    """Distance of neighbouring numbers at x, where 1 is the unit of the format."""
    if kind == "int8":
        return torch.ones_like(x)
    bits, smallest = {"fp8": (3, -6), "fp16": (10, -14)}[kind]
    exponent = x.abs().clamp(min=2.0**-60).log2().floor().clamp(min=smallest)
    return 2.0 ** (exponent - bits)


def predicted(q, k, v, plan, qk, pv):
    """RMS over RMS of the output's error to first order: every rounded number is off by step / sqrt(12)."""
    keep = plan.to_blocks().repeat_interleave(plan.block[0], -2).repeat_interleave(plan.block[1], -1)
    k = k - k.mean(2, keepdim=True)
    scale = q.shape[-1] ** -0.5
    p = (q @ k.mT * scale).masked_fill(~keep, float("-inf")).softmax(-1)
    out = p @ v

    def variance(x, dims, kind):
        """Of the rounding error of each number of x, which shares its scale over ``dims`` of tiles."""
        unit = x.abs().amax(dims, keepdim=True) / LIMITS[kind]
        return (step(x / unit, kind) * unit).square() / 12

    def rows(x, block):
        return variance(x.unflatten(2, (-1, block)), (-1, -2), qk).flatten(2, 3)

    of_scores = (q.square() @ rows(k, plan.block[1]).mT + rows(q, plan.block[0]) @ k.square().mT) * scale**2
    relative = p / p.amax(-1, keepdim=True)
    of_weights = (step(relative * WEIGHT_OF_ONE[pv], pv) / WEIGHT_OF_ONE[pv]).square() / 12
    # What is rounded away altogether is off by itself.
    of_weights = torch.minimum(of_weights, relative.square()) * p.amax(-1, keepdim=True).square()
    # A score moves a weight against all others, so its value counts from the output.
    square, own = v.square(), p.square() * of_scores
    moved = own @ square - 2 * out * (own @ v) + out.square() * own.sum(-1, keepdim=True)
    error = moved + of_weights @ square + p.square() @ variance(v, (2,), pv)
    return error.mean().sqrt().item() / rms(out)


@pytest.mark.parametrize(("qk", "pv"), FORMATS)
@pytest.mark.parametrize("data", ["normal", "outliers"])
def test_error_is_that_of_the_steps(data, qk, pv):
    """With smoothing; the seeds are fixed, so 10 % are room for the first order only."""
    q, k, v, plan = quant_error.inputs(data, 64)
    q, k, v = (x.double() for x in (q, k, v))
    want, _ = block_sparse_attention(q, k, v, plan, backend="reference")
    out, _ = quantized_block_sparse_attention(q.float(), k.float(), v.float(), plan, qk=qk, pv=pv)
    assert rms(out - want) / rms(want) == pytest.approx(predicted(q, k, v, plan, qk, pv), rel=0.1)


@pytest.fixture(scope="module")
def measured():
    return quant_error.measure(64)


def test_smoothing_removes_outlier_channels(measured):
    rows = {(r.data, r.qk, r.pv): r for r in measured}
    for qk, pv in FORMATS:
        plain, outliers = rows["normal", qk, pv], rows["outliers", qk, pv]
        # Biases leave k coarser only by what bfloat16 inputs lost to them.
        assert outliers.out <= 1.05 * plain.out
        assert outliers.lse <= 1.05 * plain.lse
        assert outliers.lse_raw >= 10 * outliers.lse
    assert rows["outliers", "int8", "fp16"].out_raw >= 2 * rows["outliers", "int8", "fp16"].out


def test_the_page_is_what_its_command_prints(measured):
    page = (Path(quant_error.__file__).parent / "QUANTIZATION.md").read_text()
    assert page.startswith(quant_error.INTRODUCTION)
    found = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| 64 \|", line)]
    assert len(found) == len(measured)
    for cells, row in zip(found, measured, strict=True):
        assert cells[:4] == [str(x) for x in row[:4]]
        # Two digits are printed, and sums depend on the machine.
        assert [float(x) for x in cells[4:]] == pytest.approx(row[4:], rel=0.06)


@pytest.mark.parametrize("qk", QK)
def test_lse_merges_with_that_of_other_attention(qk):
    """Half of the blocks quantised, half not: nothing but the quantisation error remains."""
    q, k, v, plan = quant_error.inputs("outliers", 64)
    keep = torch.ones_like(plan.to_blocks())
    half = torch.arange(keep.shape[-1]) % 2 == 0
    want, want_lse = block_sparse_attention(q, k, v, Plan.from_blocks(keep, plan.block), backend="reference")
    ours = quantized_block_sparse_attention(q, k, v, Plan.from_blocks(keep & half, plan.block), qk=qk)
    theirs = block_sparse_attention(q, k, v, Plan.from_blocks(keep & ~half, plan.block), backend="reference")
    out, lse = merge([ours[0], theirs[0]], [ours[1], theirs[1]])
    assert rms(out - want) <= 0.05 * rms(want)
    assert rms(lse - want_lse) <= 0.01


def check_holes(device, qk, pv):
    q, k, v, plan, valid = make(CASES[2], device=device)
    want = quantized_block_sparse_attention(q, k, v, plan, qk=qk, pv=pv, valid=valid)
    nowhere = ~valid.any(1, keepdim=True)
    for x in (k, v):
        x.masked_fill_(nowhere[..., None], float("nan"))
    got = quantized_block_sparse_attention(q, k, v, plan, qk=qk, pv=pv, valid=valid)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("qk", "pv"), FORMATS)
def test_holes_touch_nothing(qk, pv):
    check_holes("cpu", qk, pv)


def check_zeros(device, backend, qk, pv):
    """Nothing to scale by: equal weights, and 0 for values of 0."""
    x = torch.zeros(1, 1, 96, 32, device=device, dtype=torch.float16)
    valid = torch.ones(1, 1, 96, dtype=torch.bool, device=device)
    valid[..., 40:70] = False
    plan = Plan.from_blocks(torch.ones(3, 3, dtype=torch.bool), 32).to(device)
    out, lse = quantized_block_sparse_attention(x, x, x + 3, plan, qk=qk, pv=pv, valid=valid, backend=backend)
    torch.testing.assert_close(out, x + 3, atol=0.2 if pv == "int8" else 1e-3, rtol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 66).log(), atol=1e-5, rtol=0)
    out, _ = quantized_block_sparse_attention(x, x, x, plan, qk=qk, pv=pv, backend=backend)
    assert not out.any()


@pytest.mark.parametrize(("qk", "pv"), FORMATS)
def test_zeros(qk, pv):
    check_zeros("cpu", "reference", qk, pv)


@pytest.mark.parametrize("cause", ["plan", "valid"])
def test_nothing_to_read(cause):
    q, k, v, plan, _ = make(CASES[4])
    valid = torch.full((1, 1, 96), cause == "plan")
    if cause == "plan":
        plan = Plan.from_blocks(torch.zeros(20, 6, dtype=torch.bool), (1, 16))
    out, lse = quantized_block_sparse_attention(q, k, v, plan, valid=valid)
    assert not out.any()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_and_inputs(dtype):
    q, k, v, plan, valid = make(CASES[0], dtype)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out, lse = quantized_block_sparse_attention(*strided, plan.pack(), valid=valid)
    want, want_lse = quantized_block_sparse_attention(q, k, v, plan, valid=valid)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()


ERRORS = {
    "qk": ({"qk": "fp16"}, "qk must be one of int8, fp8, got 'fp16'"),
    "pv": ({"pv": "bf16"}, "pv must be one of fp16, fp8, int8, got 'bf16'"),
    "backend": ({"backend": "flex"}, "backend must be one of auto, reference, triton, got 'flex'"),
    "scale": ({"scale": 0.0}, "above zero, got 0.0"),
    "float64": (
        {n: torch.zeros(1, 2, 20, 3).double() for n in "qkv"},
        "float16, bfloat16 or float32, got float64",
    ),
    "gradients": (
        {"q": torch.zeros(1, 2, 20, 3).half().requires_grad_()},
        r"no gradients: use torch.no_grad\(\)",
    ),
    "rule": (
        {"plan": Plan.from_blocks(torch.ones(20, 2, dtype=torch.bool), (1, 16), max)},
        "reads whole blocks, got a plan with the rule",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_came_and_what_was_expected(name):
    change, message = ERRORS[name]
    q, k, v, _, _ = make(Case(20, 20, 3, (1, 16)))
    plan = Plan.from_blocks(torch.ones(20, 2, dtype=torch.bool), (1, 16))
    with pytest.raises(ValueError, match=message):
        quantized_block_sparse_attention(**({"q": q, "k": k, "v": v, "plan": plan} | change))


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_triton_refuses_cpu_tensors():
    pytest.importorskip("triton")
    q, k, v, plan, _ = make(CASES[4])
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        quantized_block_sparse_attention(q, k, v, plan, backend="triton")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", QK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_quantises_as_the_reference(case, kind, device, poisoned):
    """To the bit, without smoothing: sums over tokens, and so means, depend on their order."""
    from dit_sparse.kernels import quant

    q, k, v, _, valid = make(case, device=device)
    there = None if valid is None else per_kv_head(valid, case.kv_heads)
    made = quant.quantize(q, k, v, there, case.block, qk=kind, pv=kind, smooth_k=False)
    keys, values = (
        x.float() if there is None else x.float().masked_fill(~there[..., None], 0) for x in (k, v)
    )
    for x, block, got, got_unit in (
        (q.float(), case.block[0], made.q, made.q_scale),
        (keys, case.block[1], made.k, made.k_scale),
    ):
        want, unit = quant_reference.quantize_rows(x, block, kind)
        assert torch.equal(got[:, :, :, :block, : case.head_dim].float(), want.float())
        assert not got[:, :, :, block:].float().any()
        assert not got[..., case.head_dim :].float().any()
        assert torch.equal(got_unit.repeat_interleave(128, -1)[..., :block, None], unit)
    want, unit = quant_reference.quantize_channels(values, kind)
    want = F.pad(want.float(), (0, 0, 0, -case.keys % case.block[1])).unflatten(2, (-1, case.block[1]))
    # Tokens lie in the order in which a product of two tiles finds its left operand in registers.
    plain = made.v.float().unflatten(-1, (-1, 4, 2, 2)).transpose(-2, -3).flatten(-4)
    assert torch.equal(plain[..., : case.head_dim, : case.block[1]].mT, want)
    torch.testing.assert_close(made.v_scale, unit[:, :, 0].repeat_interleave(case.heads // case.kv_heads, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("qk", "pv"), FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_agrees_with_the_reference(case, qk, pv, device, poisoned):
    q, k, v, plan, valid = make(case, device=device)
    formats = {"qk": qk, "pv": pv, "valid": valid}
    want, want_lse = quantized_block_sparse_attention(q, k, v, plan, **formats, backend="reference")
    out, lse = quantized_block_sparse_attention(q, k, v, plan, **formats, backend="triton")
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    assert rms(out - want) <= WEIGHT_BOUND[pv] * rms(want)
    # A mean summed in another order can round a few numbers of k the other way.
    assert rms((lse - want_lse)[~empty]) <= 3e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("qk", QK)
@pytest.mark.parametrize("pv", ["fp8", "int8"])
def test_triton_rounds_weights_as_the_reference(qk, pv, device):
    """Where a row reads a single tile, both know its peak: the same weights, but for ties."""
    q, k, v, _, _ = make(Case(100, 150, 64, (32, 32)), device=device)
    plan = Plan.from_blocks(torch.eye(4, 5, dtype=torch.bool), 32).to(device)
    want, _ = quantized_block_sparse_attention(
        q, k, v, plan, qk=qk, pv=pv, smooth_k=False, backend="reference"
    )
    out, _ = quantized_block_sparse_attention(q, k, v, plan, qk=qk, pv=pv, smooth_k=False, backend="triton")
    assert rms(out - want) <= 1e-3 * rms(want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_takes_other_dtypes_and_strides(dtype, device):
    q, k, v, plan, valid = make(CASES[0], dtype, device)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    want, _ = quantized_block_sparse_attention(q, k, v, plan, valid=valid, backend="reference")
    out, lse = quantized_block_sparse_attention(*strided, plan, valid=valid, backend="triton")
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert rms(out - want) <= (WEIGHT_BOUND["fp16"] + (2**-8 if dtype == torch.bfloat16 else 0)) * rms(want)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU its own configuration is tested")
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_triton_configurations_of_other_gpus(name, monkeypatch):
    """Tile sizes, split values and, on sm_80, integers that become floats by addition."""
    from dit_sparse.kernels import quant

    monkeypatch.setattr(quant, "target_of", lambda device: TARGETS[name])
    q, k, v, plan, valid = make(CASES[1])
    for pv in ("fp16", "int8"):
        want, _ = quantized_block_sparse_attention(q, k, v, plan, pv=pv, valid=valid, backend="reference")
        out, _ = quantized_block_sparse_attention(q, k, v, plan, pv=pv, valid=valid, backend="triton")
        assert rms(out - want) <= WEIGHT_BOUND[pv] * rms(want)


@pytest.mark.skipif(not INTERPRETED, reason="needs a process that may pretend to have another GPU")
@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_triton_refuses_float8_where_there_is_none(name, monkeypatch):
    from dit_sparse.kernels import quant

    monkeypatch.setattr(quant, "target_of", lambda device: TARGETS[name])
    q, k, v, plan, _ = make(CASES[4])
    with pytest.raises(ValueError, match=r"'fp8' needs an NVIDIA GPU of compute capability 8\.9"):
        quantized_block_sparse_attention(q, k, v, plan, pv="fp8", backend="triton")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("qk", "pv"), FORMATS)
def test_triton_has_nothing_to_scale_by(qk, pv, device):
    check_zeros(device, "triton", qk, pv)


@pytest.mark.parametrize("device", DEVICES)
def test_triton_op(device):
    """Its schema and fake, and that a compiled caller stays whole."""
    from dit_sparse.kernels.quant import attention_op

    q, k, v, plan, valid = make(CASES[0], device=device)
    torch.library.opcheck(
        attention_op, (q, k, v, plan.indices, plan.counts, valid, list(plan.block), "int8", "fp16", True, 0.1)
    )

    def call(q, k, v):
        return quantized_block_sparse_attention(q, k, v, plan, valid=valid, backend="triton")

    want = call(q, k, v)
    for got, expected in zip(
        torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), want, strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_triton_under_the_interpreter():
    pytest.importorskip("triton")
    run_under_interpreter(__file__, "-k", "triton")
