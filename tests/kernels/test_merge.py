"""merge: attention over disjoint sets of keys combines exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels import block_sparse_attention, merge
from dit_sparse.plan import Plan

INF = float("inf")


def parts(seed, count, dtype=torch.float64):
    """A row of keys split into ``count`` plans; some queries read nothing in some, or in all."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, 20, 4, generator=g, dtype=dtype) for _ in range(3))
    owner = torch.randint(-1, count, (2, 2, 5, 5), generator=g)
    owner[0, 0, 2] = -1
    plans = [Plan.from_blocks(owner == i, 4) for i in range(count)]
    return q, k, v, plans, Plan.from_blocks(owner >= 0, 4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 4), shift=st.sampled_from([0.0, 80.0, -80.0]))
def test_is_the_attention_over_all_keys(seed, count, shift):
    q, k, v, plans, whole = parts(seed, count)
    pieces = [block_sparse_attention(q, k, v, plan, backend="reference") for plan in plans]
    # A constant added to every score shifts each lse and changes no output.
    out, lse = merge([o for o, _ in pieces], [x + shift for _, x in pieces])
    want, want_lse = block_sparse_attention(q, k, v, whole, backend="reference")
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse + shift)
    assert not out[0, 0, 8:12].any()
    assert (lse[0, 0, 8:12] == -INF).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_order_and_grouping_do_not_matter(seed):
    q, k, v, plans, _ = parts(seed, 3)
    (o1, l1), (o2, l2), (o3, l3) = (block_sparse_attention(q, k, v, p, backend="reference") for p in plans)
    out, lse = merge([o1, o2, o3], [l1, l2, l3])
    o12, l12 = merge([o2, o1], [l2, l1])
    nested, nested_lse = merge([o3, o12], [l3, l12])
    torch.testing.assert_close(nested, out)
    torch.testing.assert_close(nested_lse, lse)


def test_gradients_with_empty_rows():
    g = torch.Generator().manual_seed(0)
    outs = [torch.randn(1, 1, 4, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    lses = [torch.randn(1, 1, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    lses[0][..., 0] = lses[1][..., 0] = lses[1][..., 2] = -INF
    lses = [x.requires_grad_() for x in lses]
    out, lse = merge(outs, lses)
    loss = out.sum() + torch.where(lse == -INF, 0, lse).sum()
    for gradient in torch.autograd.grad(loss, [*outs, *lses]):
        assert gradient.isfinite().all()
        assert not gradient[..., 0, :].any() if gradient.ndim == 4 else not gradient[..., 0].any()


def test_gradcheck():
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 3, 2, generator=g, dtype=torch.float64) for _ in range(2)]
    tensors += [torch.randn(1, 2, 3, generator=g, dtype=torch.float64) for _ in range(2)]
    inputs = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda a, b, c, d: merge([a, b], [c, d]), inputs)


def test_keeps_dtypes_and_aliases_nothing():
    out, lse = torch.randn(1, 1, 4, 3).bfloat16(), torch.randn(1, 1, 4)
    merged, merged_lse = merge([out], [lse])
    assert (merged.dtype, merged_lse.dtype) == (torch.bfloat16, torch.float32)
    assert merged.data_ptr() != out.data_ptr()
    assert merged_lse.data_ptr() != lse.data_ptr()
    torch.testing.assert_close(merged, out)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "at least one, got 0 and 0"),
        ([torch.zeros(1, 1, 2, 3)], [], "got 1 and 0"),
        (
            [torch.zeros(1, 1, 2, 3)],
            [torch.zeros(1, 1, 3)],
            r"lses\[0\] has shape \(1, 1, 3\), expected \(1, 1, 2\)",
        ),
        (
            [torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 4)],
            [torch.zeros(1, 1, 2)] * 2,
            r"outs\[1\] has shape \(1, 1, 2, 4\), expected \(1, 1, 2, 3\)",
        ),
    ],
)
def test_errors(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge(outs, lses)
