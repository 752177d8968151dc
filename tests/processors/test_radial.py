"""Radial: the authors' masks bit for bit, a token-level construction, the rule's properties."""

import hashlib
import json
from dataclasses import replace
from itertools import product
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.plan import Plan
from dit_sparse.processors.radial import RadialProcessor

VECTORS = Path(__file__).parents[1] / "vectors" / "radial"


def select(method: RadialProcessor, layout: TokenLayout) -> Plan:
    q = torch.zeros(1, 1, layout.sequence, 1)
    return method.select(q, q, Call.standalone(layout))


def blocks(method: RadialProcessor, layout: TokenLayout) -> np.ndarray:
    return select(method, layout).to_blocks()[0, 0].numpy()


def density(method: RadialProcessor, layout: TokenLayout) -> float:
    filled = method.order(Call.standalone(layout)).filled(method.block)
    return select(method, layout).density(filled, filled)


def is_read(method: RadialProcessor, s: int, i: int, j: int) -> bool:
    """Whether a pair of frames survives decimation."""
    above = 2 ** s.bit_length()
    band = above / 2 ** abs(i - j).bit_length()
    if (j == 0 and method.sink) or band >= method.decimate_below:
        return True
    return abs(i - j) % int(method.decimate_below / band) == 0


def token_pairs(method: RadialProcessor, s: int, i: int, j: int) -> np.ndarray:
    """bool [s, s]: which keys of frame j each query of frame i may see, token by token."""
    d = abs(i - j)
    if not is_read(method, s, i, j):
        return np.zeros((s, s), dtype=bool)
    if j == 0 and method.sink:
        width = s
    elif d <= 1:
        width = s // 2 if d == 1 and method.variant == "v1" and method.sink else s
    else:
        width = max(2 ** s.bit_length() / 2 ** d.bit_length() * method.decay, method.block)
    return np.abs(np.arange(s)[:, None] - np.arange(s)) <= width


def slow_blocks(
    method: RadialProcessor,
    layout: TokenLayout,
    density: tuple[int, int] = (1, 3),
    share: tuple[int, int] = (3, 5),
) -> tuple[np.ndarray, int]:
    """The block mask out of token-level masks, and where its dense part starts. Thresholds are fractions."""
    frames, s, b = layout.grid[0], layout.frame, method.block
    n = -(-s // b)
    stride = n * b if method.variant == "aligned" else s
    total = -(-frames * stride // b) + -(-layout.extra // b)
    keep = np.zeros((total, total), dtype=bool)
    rows = np.minimum(b, s - np.arange(n) * b) if method.variant == "aligned" else np.full(n, b)
    for i, j in product(range(frames), repeat=2):
        row, column = i * stride % b, j * stride % b
        canvas = np.zeros((n * b + b, n * b + b), dtype=bool)
        canvas[row : row + s, column : column + s] = token_pairs(method, s, i, j)
        seen = canvas[: n * b, : n * b].reshape(n, b, n, b).sum(1)
        enough, some = (seen * density[1] > rows[:, None, None] * density[0]).sum(2), (seen > 0).sum(2)
        row, column = i * stride // b, j * stride // b
        keep[row : row + n, column : column + n] |= enough * share[1] > some * share[0]
    border = frames * stride // b
    keep[border:] = keep[:, border:] = True
    return keep, border


def methods(**fixed: st.SearchStrategy) -> st.SearchStrategy[RadialProcessor]:
    drawn = {
        "decay": st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.95, 1.0, 2.5]),
        "block": st.sampled_from([1, 4, 7, 8, 16]),
        "sink": st.booleans(),
        "variant": st.sampled_from(["aligned", "head", "v1"]),
        "decimate_below": st.sampled_from([0, 3, 8, 16, 128]),
    }
    return st.builds(RadialProcessor, **(drawn | fixed))


GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 9))


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda p: p.stem)
def test_matches_the_authors_masks(path):
    case = json.loads(path.read_text())
    given_, whole = case["inputs"], case["whole_sequence"]
    grid = (given_["latent_frames"], given_["latent_h"], given_["latent_w"])
    method = RadialProcessor(
        decay=given_["decay_factor"],
        block=given_["block_size"],
        sink=given_["model_type"] == "wan",
        variant="head" if "full frame" in given_["distance1_width"] else "v1",
    )
    plan = select(method, TokenLayout(grid, text=given_["text_tokens_padded"]))
    keep = plan.to_blocks()[0, 0].numpy()
    assert plan.counts.shape[:2] == (1, 1)
    assert list(keep.shape) == whole["shape"]
    packed = np.packbits(keep.reshape(-1))
    stored = np.load(path.with_suffix(".npz"))
    np.testing.assert_array_equal(packed, stored["mask_packed"])
    np.testing.assert_array_equal(plan.counts[0, 0].numpy(), stored["row_counts"])
    assert hashlib.sha256(packed.tobytes()).hexdigest() == whole["sha256_packed"]
    rows = keep.sum(1).astype("<i4").tobytes()
    assert hashlib.sha256(rows).hexdigest() == whole["row_counts_sha256_int32_le"]
    if "video_only_block" in case:
        video = case["video_only_block"]["shape"][0]
        packed = np.packbits(keep[:video, :video].reshape(-1))
        assert hashlib.sha256(packed.tobytes()).hexdigest() == case["video_only_block"]["sha256_packed"]


