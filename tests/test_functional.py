"""``sdpa`` and ``Run``: the methods without a model of ours, and other engines' ways to call them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as stock

import dit_sparse
from dit_sparse import AdaSpaProcessor, Call, Phase, RadialProcessor, Run, TokenLayout, sdpa
from dit_sparse.kernels import block_sparse_attention
from dit_sparse.plugins import comfyui, vllm_omni

GRID = (5, 4, 6)
TEXT = 7
RADIAL = RadialProcessor(block=8, decay=0.3, decimate_below=32)


def qkv(tokens: int = 120 + TEXT, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    heads = (4, kv_heads, kv_heads)
    q, k, v = (tiny.randn(2, h, tokens, 16, seed=i) for i, h in enumerate(heads))
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, valid: Tensor | None = None) -> Tensor:
    """Select, then execute, as a model of one's own would."""
    call = Call.standalone(layout, heads=q.shape[1], kv_heads=k.shape[1], valid=valid)
    order = RADIAL.order(call)
    plan = RADIAL.select(q, k, call)
    slots = order.valid(valid)
    out, _ = block_sparse_attention(*(order.apply(x) for x in (q, k, v)), plan, valid=slots)
    return order.undo(out)


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sdpa_computes_the_methods_plan(text_first: bool, kv_heads: int) -> None:
    q, k, v = qkv(kv_heads=kv_heads)
    layout = TokenLayout(GRID, text=TEXT, text_first=text_first)
    out = sdpa(q, k, v, grid=GRID, method=RADIAL, text_first=text_first)
    torch.testing.assert_close(out, by_hand(q, k, v, layout), atol=1e-5, rtol=1e-5)
    assert (out - stock(q, k, v, enable_gqa=True)).abs().max() > 1e-2


def test_sdpa_honours_a_padding_mask() -> None:
    q, k, v = qkv()
    mask = torch.ones(2, 1, 1, 127, dtype=torch.bool)
    mask[1, ..., -4:] = False
    out = sdpa(q, k, v, grid=GRID, method=RADIAL, attn_mask=mask)
    layout = TokenLayout(GRID, text=TEXT)
    torch.testing.assert_close(out, by_hand(q, k, v, layout, mask[:, 0, 0]), atol=1e-5, rtol=1e-5)


def test_a_full_budget_is_stock_attention() -> None:
    q, k, v = qkv()
    out = sdpa(q, k, v, grid=GRID, method="window", scale=0.3)
    run = Run("window", density=1.0, block=16)
    full = sdpa(q, k, v, grid=GRID, method=run, scale=0.3)
    torch.testing.assert_close(full, stock(q, k, v, scale=0.3), atol=1e-5, rtol=1e-5)
    assert out.shape == q.shape


def test_a_run_remembers_reports_and_begins_again() -> None:
    q, k, v = qkv(120)
    run = Run(AdaSpaProcessor(density=0.3, block=8), layers=2, schedule="dense 0-25%; refresh 1")

    def generation() -> dict[tuple[int | None, int], tuple[Phase, float]]:
        for step in range(4):
            for layer in range(2):
                sdpa(q, k, v, grid=GRID, method=run, layer=layer, step=step, steps=4)
        return {(r.where.step, r.where.layer): (r.where.phase, r.density) for r in run.report().rows}

    first = generation()
    assert {key: phase for key, (phase, _) in first.items()} == {
        **{(0, n): Phase.DENSE for n in range(2)},
        **{(1, n): Phase.REFRESH for n in range(2)},
        **{(s, n): Phase.SPARSE for s in (2, 3) for n in range(2)},
    }
    assert all(d < 0.5 for phase, d in first.values() if phase is Phase.SPARSE)
    assert generation() == first
    run.forget()
    assert not run.report().rows


