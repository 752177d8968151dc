"""What the Triton forward kernel promises beyond the conformance suite of ``test_block_sparse_attention.py``.

The kernel itself is tested in a process under TRITON_INTERPRET=1: ``test_under_the_interpreter`` starts one.
"""

import json
import subprocess
import sys
from itertools import product

import pytest
import torch
from interpreter import INTERPRETED, run_under_interpreter

triton = pytest.importorskip("triton")

from dit_sparse.kernels import block_sparse as triton_backend  # noqa: E402
from dit_sparse.kernels.block_sparse import Tiles, _launch, _stages, gathered, parts, schedule, tiles  # noqa: E402
from dit_sparse.kernels.lists import row_lists  # noqa: E402
from dit_sparse.kernels.ops import block_sparse_attention  # noqa: E402
from dit_sparse.kernels.targets import TARGETS  # noqa: E402
from dit_sparse.layout import TokenLayout  # noqa: E402
from dit_sparse.order import Order  # noqa: E402
from dit_sparse.plan import Plan  # noqa: E402

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs where kernels take CPU tensors")
compiled = pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")


def rms(x):
    return x.double().square().mean().sqrt().item()


def qkv(tokens, head_dim, batch=1, heads=2, kv_heads=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, h, tokens, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def random_plan(lead, tokens, block):
    g = torch.Generator().manual_seed(1)
    rows, columns = (-(-tokens // b) for b in block)
    keep = torch.rand(*lead, rows, columns, generator=g) < 0.6
    keep[..., 0, :], keep[..., -1, :] = True, False
    return Plan.from_blocks(keep, block)


def agrees(got, q, k, v, plan, valid=None):
    """Within the conformance suite's bounds of float32."""
    doubles = [x.double() for x in (q, k, v)]
    want, want_lse = block_sparse_attention(*doubles, plan, valid=valid, backend="reference")
    out, lse = got
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert rms(out - want) <= 2e-6 * rms(want)
    assert rms((lse - want_lse)[~empty]) <= 5e-6 * rms(want_lse[~empty])


@pytest.fixture
def poisoned(monkeypatch):
    empty = torch.empty

    def fill(*args, **options):
        x = empty(*args, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", fill)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The file of tuned tiles, in a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    triton_backend._tuned.cache_clear()
    yield tmp_path / "dit_sparse" / "block_sparse.json"
    triton_backend._tuned.cache_clear()


ORDERS = {
    "tiles with holes": lambda layout: Order.tiles(layout, (2, 4, 4)),
    "text first": lambda layout: Order.curve(layout, 32),
    "one per head": lambda layout: Order.stack([Order.axes(layout, o, 32) for o in ("hwf", "whf")]),
}


@interpreted
@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("padded", [False, True])
def test_gathered_is_attention_between_apply_and_undo(name, padded, poisoned):
    layout = TokenLayout((3, 5, 7), text=13, text_first=name == "text first")
    order = ORDERS[name](layout)
    q, k, v = qkv(layout.sequence, 40, batch=2, heads=4, kv_heads=2)
    plan = random_plan((2, 4), order.slots, (32, 64))
    absent = torch.zeros(2, layout.sequence, dtype=torch.bool)
    absent[1, 20:40] = True
    valid = order.valid(~absent if padded else None)
    ordered = [order.apply(x) for x in (q, k, v)]
    want, want_lse = block_sparse_attention(*ordered, plan, valid=valid, backend="triton")
    out, lse = gathered(q, k, v, plan, order.index, valid=valid if padded else None)
    torch.testing.assert_close(out, order.undo(want))
    torch.testing.assert_close(lse, order.undo(want_lse[..., None])[..., 0])


@interpreted
def test_gathered_says_which_blocks_do_not_fit():
    q, k, v = qkv(63, 16)
    with pytest.raises(ValueError, match="4 query blocks of 16, but 80 slots fill 5"):
        gathered(q, k, v, random_plan((1, 1), 63, (16, 16)), torch.arange(80)[None])


@interpreted
@pytest.mark.parametrize("tokens", [63, 127, 500])
def test_packed_plans_are_read_as_plans(tokens, poisoned):
    q, k, v = qkv(tokens, 24)
    plan = random_plan((1, 2), tokens, (32, 16))
    for got, want in zip(
        block_sparse_attention(q, k, v, plan.pack(), backend="triton"),
        block_sparse_attention(q, k, v, plan, backend="triton"),
        strict=True,
    ):
        assert torch.equal(got, want)


@interpreted
def test_absent_keys_are_never_read(poisoned):
    q, k, v = qkv(200, 40)
    plan = random_plan((1, 2), 200, (64, 64))
    valid = torch.rand(1, 2, 200, generator=torch.Generator().manual_seed(2)) < 0.7
    dirty = [x.masked_fill(~valid[..., None], float("nan")) for x in (k, v)]
    out = block_sparse_attention(q, *dirty, plan, valid=valid, backend="triton")
    agrees(out, q, k, v, plan, valid)


@interpreted
@pytest.mark.parametrize("head_dim", [3, 72, 80, 96, 160, 224])
def test_head_dims_between_powers_of_two(head_dim, poisoned):
    q, k, v = qkv(100, head_dim, heads=1, kv_heads=1)
    plan = random_plan((1, 1), 100, (64, 32))
    agrees(block_sparse_attention(q, k, v, plan, backend="triton"), q, k, v, plan)


@interpreted
@pytest.mark.parametrize("cut", [Tiles(64, 32, 4, 1, tma=True), Tiles(64, 32, 4, 1, True, True)], ids=str)
@pytest.mark.parametrize("head_dim", [80, 37])
def test_descriptors_and_specialized_warps_compute_the_same(cut, head_dim, poisoned):
    q, k, v = qkv(200, head_dim)  # rows of 37 floats cannot be described
    plan = random_plan((1, 2), 200, (64, 64))
    got = _launch(q, k, v, row_lists(plan, 200), plan.block, None, head_dim**-0.5, own=cut)
    agrees(got, q, k, v, plan)


@interpreted
def test_ops_are_registered_in_full():
    q, k, v = qkv(63, 16, heads=4)
    plan = random_plan((1, 1), 63, (32, 16))
    valid = torch.arange(63).expand(1, 1, -1) < 50
    blocks = (plan.indices, plan.counts, *plan.block)
    torch.library.opcheck(
        torch.ops.dit_sparse.gathered_triton, (q, q, q, torch.arange(63)[None], *blocks, None, 0.25)
    )
    op = torch.ops.dit_sparse.block_sparse_attention_triton
    for mask in (None, valid):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(op, (*leaves, *blocks, plan.keys, mask, 0.25))
    run = torch.compile(
        lambda q: block_sparse_attention(q, k, v, plan, valid=valid, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    agrees(run(q), q, k, v, plan, valid)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3)])
def test_schedule_has_each_row_once_longest_first(batch, heads):
    counts = torch.randint(
        0, 300, (1, heads, 50), generator=torch.Generator().manual_seed(3), dtype=torch.int32
    )
    order = schedule(counts, batch, heads)
    assert torch.equal(order.sort().values, torch.arange(batch * heads * 50, dtype=torch.int32))
    sizes = [int(n).bit_length() for n in counts.expand(batch, -1, -1).flatten()[order.long()]]
    assert sizes == sorted(sizes, reverse=True)
    # Rows alike stay in the order of their heads.
    assert torch.equal(schedule(torch.full_like(counts, 7), batch, heads), order.sort().values)


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_parts_hold_every_column_once(target):
    for head_dim in range(1, 257):
        for itemsize, queries in product((2, 4), (16, 64, 128)):
            cut = parts(target, head_dim, itemsize, queries)
            widths = [width for _, _, width in cut]
            assert [part[:2] for part in cut] == [(i, sum(widths[:i])) for i in range(len(widths))]
            waste = head_dim if itemsize == 4 else head_dim / 3 + 16
            assert head_dim <= sum(widths) < max(17, head_dim + waste)
            assert all(width >= 16 and width & (width - 1) == 0 for width in widths)


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_tiles_fit_blocks(target):
    for head_dim, itemsize, block in ((128, 2, (64, 128)), (40, 4, (16, 24)), (256, 2, (1, 1000))):
        cut = tiles(target, head_dim, itemsize, block)
        assert cut.queries <= max(16, triton.next_power_of_2(block[0]))
        assert cut.keys <= max(16, triton.next_power_of_2(block[1]))
        assert not cut.tma
        assert not cut.specialize
        assert _stages(cut, gather=True) > _stages(cut, gather=False) > 1


def test_tuned_tiles_are_used(cache):
    q = torch.zeros(1, 1, 64, 48)
    cut = Tiles(32, 16, 2, 1)
    assert triton_backend.tiles_for(q, (64, 64)) == tiles(TARGETS["sm_89"], 48, 4, (64, 64))
    cache.parent.mkdir()
    cache.write_text(json.dumps({"cpu": {"float32 D48 64x64": cut._asdict()}}))
    triton_backend._tuned.cache_clear()
    assert triton_backend.tiles_for(q, (64, 64)) == cut
    assert triton_backend.tiles_for(q, (64, 32)) == tiles(TARGETS["sm_89"], 48, 4, (64, 32))


@pytest.mark.parametrize("text", ["{", "[]", '{"cpu": {"float32 D48 64x64": {"rows": 1}}}'])
def test_a_broken_file_of_tuned_tiles_is_named(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.raises(ValueError, match=r"block_sparse\.json does not hold tiles .*: delete it"):
        triton_backend.tiles_for(torch.zeros(1, 1, 64, 48), (64, 64))


@interpreted
def test_tune_keeps_the_fastest(cache, monkeypatch):
    tried = []

    def do_bench(run):
        tried.append(run.keywords["own"])
        if len(tried) == 2:
            raise triton.runtime.OutOfResources(2, 1, "shared memory")
        run()
        return 1 / tried[-1].keys

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(triton_backend, "_candidates", lambda *_: [Tiles(32, n, 4, 1) for n in (16, 64, 32)])
    shape = {"tokens": 64, "heads": 1, "device": "cpu"}
    best = triton_backend.tune(32, (32, 64), torch.float32, **shape)
    assert best == Tiles(32, 32, 4, 1)
    assert [cut.keys for cut in tried] == [16, 64, 32]
    triton_backend._tuned.cache_clear()
    assert triton_backend.tiles_for(torch.zeros(1, 1, 64, 32), (32, 64)) == best
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]
    monkeypatch.setattr(triton_backend, "_candidates", lambda *_: [])
    with pytest.raises(RuntimeError, match="no tiles work for float32 D32 32x64 on cpu"):
        triton_backend.tune(32, (32, 64), torch.float32, **shape)


@compiled
def test_descriptors_and_specialized_warps_compile():
    command = [sys.executable, "-m", "dit_sparse.kernels.aot", "--kernel", "block_sparse"]
    command += ["--targets", "sm_90,sm_100", "--label", "tma"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" tma]") == 2
    assert done.stdout.count(" tma specialized]") == 1


@compiled
def test_under_the_interpreter():
    run_under_interpreter(__file__)