def test_every_vector_is_there():
    assert len(list(VECTORS.glob("*.json"))) == 8


@settings(max_examples=250, deadline=None)
@given(methods(), GRIDS, st.sampled_from([0, 0, 5, 16]))
def test_equals_the_token_level_construction(method, grid, text):
    layout = TokenLayout(grid, text=text)
    expected, border = slow_blocks(method, layout)
    if expected[:border, :border].any(1).all():
        np.testing.assert_array_equal(blocks(method, layout), expected)
    else:
        assert method.variant != "aligned"
        with pytest.raises(ValueError, match="without keys"):
            select(method, layout)


@settings(max_examples=60, deadline=None)
@given(methods(variant=st.just("aligned")), GRIDS, st.integers(1, 10), st.integers(0, 9), st.integers(0, 9))
def test_thresholds_are_exact_fractions(method, grid, under, over, tenths):
    over %= under
    method = replace(method, column_density=over / under, column_share=tenths / 10)
    expected, _ = slow_blocks(method, TokenLayout(grid), (over, under), (tenths, 10))
    np.testing.assert_array_equal(blocks(method, TokenLayout(grid)), expected)


@settings(max_examples=60, deadline=None)
@given(methods(variant=st.just("head")), st.integers(1, 9), st.integers(1, 5))
def test_aligned_is_head_where_frames_are_whole_blocks(head, frames, per_frame):
    layout = TokenLayout((frames, per_frame, head.block), text=3)
    assert select(replace(head, variant="aligned"), layout).same(select(head, layout))


def test_v1_is_head_but_for_the_distance_1_of_the_sink_models():
    layout = TokenLayout((6, 8, 16))
    same = {"block": 16, "decimate_below": 16, "decay": 0.5}
    without = [select(RadialProcessor(variant=v, sink=False, **same), layout) for v in ("v1", "head")]
    assert without[0].same(without[1])
    v1, head = (
        blocks(RadialProcessor(variant=v, **same), layout).reshape(6, 8, 6, 8) for v in ("v1", "head")
    )
    for i, j in product(range(6), repeat=2):
        half = abs(i - j) == 1 and j > 0
        assert (v1[i, :, j] == head[i, :, j]).all() != half