def test_without_a_run_nothing_is_remembered() -> None:
    q, k, v = qkv(120)
    method = AdaSpaProcessor(density=0.3, block=8)
    outs = [sdpa(q, k, v, grid=GRID, method=method, step=s, steps=4) for s in range(3)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    torch.testing.assert_close(outs[0], stock(q, k, v), atol=1e-5, rtol=1e-5)


def test_gradients_reach_q_k_and_v() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    sdpa(q, k, v, grid=GRID, method=RADIAL).square().sum().backward()
    mine = [x.grad for x in (q, k, v)]
    again = [x.detach().requires_grad_() for x in (q, k, v)]
    by_hand(*again, TokenLayout(GRID, text=TEXT)).square().sum().backward()  # type: ignore[call-arg]
    for a, b in zip(mine, again, strict=True):
        torch.testing.assert_close(a, b.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (5, 4, 7)}, "127 tokens are fewer than those of"),
        ({"method": "radail"}, "unknown method 'radail'"),
        ({"method": "sla"}, "has trainable parts"),
        ({"k": torch.zeros(2, 4, 100, 16)}, "must be .B, H, S, D. of one sequence"),
        ({"k": torch.zeros(2, 3, 127, 16)}, "must be .B, H, S, D. of one sequence"),
        ({"layer": -1}, "layer must be in"),
    ],
)
def test_bad_input_says_what_came(changes: dict[str, Any], message: str) -> None:
    q, k, v = qkv()
    asked = {"q": q, "k": k, "v": v, "grid": GRID, "method": RADIAL, **changes}
    with pytest.raises(ValueError, match=message):
        sdpa(**asked)


def test_as_vllm_omni_calls_it() -> None:
    """The engine holds [B, S, H, D] and merges its params anew at every forward."""
    q, k, v = (x.transpose(1, 2) for x in qkv(120))
    configured = {"method": "radial", "parameters": {"block": 8, "decay": 0.3, "decimate_below": 32}}
    told = {"grid": GRID, "step": 3, "steps": 10, "layer": 1}
    out = vllm_omni.sparse_attention(q, k, v, {**configured, **told}, False, None)
    expected = sdpa(*qkv(120), grid=GRID, method=RADIAL).transpose(1, 2)
    assert torch.equal(out, expected)
    run = Run(RADIAL, layers=2, schedule="dense 0-50%")
    for step in range(10):
        out = vllm_omni.sparse_attention(q, k, v, {**told, "run": run, "step": step}, False, 0.25)
    assert {r.where.step for r in run.report().sparse_rows} == set(range(5, 10))
    with pytest.raises(ValueError, match="is_causal"):
        vllm_omni.sparse_attention(q, k, v, told, True, None)
    with pytest.raises(ValueError, match="needs 'grid'"):
        vllm_omni.sparse_attention(q, k, v, configured, False, None)


def comfy_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, skip_reshape: bool = False,
    skip_output_reshape: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    """The face of ComfyUI's own attention functions."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = stock(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("skip", [False, True])
def test_as_comfyui_calls_it(skip: bool) -> None:
    """Blocks call their attention with transformer_options; a sampler walks down its sigmas."""
    q, k, v = qkv(120)
    if not skip:
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    run = Run(RADIAL, layers=3, schedule="dense 0-25%; layers 0")
    override = partial(comfyui.attend, comfy_attention, run=run, grid=GRID, doubles=2)
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0])
    for step in range(4):
        for which in ([0], [1]):
            for block_type, index in (("double", 0), ("double", 1), ("single", 0)):
                options = {
                    "sample_sigmas": sigmas,
                    "sigmas": sigmas[step : step + 1],
                    "cond_or_uncond": which,
                    "block_index": index,
                    "block_type": block_type,
                }
                shape = {"skip_reshape": skip, "skip_output_reshape": skip}
                out = override(q, k, v, 4, **shape, transformer_options=options)
                dense = comfy_attention(q, k, v, 4, **shape)
                assert out.shape == dense.shape
                runs_sparse = step > 0 and (block_type, index) != ("double", 0)
                assert bool((out - dense).abs().max() > 1e-2) is runs_sparse
    assert {(r.where.step, r.where.layer, r.where.branch) for r in run.report().sparse_rows} == {
        (s, n, b) for s in (1, 2, 3) for n in (1, 2) for b in ("cond", "uncond")
    }


def test_comfyui_leaves_cross_attention_alone() -> None:
    q, _, _ = qkv(120)
    _, k, v = qkv(20)
    run = Run(RADIAL)
    out = comfyui.attend(comfy_attention, q, k, v, 4, run=run, grid=GRID, skip_reshape=True)
    assert torch.equal(out, comfy_attention(q, k, v, 4, skip_reshape=True))
    assert not run.report().rows


def test_public_names() -> None:
    assert dit_sparse.sdpa is sdpa
    assert dit_sparse.Run is Run
