"""The spatial window: the masks of Re-ttention's authors, bit for bit, and the blocks that cover them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels.reference import token_mask
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.plan import Plan
from dit_sparse.processors.spatial_window import SpatialWindow, SpatialWindowProcessor

VECTORS = Path(__file__).parents[1] / "vectors" / "rettention"
LAYOUTS = st.builds(
    TokenLayout,
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    text=st.sampled_from([0, 5]),
    text_first=st.booleans(),
    prefix=st.sampled_from([0, 4]),
    suffix=st.sampled_from([0, 3]),
)


def select(method: SpatialWindowProcessor, layout: TokenLayout) -> Plan:
    q = torch.zeros(1, 1, layout.sequence, 1)
    return method.select(q, q, Call.standalone(layout))


def density(method: SpatialWindowProcessor, layout: TokenLayout) -> float:
    filled = method.order(Call.standalone(layout)).filled(method.block)
    return select(method, layout).density(filled, filled)


def tokens_read(method: SpatialWindowProcessor, layout: TokenLayout) -> np.ndarray:
    """The token mask of the plan in model order, bool [S, S]."""
    order, plan = method.order(Call.standalone(layout)), select(method, layout)
    mask = token_mask(plan, order.slots, order.slots, 1, positions=order.index)[0].float()
    rows = order.undo(mask[None])
    return order.undo(rows.mT.contiguous()).mT[0, 0].bool().numpy()


def slow_mask(layout: TokenLayout, half: int) -> np.ndarray:
    """Token by token."""
    mask = np.ones((layout.sequence, layout.sequence), dtype=bool)
    for i in range(layout.tokens):
        for j in range(layout.tokens):
            near = abs(i % layout.frame - j % layout.frame) <= half
            mask[layout.grid_start + i, layout.grid_start + j] = near
    return mask


def layout_of(given_: dict) -> tuple[TokenLayout, float]:
    """The layout of a vector and its ``keep``."""
    if "N" in given_:
        return TokenLayout((1, 1, given_["N"])), given_["keep_fraction"]
    frame = given_["tokens_per_frame"]
    layout = TokenLayout((given_["frames"], 1, frame), text=given_["text_tokens"], text_first=True)
    return layout, (given_["window"] + 0.5) / frame


@pytest.mark.parametrize(
    "path", sorted([*VECTORS.glob("band_*.json"), *VECTORS.glob("cog_T*.json")]), ids=lambda path: path.stem
)
def test_vectors(path):
    case = json.loads(path.read_text())
    layout, keep = layout_of(case["inputs"])
    mask = tokens_read(SpatialWindowProcessor(keep=keep, exact=True), layout)
    packed = np.packbits(mask.reshape(-1))
    stored = np.load(path.with_suffix(".npz"))
    np.testing.assert_array_equal(packed, stored["mask_packed"])
    np.testing.assert_array_equal(mask.sum(1), stored["row_counts"])
    assert hashlib.sha256(packed.tobytes()).hexdigest() == case["mask"]["sha256_packed"]


def test_vector_of_cogvideox():
    """The 17776 tokens of CogVideoX, in slices: mask, blocks of its own order, and that ours are fewer."""
    case = json.loads((VECTORS / "cog_17776_keep0.03125.json").read_text())
    published = json.loads((VECTORS / "block_density_of_token_masks.json").read_text())["cog17776_half21"]
    layout, keep = layout_of(case["inputs"])
    rule, places = SpatialWindow(layout, int(keep * layout.frame) // 2), torch.arange(layout.sequence)
    digest, counts, touched = hashlib.sha256(), [], {int(b): [] for b in published}
    for rows in places.split(128):
        mask = rule(rows[:, None], places)
        digest.update(np.packbits(mask.numpy().reshape(-1)).tobytes())
        counts.append(mask.sum(1))
        for block, found in touched.items():
            padded = torch.nn.functional.pad(mask, (0, -layout.sequence % block, 0, -len(rows) % block))
            found.append(padded.view(-1, block, padded.shape[1]).any(1).unflatten(1, (-1, block)).any(2))
    assert digest.hexdigest() == case["mask"]["sha256_packed"]
    rows = torch.cat(counts).numpy()
    assert (
        hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()
        == (case["mask"]["row_counts_sha256_int32_le"])
    )
    for block, found in touched.items():
        in_their_order = float(torch.cat(found).double().mean())
        assert in_their_order == pytest.approx(published[str(block)], abs=1e-15)
        assert density(SpatialWindowProcessor(keep=keep, block=block), layout) < 0.075
    video, method = TokenLayout((13, 30, 45)), SpatialWindowProcessor(keep=keep, exact=True)
    order = method.order(Call.standalone(video))
    pairs = select(method, video).pairs(*[order.filled(64)] * 2, order.index, order.valid())
    assert int(pairs) / video.tokens**2 == case["video_video_density"]


def test_block_densities_of_an_image():
    """The published ones: an image is in raster order here too."""
    published = json.loads((VECTORS / "block_density_of_token_masks.json").read_text())["band4096_half64"]
    for block, expected in published.items():
        plan = select(SpatialWindowProcessor(keep=0.03125, block=int(block)), TokenLayout((1, 64, 64)))
        assert plan.to_blocks().double().mean() == expected


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, st.floats(0, 2), st.sampled_from([1, 3, 8, 64]))
def test_exact_is_the_window_and_its_blocks_are_the_fewest_that_cover_it(layout, keep, block):
    method = SpatialWindowProcessor(keep=keep, block=block, exact=True)
    expected = slow_mask(layout, int(keep * layout.frame) // 2)
    np.testing.assert_array_equal(tokens_read(method, layout), expected)
    order = method.order(Call.standalone(layout))
    index = order.index[0].numpy()
    ordered = np.where((index < 0)[:, None] | (index < 0), False, expected[index][:, index])
    pad = -len(index) % block
    blocks = np.pad(ordered, (0, pad)).reshape(len(index) // block + (pad > 0), block, -1, block).any((1, 3))
    np.testing.assert_array_equal(select(method, layout).to_blocks()[0, 0].numpy(), blocks)


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("grid", [(5, 6, 7), (1, 9, 11), (13, 3, 4)])
def test_at_density_is_the_nearest(grid, text):
    layout, method = TokenLayout(grid, text=text), SpatialWindowProcessor(block=8)
    frame = layout.frame
    every = [density(SpatialWindowProcessor(keep=2 * h / frame, block=8), layout) for h in range(frame)]
    assert every[0] < 0.5
    for wanted in np.linspace(every[0], 1, 9):
        found = method.at_density(float(wanted), layout)
        assert abs(density(found, layout) - wanted) == pytest.approx(min(abs(d - wanted) for d in every))
    with pytest.raises(ValueError, match=r"floor 0\.\d+ .*smaller block"):
        method.at_density(every[0] / 2, layout)


@pytest.mark.parametrize("wrong", [{"keep": -0.1}, {"keep": 2.1}, {"keep": float("nan")}, {"block": 0}])
def test_refuses(wrong):
    with pytest.raises(ValueError, match=r"keep must lie in \[0, 2\] and block be >= 1, got"):
        SpatialWindowProcessor(**wrong)