@pytest.mark.parametrize("s", [3600, 1560, 144, 100, 37])
@pytest.mark.parametrize("sink", [True, False])
def test_aligned_keeps_the_own_position_of_every_token(s, sink):
    for decay in (0.0, 0.2, 1.0):
        method = RadialProcessor(decay=decay, sink=sink)
        n = -(-s // method.block)
        keep = blocks(method, TokenLayout((18, 1, s))).reshape(18, n, 18, n)
        for i, j in product(range(18), repeat=2):
            covered = keep[i, np.arange(s) // method.block, j, np.arange(s) // method.block]
            assert covered.mean() == is_read(method, s, i, j)


def test_aligned_edge_rows_see_their_neighbours():
    # 28 whole blocks and 16 tokens: judged by 128 rows the last block would only ever be kept whole-frame.
    keep = blocks(RadialProcessor(decay=0.2), TokenLayout((18, 45, 80))).reshape(18, 29, 18, 29)
    np.testing.assert_array_equal(keep[17, 28, 10].nonzero()[0], [27, 28])


@settings(max_examples=60, deadline=None)
@given(methods(variant=st.just("aligned")), GRIDS)
def test_diagonal_is_kept(method, grid):
    assert blocks(method, TokenLayout(grid)).diagonal().all()


@settings(max_examples=60, deadline=None)
@given(methods(), st.integers(1, 9), st.integers(1, 5))
def test_symmetric_apart_from_the_sink_where_frames_are_whole_blocks(method, frames, per_frame):
    layout = TokenLayout((frames, per_frame, method.block))
    keep = blocks(method, layout)[per_frame:, per_frame:]
    np.testing.assert_array_equal(keep, keep.T)


@settings(max_examples=60, deadline=None)
@given(methods(), GRIDS, st.floats(0, 2), st.floats(0, 2))
def test_monotone_in_decay(method, grid, a, b):
    if method.variant != "aligned":  # whole blocks, so that the released rules work
        grid = (grid[0], grid[1], method.block)
    layout = TokenLayout(grid)
    less, more = (blocks(replace(method, decay=d), layout) for d in sorted((a, b)))
    assert (more | ~less).all()


@pytest.mark.parametrize("s", [1560, 3600, 3840])
@pytest.mark.parametrize("decay", [0.05, 0.2, 0.5, 0.8, 0.95])
def test_monotone_in_decay_at_real_sizes(s, decay):
    layout = TokenLayout((8, s // 40, 40))
    for variant in ("aligned", "head"):
        less, more = (
            blocks(RadialProcessor(decay=d, variant=variant), layout) for d in (decay, decay + 0.05)
        )
        assert (more | ~less).all()


@pytest.mark.parametrize(("block", "decay"), [(128, 1.0), (128, 0.95), (128, 0.2), (64, 0.8)])
def test_block_count_formula(block, decay):
    s, frames = 3840, 32
    n = s // block
    keep = blocks(RadialProcessor(block=block, decay=decay, sink=False), TokenLayout((frames, 48, 80)))
    keep = keep.reshape(frames, n, frames, n)
    for d in range(2, frames):
        width = max(4096 / 2 ** d.bit_length() * decay, block)
        k = 1 + floor((width - 106) / 128) if block == 128 else 1 + floor((width - 53) / 64)
        assert k < n
        assert keep[d, :, 0].sum() == n * (2 * k + 1) - k * (k + 1)


@pytest.mark.parametrize("variant", ["aligned", "head", "v1"])
def test_everything_but_the_grid_is_dense(variant):
    layout = TokenLayout((7, 5, 9), text=11, text_first=True, prefix=6, suffix=20)
    keep = blocks(RadialProcessor(variant=variant, block=16, decimate_below=16, decay=0.1), layout)
    video = {"aligned": 21, "head": 19, "v1": 19}[variant]  # 315 tokens: the 20th block is ragged
    assert len(keep) == {"aligned": 21, "head": 20, "v1": 20}[variant] + 3
    assert keep[video:].all()
    assert keep[:, video:].all()
    assert not keep[:video, :video].all()


@pytest.mark.parametrize("variant", ["aligned", "head", "v1"])
def test_an_image_is_dense(variant):
    assert blocks(RadialProcessor(variant=variant, block=16), TokenLayout((1, 9, 11), text=5)).all()


@pytest.mark.parametrize("variant", ["aligned", "head", "v1"])
@pytest.mark.parametrize("text", [0, 9])
def test_at_density_is_the_nearest(variant, text):
    layout = TokenLayout((9, 8, 10), text=text)
    method = RadialProcessor(variant=variant, block=8, decimate_below=8)
    every = sorted({density(replace(method, decay=4 * t / 128), layout) for t in range(0, 80 * 4)})
    assert len(every) > 5
    for wanted in np.linspace(every[0], every[-1], 13):
        found = method.at_density(float(wanted), layout)
        assert found == replace(method, decay=found.decay)
        assert abs(density(found, layout) - wanted) <= min(abs(d - wanted) for d in every) + 1e-12


def test_at_density_names_its_floor_and_ceiling():
    layout, method = TokenLayout((18, 48, 80)), RadialProcessor()
    with pytest.raises(ValueError, match=r"floor 0\.2871.*smaller block"):
        method.at_density(0.2, layout)
    assert method.at_density(0.2871, layout).decay <= 0.23
    assert method.at_density(1.0, layout).decay > 1
    with pytest.raises(ValueError, match=r"ceiling 0\.\d+, got.*use a smaller decimate_below \(now 2048\)"):
        RadialProcessor(decimate_below=2048).at_density(0.9, layout)


def test_published_sparsities():
    """The paper's Table 2 and issue 61 of the official repository, at decay 1 and 0.2."""
    hunyuan = TokenLayout((64, 45, 80), text=256)
    keep = blocks(RadialProcessor(variant="head"), hunyuan)[:1800, :1800]
    assert round(1 - keep.mean(), 4) == 0.8083
    assert (
        round(1 - density(RadialProcessor(variant="v1", decay=0.2), TokenLayout((18, 48, 80))), 5) == 0.73663
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variant": "paper"}, "'aligned', 'head' or 'v1', got 'paper'"),
        ({"block": 0}, "block must be >= 1"),
        ({"decay": -1.0}, "decay finite and >= 0"),
        ({"decay": float("inf")}, "decay finite"),
        ({"decimate_below": -1}, "decimate_below >= 0"),
        ({"column_density": 1.0}, r"\[0, 1\)"),
        ({"column_share": -0.1}, r"\[0, 1\)"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        RadialProcessor(**wrong)


def test_released_rules_refuse_frames_that_leave_queries_without_keys():
    with pytest.raises(ValueError, match="works at any size"):
        select(RadialProcessor(variant="head", sink=False), TokenLayout((8, 1, 37)))
