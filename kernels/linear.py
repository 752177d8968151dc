"""The Triton backend of linear attention: keys are summed up, queries read the sums; and back.

What a row of blocks reads of a head is its *state*: of each feature f the mass z_f, the sum of phi_f(k), and
h_f, the sum of phi_f(k) v. The backward is the same the other way round: keys read the state of queries, with
dO for v. Blocks that a plan lists are left out: their sums are made again, from stored features, and
subtracted from the total; where a row lists more than half of the tokens, the others are summed instead.

* At block 64 and D 128 the state of one block takes 64 KiB, its features and values 32 KiB, and their product
  as many operations as attention to the block. So states of blocks are not stored.
* Total and part are sums of the same rounded products in another order. Subtracting costs accuracy only where
  the listed blocks hold nearly all there is: of the mass of a feature, which below RESOLUTION counts as none
  left, or, for keys, of what was divided by the small denominators of a few queries.

Values are read as mu_f = h_f / z_f - mean(v), with weights phi_f(q) z_f / (phi(q) . z + eps) that sum to one.
What matters to queries is how values of features *differ*: beside a common mean, rounding to bfloat16 would
lose the differences, and with them the gradient of q. Nor does any number grow with S; float16 ends at 65504.

Importing this module imports triton. Letters: B batch, H query heads, KV key/value heads, S tokens, D head
dim, F features (D, or 2 D for hedgehog), Q and K blocks.
In kernels: i_ index, o_ offsets, b_ block of values, p_ pointer, s_ stride, m_ mask, n_ count.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.block_sparse import _check, precision
from dit_sparse.kernels.linear_ops import define
from dit_sparse.kernels.lists import Columns, transpose
from dit_sparse.kernels.operands import empty_as, empty_results, lead_strides, unit_stride
from dit_sparse.kernels.targets import Target, Variant, target_of

LOG2E = tl.constexpr(math.log2(math.e))
# The share of a feature's mass that a difference of two float32 sums resolves.
RESOLUTION = tl.constexpr(2.0**-20)


@triton.jit
def _load_features(
    p_x, o_s, s_s, m_s, MAP: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr, HALVES: tl.constexpr
):
    """phi of some tokens, with two halves of x and -x: [M, HALVES * TILE_D] in float32, 0 where masked."""
    M: tl.constexpr = o_s.shape[0]
    o_f = tl.arange(0, HALVES * TILE_D)
    m_f = (o_f % TILE_D < D)[None, :]
    b_x = tl.load(p_x + (o_s[:, None] * s_s + (o_f % TILE_D)[None, :]), mask=m_s[:, None] & m_f, other=0.0)
    b_x = b_x.to(tl.float32)
    if HALVES == 2:
        b_x = tl.where((o_f < TILE_D)[None, :], b_x, -b_x)
    if MAP == "softmax":
        b_x = tl.reshape(tl.where(m_f, b_x, -float("inf")), (M * HALVES, TILE_D))
        b_x = tl.exp2(b_x * LOG2E - (tl.max(b_x, 1) * LOG2E)[:, None])
        m_s = tl.reshape(tl.broadcast_to(m_s[:, None], (M, HALVES)), (M * HALVES,))
        return tl.reshape(b_x * tl.where(m_s, 1 / tl.sum(b_x, 1), 0.0)[:, None], (M, HALVES * TILE_D))
    elif MAP == "elu":
        b_x = tl.where(b_x > 0, b_x + 1, tl.exp2(tl.minimum(b_x, 0.0) * LOG2E))
        return tl.where(m_s[:, None] & m_f, b_x, 0.0)
    else:
        return tl.maximum(b_x, 0.0)


@triton.jit
def _pull_back(b_phi, b_grad, MAP: tl.constexpr, TILE_D: tl.constexpr, HALVES: tl.constexpr):
    """The gradient of x [M, TILE_D] from that of phi(x)."""
    M: tl.constexpr = b_phi.shape[0]
    if MAP == "softmax":
        b_grad = tl.reshape(b_phi * b_grad, (M * HALVES, TILE_D))
        b_phi = tl.reshape(b_phi, (M * HALVES, TILE_D))
        b_grad = tl.reshape(b_grad - b_phi * tl.sum(b_grad, 1)[:, None], (M, HALVES, TILE_D))
        return tl.sum(b_grad * (1 - 2 * tl.arange(0, HALVES))[None, :, None], 1)
    elif MAP == "elu":
        return b_grad * tl.minimum(b_phi, 1.0)
    else:
        return tl.where(b_phi > 0, b_grad, 0.0)


@triton.jit
def _feature_offsets(D: tl.constexpr, TILE_D: tl.constexpr, HALVES: tl.constexpr):
    """Where features lie in memory, the halves next to each other, and which there are."""
    o_f = tl.arange(0, HALVES * TILE_D)
    return o_f // TILE_D * D + o_f % TILE_D, o_f % TILE_D < D


@triton.jit
def _add_tile(b_h, p_phi, p_v, s_vs, i_k, i, S, D, F, o_f, m_f, o_v, BLOCK, TILE_N, PRECISION):
    """Add phi^T v of tile ``i`` of block ``i_k`` to h. Within a block offsets fit 32 bits."""
    i_s = tl.cast(i_k, tl.int64) * BLOCK
    o_s = i * TILE_N + tl.arange(0, TILE_N)
    m_s = (o_s < tl.minimum(S - i_s, BLOCK))[:, None]
    b_phi = tl.load(p_phi + i_s * F + (o_s[:, None] * F + o_f[None, :]), mask=m_s & m_f[None, :], other=0.0)
    b_v = tl.load(
        p_v + i_s * s_vs + (o_s[:, None] * s_vs + o_v[None, :]), mask=m_s & (o_v < D)[None, :], other=0.0
    )
    return tl.dot(tl.trans(b_phi), b_v, b_h, input_precision=PRECISION)


@triton.jit
def _left(
    p_sum,
    p_mass,
    p_phi,
    p_v,
    p_block_mass,
    p_tokens,
    p_list,
    n,
    n_tokens,
    s_vs,
    o_v,
    S,
    K,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    HALVES: tl.constexpr,
    RESTRICTED: tl.constexpr,
    POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state of one head without the ``n`` blocks of a list: h [F, columns o_v] and z [F].

    All pointers are the head's. POSITIVE says that masses are, so that one below RESOLUTION is none.
    """
    F: tl.constexpr = HALVES * D
    PER: tl.constexpr = (BLOCK + TILE_N - 1) // TILE_N
    o_f, m_f = _feature_offsets(D, TILE_D, HALVES)
    p_sum += o_f[:, None] * D + o_v[None, :]
    m_h = m_f[:, None] & (o_v < D)[None, :]
    b_z = tl.load(p_mass + o_f, mask=m_f, other=0.0)
    if RESTRICTED:
        n_listed = 0
        b_listed = tl.zeros_like(b_z)
        for i in range(0, n, 16):
            o_i = i + tl.arange(0, 16)
            o_k = tl.load(p_list + o_i, mask=o_i < n, other=0).to(tl.int64)
            m_z = (o_i < n)[:, None] & m_f[None, :]
            b_listed += tl.sum(
                tl.load(p_block_mass + o_k[:, None] * F + o_f[None, :], mask=m_z, other=0.0), 0
            )
            n_listed += tl.sum(tl.load(p_tokens + o_k, mask=o_i < n, other=0))
        b_h = tl.zeros((HALVES * TILE_D, o_v.shape[0]), tl.float32)
        if 2 * n_listed <= n_tokens:
            for i in range(0, n * PER):
                i_k = tl.load(p_list + i // PER)
                b_h = _add_tile(
                    b_h, p_phi, p_v, s_vs, i_k, i % PER, S, D, F, o_f, m_f, o_v, BLOCK, TILE_N, PRECISION
                )
            b_h = tl.load(p_sum, mask=m_h, other=0.0) - b_h
            b_least = RESOLUTION * b_z
            b_z -= b_listed
            if POSITIVE:
                b_z = tl.where(b_z > b_least, b_z, 0.0)
        else:
            b_z = tl.zeros_like(b_z)
            i_list = 0
            for i_k in range(0, K):
                if tl.load(p_list + i_list, mask=i_list < n, other=-1) == i_k:
                    i_list += 1
                else:
                    for i in range(0, PER):
                        b_h = _add_tile(
                            b_h, p_phi, p_v, s_vs, i_k, i, S, D, F, o_f, m_f, o_v, BLOCK, TILE_N, PRECISION
                        )
                    b_z += tl.load(p_block_mass + o_f, mask=m_f, other=0.0)
                p_block_mass += F
    else:
        b_h = tl.load(p_sum, mask=m_h, other=0.0)
    return b_h, b_z


@triton.jit
def _differences(b_h, b_z, b_mean):
    """How the mean values of features differ from the mean of all; 0 where a feature has no mass."""
    m_z = (b_z > 0)[:, None]
    return tl.where(m_z, b_h * (1 / tl.where(b_z > 0, b_z, 1.0))[:, None] - b_mean[None, :], 0.0)


@triton.jit
def state_kernel(
    p_x,
    p_v,
    p_scale,
    p_weight,
    p_valid,
    p_part,
    p_block_mass,
    p_tokens,
    p_phi,
    s_xb,
    s_xh,
    s_xs,
    s_vb,
    s_vh,
    s_vs,
    s_mb,
    s_mh,
    H,
    S,
    K,
    CHUNK,
    MAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    HALVES: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    RESTRICTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """phi^T v over CHUNK blocks, the mass of each, and, RESTRICTED, what `_left` reads.

    SCALED multiplies the features of each token by a scale, and what they add to the mass by a weight.
    """
    F: tl.constexpr = HALVES * D
    PER: tl.constexpr = (BLOCK + TILE_N - 1) // TILE_N
    COLS: tl.constexpr = (D + TILE_V - 1) // TILE_V
    i_chunk = (tl.program_id(0) // COLS).to(tl.int64)
    i_col = tl.program_id(0) % COLS
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_n = tl.arange(0, TILE_N)
    o_v = i_col * TILE_V + tl.arange(0, TILE_V)
    o_f, m_f = _feature_offsets(D, TILE_D, HALVES)
    p_x += i_b * s_xb + i_h * s_xh
    p_v += i_b * s_vb + i_h * s_vh
    p_valid += i_b * s_mb + i_h * s_mh
    p_block_mass += i_bh * K * F
    p_phi += i_bh * S * F

    b_h = tl.zeros((HALVES * TILE_D, TILE_V), tl.float32)
    i_first = i_chunk * CHUNK
    for i_k in range(i_first, tl.minimum(i_first + CHUNK, K)):
        b_mass = tl.zeros((TILE_N, HALVES * TILE_D), tl.float32)
        n_tokens = 0
        i_s = i_k * BLOCK
        for i in range(0, PER):
            o_s = i * TILE_N + o_n
            m_in = o_s < tl.minimum(S - i_s, BLOCK)
            m_s = m_in
            if HAS_VALID:
                m_s = m_s & (tl.load(p_valid + i_s + o_s, mask=m_s, other=0) != 0)
            b_phi = _load_features(p_x + i_s * s_xs, o_s, s_xs, m_s, MAP, D, TILE_D, HALVES)
            if SCALED:
                b_phi *= tl.load(p_scale + i_bh * S + i_s + o_s, mask=m_s, other=0.0)[:, None]
                b_mass += b_phi * tl.load(p_weight + i_bh * S + i_s + o_s, mask=m_s, other=0.0)[:, None]
            else:
                b_mass += b_phi
            b_phi = b_phi.to(p_v.dtype.element_ty)
            m_v = m_s[:, None] & (o_v < D)[None, :]
            b_v = tl.load(p_v + i_s * s_vs + (o_s[:, None] * s_vs + o_v[None, :]), mask=m_v, other=0.0)
            b_h = tl.dot(tl.trans(b_phi), b_v, b_h, input_precision=PRECISION)
            if RESTRICTED:
                n_tokens += tl.sum(m_s.to(tl.int32))
                if i_col == 0:
                    p_out = p_phi + i_s * F + (o_s[:, None] * F + o_f[None, :])
                    tl.store(p_out, b_phi, mask=m_in[:, None] & m_f[None, :])
        if i_col == 0:
            tl.store(p_block_mass + i_k * F + o_f, tl.sum(b_mass, 0), mask=m_f)
            if RESTRICTED:
                tl.store(p_tokens + i_bh * K + i_k, n_tokens)

    p_part += (i_bh * (tl.num_programs(0) // COLS) + i_chunk) * F * D
    tl.store(p_part + o_f[:, None] * D + o_v[None, :], b_h, mask=m_f[:, None] & (o_v < D)[None, :])


@triton.jit
def output_kernel(
    p_q,
    p_v,
    p_mean,
    p_sum,
    p_mass,
    p_phi,
    p_block_mass,
    p_tokens,
    p_all,
    p_list,
    p_start,
    p_count,
    p_out,
    p_inverse,
    s_qb,
    s_qh,
    s_qs,
    s_vb,
    s_vh,
    s_vs,
    s_lb,
    s_lh,
    s_sb,
    s_sh,
    s_cb,
    s_ch,
    H,
    KV,
    SQ,
    SK,
    K,
    EPS,
    MAP: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    HALVES: tl.constexpr,
    RESTRICTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and the inverse of its denominator: one program per query block and tile of value columns."""
    F: tl.constexpr = HALVES * D
    COLS: tl.constexpr = (D + TILE_V - 1) // TILE_V
    i_q = (tl.program_id(0) // COLS).to(tl.int64)
    i_col = tl.program_id(0) % COLS
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_kv = i_b * KV + i_h * KV // H
    o_v = i_col * TILE_V + tl.arange(0, TILE_V)
    p_q += i_b * s_qb + i_h * s_qh + i_q * BQ * s_qs
    p_out += (i_bh * SQ + i_q * BQ) * D
    p_inverse += i_bh * SQ + i_q * BQ

    n, n_tokens = 0, 0
    if RESTRICTED:
        n = tl.load(p_count + i_b * s_cb + i_h * s_ch + i_q)
        p_list += i_b * s_lb + i_h * s_lh + tl.load(p_start + i_b * s_sb + i_h * s_sh + i_q)
        n_tokens = tl.load(p_all + i_kv)
    b_h, b_z = _left(
        p_sum + i_kv * F * D,
        p_mass + i_kv * F,
        p_phi + i_kv * SK * F,
        p_v + i_b * s_vb + i_h * KV // H * s_vh,
        p_block_mass + i_kv * K * F,
        p_tokens + i_kv * K,
        p_list,
        n,
        n_tokens,
        s_vs,
        o_v,
        SK,
        K,
        D,
        BK,
        TILE_N,
        TILE_D,
        HALVES,
        RESTRICTED,
        True,
        PRECISION,
    )
    b_mean = tl.load(p_mean + i_kv * D + o_v, mask=o_v < D, other=0.0)
    b_mu = _differences(b_h, b_z, b_mean).to(p_v.dtype.element_ty)

    for i in range(0, BQ, TILE_M):
        o_q = i + tl.arange(0, TILE_M)
        m_q = o_q < tl.minimum(SQ - i_q * BQ, BQ)
        b_p = _load_features(p_q, o_q, s_qs, m_q, MAP, D, TILE_D, HALVES) * b_z[None, :]
        b_sum = tl.sum(b_p, 1)
        b_inverse = tl.where(b_sum > 0, 1 / (b_sum + EPS), 0.0)
        b_p = (b_p * b_inverse[:, None]).to(p_v.dtype.element_ty)
        b_out = tl.dot(b_p, b_mu, (b_sum * b_inverse)[:, None] * b_mean[None, :], input_precision=PRECISION)
        m_out = m_q[:, None] & (o_v < D)[None, :]
        tl.store(p_out + o_q[:, None] * D + o_v[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)
        if i_col == 0:
            tl.store(p_inverse + o_q, b_inverse, mask=m_q)


@triton.jit
def query_kernel(
    p_q,
    p_v,
    p_grad,
    p_inverse,
    p_mean,
    p_level,
    p_sum,
    p_mass,
    p_phi,
    p_block_mass,
    p_tokens,
    p_all,
    p_list,
    p_start,
    p_count,
    p_dq,
    p_scale,
    p_weight,
    s_qb,
    s_qh,
    s_qs,
    s_vb,
    s_vh,
    s_vs,
    s_gb,
    s_gh,
    s_gs,
    s_lb,
    s_lh,
    s_sb,
    s_sh,
    s_cb,
    s_ch,
    H,
    KV,
    SQ,
    SK,
    K,
    EPS,
    MAP: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    HALVES: tl.constexpr,
    RESTRICTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a tile of queries, and how their features are scaled and weighted in the state that keys read."""
    F: tl.constexpr = HALVES * D
    PER: tl.constexpr = (BQ + TILE_M - 1) // TILE_M
    i_q = (tl.program_id(0) // PER).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_kv = i_b * KV + i_h * KV // H
    o_q = tl.program_id(0) % PER * TILE_M + tl.arange(0, TILE_M)
    m_q = o_q < tl.minimum(SQ - i_q * BQ, BQ)
    p_grad += i_b * s_gb + i_h * s_gh + i_q * BQ * s_gs

    n, n_tokens = 0, 0
    if RESTRICTED:
        n = tl.load(p_count + i_b * s_cb + i_h * s_ch + i_q)
        p_list += i_b * s_lb + i_h * s_lh + tl.load(p_start + i_b * s_sb + i_h * s_sh + i_q)
        n_tokens = tl.load(p_all + i_kv)
    b_e = tl.zeros((TILE_M, HALVES * TILE_D), tl.float32)
    b_mean_grad = tl.zeros((TILE_M,), tl.float32)
    b_z = tl.zeros((HALVES * TILE_D,), tl.float32)
    for i_col in tl.range(0, D, TILE_V, num_stages=1):  # the loops inside are those to overlap
        o_v = i_col + tl.arange(0, TILE_V)
        b_h, b_z = _left(
            p_sum + i_kv * F * D,
            p_mass + i_kv * F,
            p_phi + i_kv * SK * F,
            p_v + i_b * s_vb + i_h * KV // H * s_vh,
            p_block_mass + i_kv * K * F,
            p_tokens + i_kv * K,
            p_list,
            n,
            n_tokens,
            s_vs,
            o_v,
            SK,
            K,
            D,
            BK,
            TILE_N,
            TILE_D,
            HALVES,
            RESTRICTED,
            True,
            PRECISION,
        )
        b_mean = tl.load(p_mean + i_kv * D + o_v, mask=o_v < D, other=0.0)
        b_mu = _differences(b_h, b_z, b_mean).to(p_v.dtype.element_ty)
        m_g = m_q[:, None] & (o_v < D)[None, :]
        b_grad = tl.load(p_grad + (o_q[:, None] * s_gs + o_v[None, :]), mask=m_g, other=0.0)
        b_e = tl.dot(b_grad, tl.trans(b_mu), b_e, input_precision=PRECISION)
        b_mean_grad += tl.sum(b_grad.to(tl.float32) * b_mean[None, :], 1)

    p_q += i_b * s_qb + i_h * s_qh + i_q * BQ * s_qs
    b_phi = _load_features(p_q, o_q, s_qs, m_q, MAP, D, TILE_D, HALVES)
    o_out = i_bh * SQ + i_q * BQ + o_q
    b_inverse = tl.load(p_inverse + o_out, mask=m_q, other=0.0)
    b_slope = b_z[None, :] * b_inverse[:, None]
    # With eps the weights sum to less than one, and the mean of v is no longer read in full.
    b_delta = tl.sum(b_phi * b_slope * b_e, 1) - EPS * b_inverse * b_mean_grad
    b_dq = _pull_back(b_phi, b_slope * (b_e - b_delta[:, None]), MAP, TILE_D, HALVES)
    o_d = tl.arange(0, TILE_D)
    m_dq = m_q[:, None] & (o_d < D)[None, :]
    tl.store(p_dq + o_out[:, None] * D + o_d[None, :], b_dq.to(p_dq.dtype.element_ty), mask=m_dq)
    tl.store(p_scale + o_out, b_inverse * tl.load(p_level + i_kv), mask=m_q)
    tl.store(p_weight + o_out, -b_delta, mask=m_q)


@triton.jit
def key_kernel(
    p_k,
    p_v,
    p_grad,
    p_valid,
    p_mean,
    p_level,
    p_sum,
    p_mass,
    p_phi,
    p_block_mass,
    p_tokens,
    p_all,
    p_list,
    p_start,
    p_count,
    p_dk,
    p_dv,
    s_kb,
    s_kh,
    s_ks,
    s_vb,
    s_vh,
    s_vs,
    s_gb,
    s_gh,
    s_gs,
    s_lb,
    s_lh,
    s_sb,
    s_sh,
    s_cb,
    s_ch,
    s_mb,
    s_mh,
    KV,
    SQ,
    SK,
    Q,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_VALID: tl.constexpr,
    RESTRICTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a tile of keys, which read the states of all query heads that share them."""
    F: tl.constexpr = HALVES * D
    PER: tl.constexpr = (BK + TILE_M - 1) // TILE_M
    i_k = (tl.program_id(0) // PER).to(tl.int64)
    i_kv = tl.program_id(1).to(tl.int64)
    i_b = i_kv // KV
    o_k = tl.program_id(0) % PER * TILE_M + tl.arange(0, TILE_M)
    m_k = o_k < tl.minimum(SK - i_k * BK, BK)
    m_here = m_k
    if HAS_VALID:
        p_valid += i_b * s_mb + i_kv % KV * s_mh + i_k * BK
        m_here = m_k & (tl.load(p_valid + o_k, mask=m_k, other=0) != 0)
    p_k += i_b * s_kb + i_kv % KV * s_kh + i_k * BK * s_ks
    p_v += i_b * s_vb + i_kv % KV * s_vh + i_k * BK * s_vs
    p_dk += (i_kv * SK + i_k * BK) * D
    p_dv += (i_kv * SK + i_k * BK) * D
    b_level = 1 / tl.load(p_level + i_kv)

    b_phi = tl.zeros((TILE_M, HALVES * TILE_D), tl.float32)
    b_dphi = tl.zeros((TILE_M, HALVES * TILE_D), tl.float32)
    b_z = tl.zeros((HALVES * TILE_D,), tl.float32)
    for i_col in tl.range(0, D, TILE_V, num_stages=1):  # the loops inside are those to overlap
        o_v = i_col + tl.arange(0, TILE_V)
        b_h = tl.zeros((HALVES * TILE_D, TILE_V), tl.float32)
        b_z = tl.zeros((HALVES * TILE_D,), tl.float32)
        for i in range(0, GROUP):
            i_h = i_kv % KV * GROUP + i
            i_bh = i_kv * GROUP + i
            n, n_tokens = 0, 0
            p_row = p_list
            if RESTRICTED:
                n = tl.load(p_count + i_b * s_cb + i_h * s_ch + i_k)
                p_row += i_b * s_lb + i_h * s_lh + tl.load(p_start + i_b * s_sb + i_h * s_sh + i_k)
                n_tokens = tl.load(p_all + i_bh)
            b_head, b_head_z = _left(
                p_sum + i_bh * F * D,
                p_mass + i_bh * F,
                p_phi + i_bh * SQ * F,
                p_grad + i_b * s_gb + i_h * s_gh,
                p_block_mass + i_bh * Q * F,
                p_tokens + i_bh * Q,
                p_row,
                n,
                n_tokens,
                s_gs,
                o_v,
                SQ,
                Q,
                D,
                BQ,
                TILE_N,
                TILE_D,
                HALVES,
                RESTRICTED,
                False,
                PRECISION,
            )
            b_h += b_head
            b_z += b_head_z
        b_h = (b_h * b_level).to(p_grad.dtype.element_ty)
        m_kv = m_k[:, None] & (o_v < D)[None, :]
        b_mean = tl.load(p_mean + i_kv * D + o_v, mask=o_v < D, other=0.0)
        b_v = tl.load(p_v + (o_k[:, None] * s_vs + o_v[None, :]), mask=m_kv, other=0.0)
        b_v = b_v.to(tl.float32) - b_mean[None, :]
        b_dphi = tl.dot(b_v.to(b_h.dtype), tl.trans(b_h), b_dphi, input_precision=PRECISION)
        # Loaded late, and again for further columns: making the state takes all registers.
        b_phi = _load_features(p_k, o_k, s_ks, m_here, MAP, D, TILE_D, HALVES)
        b_dv = tl.dot(b_phi.to(b_h.dtype), b_h, input_precision=PRECISION)
        tl.store(p_dv + o_k[:, None] * D + o_v[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_kv)

    b_dk = _pull_back(b_phi, b_dphi + (b_z * b_level)[None, :], MAP, TILE_D, HALVES)
    o_d = tl.arange(0, TILE_D)
    m_dk = m_k[:, None] & (o_d < D)[None, :]
    tl.store(p_dk + o_k[:, None] * D + o_d[None, :], b_dk.to(p_dk.dtype.element_ty), mask=m_dk)


# The sums of a head are cut into chunks until about so many programs run, whatever the GPU: results do not
# depend on it, and the largest has 160 multiprocessors.
PROGRAMS = 512
# Without a plan: queries that read a state loaded once, and keys whose mass is summed up at a time.
BLOCKS = (512, 256)


def configure(
    kernel: Any,
    head_dim: int,
    feature_map: str,
    dtype: torch.dtype,
    block: tuple[int, int],
    restricted: bool,
    target: Target,
) -> dict[str, Any]:
    """Constants of a kernel that follow from these, and its launch options.

    Args:
        kernel: One of this file.
        block: Tokens of a query and of a key block; `state_kernel` sums over the latter.
        restricted: Whether there is a plan.
        target: Its shared memory decides how many stages of loads are in flight.
    """
    name, halves = _halves(feature_map)
    read, summed = block[::-1] if kernel is key_kernel else block
    d = max(16, triton.next_power_of_2(head_dim))
    features = d * halves
    # Sizes are for 16 bits an element. A float32 product is made of halves of its operands: twice the room.
    row = features * dtype.itemsize // 2
    stored = dtype.itemsize * 2 if dtype == torch.float32 else dtype.itemsize
    # A state is the accumulator of the inner loop: at most 64 KiB of registers.
    v = max(16, min(d, (1 << 14) // row))
    # Fewer rows of many features keep registers free; AMD's compiler spills with fewer.
    m = max(16, min(64, (1 << 14 if target.is_amd else 1 << 13) // row, triton.next_power_of_2(read)))
    n = max(16, min(64, (1 << 13) // row, triton.next_power_of_2(summed)))
    stages = (target.shared // stored - features * v) // max(n * (features + v), m * features)
    constants = {
        "MAP": name,
        "D": head_dim,
        "TILE_N": n,
        "TILE_D": d,
        "TILE_V": v,
        "HALVES": halves,
        "RESTRICTED": restricted,
        "PRECISION": precision(dtype),
        "num_warps": 8 if features * v * stored >= 1 << 15 else 4,
        "num_stages": max(1, min(3, stages)),
    }
    if kernel is state_kernel:  # whose features are made in registers: fewer at a time
        return constants | {"BLOCK": summed, "TILE_N": max(16, n // 2)}
    return constants | {"BQ": block[0], "BK": block[1], "TILE_M": m}


class _State(NamedTuple):
    """What `_left` reads of all heads; [B, H] before the axes named here."""

    sum: Tensor  # [F, D]
    mass: Tensor  # [F]
    phi: Tensor  # [S, F]
    block_mass: Tensor  # [K, F]
    tokens: Tensor  # [K]
    all: Tensor  # []


def _summed(
    x: Tensor,
    v: Tensor,
    block: int,
    valid: Tensor | None,
    feature_map: str,
    restricted: bool,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
) -> _State:
    batch, heads, length, dim = x.shape
    constants = configure(
        state_kernel, dim, feature_map, v.dtype, (1, block), restricted, target_of(x.device)
    )
    features, blocks = dim * constants["HALVES"], triton.cdiv(length, block)
    columns = triton.cdiv(dim, constants["TILE_V"])
    chunk = triton.cdiv(blocks, triton.cdiv(PROGRAMS, batch * heads * columns))
    chunks = triton.cdiv(blocks, chunk)
    # Only what is left after a list needs more than sums.
    kept = (blocks, length) if restricted else (0, 0)
    part = torch.empty((batch, heads, chunks, features, dim), dtype=torch.float32, device=x.device)
    block_mass = torch.empty((batch, heads, blocks, features), dtype=torch.float32, device=x.device)
    tokens = torch.empty((batch, heads, kept[0]), dtype=torch.int32, device=x.device)
    phi = torch.empty((batch, heads, kept[1], features), dtype=v.dtype, device=x.device)
    state_kernel[chunks * columns, batch * heads](
        x,
        v,
        x if scale is None else scale,
        x if weight is None else weight,
        x if valid is None else valid,
        part,
        block_mass,
        tokens,
        phi,
        *x.stride()[:3],
        *v.stride()[:3],
        *lead_strides(valid),
        heads,
        length,
        blocks,
        chunk,
        SCALED=scale is not None,
        HAS_VALID=valid is not None,
        **constants,
    )
    return _State(part.sum(2), block_mass.sum(2), phi, block_mass, tokens, tokens.sum(-1, dtype=torch.int32))


def _halves(feature_map: str) -> tuple[str, int]:
    """The map of one half of the features, and how many halves there are."""
    return ("softmax", 2) if feature_map == "hedgehog" else (feature_map, 1)


def _mean(keys: _State) -> Tensor:
    """Mean of v over a head's keys, [B, KV, D]; weighted by their features, but any vector would do."""
    mass = keys.mass.sum(-1, keepdim=True)
    return keys.sum.sum(-2) / mass.masked_fill(mass == 0, 1)


def _row_lists(indices: Tensor | None, counts: Tensor | None) -> Columns | None:
    """A plan's lists one after another, as the transposed ones are."""
    if indices is None or counts is None:
        return None
    rows, width = indices.shape[2:]
    starts = torch.arange(0, rows * width, width, dtype=torch.int32, device=indices.device)
    return Columns(indices.flatten(2), starts[None, None], counts)


def _arguments(state: _State, lists: Columns | None) -> tuple[list[Tensor], list[int]]:
    """Pointers to a state and to the lists of what to leave of it, and strides of the lists."""
    if lists is None:  # addresses that are not read
        return [*state, *[state.tokens] * 3], [0] * 6
    return [*state, *lists], [s for x in lists for s in lead_strides(x)]


def _programs(length: int, block: int, tile: int) -> int:
    """Tiles of all blocks, those after the last token left out where tiles fill blocks."""
    if block % tile == 0:
        return triton.cdiv(length, tile)
    return triton.cdiv(length, block) * triton.cdiv(block, tile)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    valid: Tensor | None,
    block: list[int],
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check(q)
    q, k, v = map(unit_stride, (q, k, v))
    batch, heads, queries, dim = q.shape
    restricted = indices is not None
    bq, bk = block if restricted else BLOCKS
    keys = _summed(k, v, bk, valid, feature_map, restricted)
    pointers, strides = _arguments(keys, _row_lists(indices, counts))
    out, inverse = empty_results(q)
    constants = configure(output_kernel, dim, feature_map, q.dtype, (bq, bk), restricted, target_of(q.device))
    output_kernel[triton.cdiv(queries, bq) * triton.cdiv(dim, constants["TILE_V"]), batch * heads](
        q,
        v,
        _mean(keys),
        *pointers,
        out,
        inverse,
        *q.stride()[:3],
        *v.stride()[:3],
        *strides,
        heads,
        k.shape[1],
        queries,
        k.shape[2],
        keys.block_mass.shape[2],
        eps,
        **constants,
    )
    return out, inverse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inverse: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    valid: Tensor | None,
    block: list[int],
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = map(unit_stride, (grad, q, k, v))
    batch, heads, queries, dim = q.shape
    kv_heads, length = k.shape[1:3]
    restricted = indices is not None
    bq, bk = block if restricted else BLOCKS
    keys = _summed(k, v, bk, valid, feature_map, restricted)
    columns = keys.block_mass.shape[2]
    mean, level = _mean(keys), keys.mass.mean(-1)
    level = level.masked_fill(level == 0, 1)
    dq, dk, dv, scale, weight = empty_as(q, k, v, inverse, inverse)

    target = target_of(q.device)
    constants = configure(query_kernel, dim, feature_map, q.dtype, (bq, bk), restricted, target)
    pointers, strides = _arguments(keys, _row_lists(indices, counts))
    query_kernel[_programs(queries, bq, constants["TILE_M"]), batch * heads](
        q,
        v,
        grad,
        inverse,
        mean,
        level,
        *pointers,
        dq,
        scale,
        weight,
        *q.stride()[:3],
        *v.stride()[:3],
        *grad.stride()[:3],
        *strides,
        heads,
        kv_heads,
        queries,
        length,
        columns,
        eps,
        **constants,
    )

    # Keys read queries as queries read keys, by the transposed lists.
    state = _summed(q, grad, bq, None, feature_map, restricted, scale, weight)
    lists = None if indices is None or counts is None else transpose(indices, counts, columns)
    pointers, strides = _arguments(state, lists)
    constants = configure(key_kernel, dim, feature_map, q.dtype, (bq, bk), restricted, target)
    key_kernel[_programs(length, bk, constants["TILE_M"]), batch * kv_heads](
        k,
        v,
        grad,
        k if valid is None else valid,
        mean,
        level,
        *pointers,
        dk,
        dv,
        *k.stride()[:3],
        *v.stride()[:3],
        *grad.stride()[:3],
        *strides,
        *lead_strides(valid),
        kv_heads,
        queries,
        length,
        state.block_mass.shape[2],
        GROUP=heads // kv_heads,
        HAS_VALID=valid is not None,
        **constants,
    )
    return dq, dk, dv


attention = define("triton", _forward, _backward)


CASES: tuple[tuple[torch.dtype, str, int, tuple[int, int] | None], ...] = (
    (torch.bfloat16, "softmax", 128, None),
    (torch.bfloat16, "softmax", 128, (64, 64)),
    (torch.bfloat16, "softmax", 128, (128, 64)),
    (torch.bfloat16, "softmax", 64, (64, 64)),
    (torch.bfloat16, "hedgehog", 128, None),
    (torch.float16, "elu", 64, None),
)
IN_CI = {("sm_90", "output_kernel", 128, (64, 64)), ("sm_80", "state_kernel", 64, (64, 64))}


def variants(target: Target) -> list[Variant]:
    """What ahead-of-time compilation records: the two variants of SLA, and LinVideo's features."""
    integers = ("tokens", "all", "list", "start", "count")
    floats = ("scale", "weight", "part", "sum", "mass", "block_mass", "mean", "level", "inverse")
    pointers = {f"p_{x}": "*i32" for x in integers} | {f"p_{x}": "*fp32" for x in floats}
    pointers["p_valid"] = "*i1"
    out = []
    for dtype, feature_map, dim, block in CASES:
        restricted = block is not None
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        for kernel in (state_kernel, output_kernel, query_kernel, key_kernel):
            names = kernel.arg_names
            constants = configure(kernel, dim, feature_map, dtype, block or BLOCKS, restricted, target)
            constants |= {"SCALED": False, "HAS_VALID": restricted, "GROUP": 1}
            types = {n: pointers.get(n, f"*{name}") if n.startswith("p_") else "i32" for n in names}
            types["EPS"] = "fp32"
            out.append(
                Variant(
                    kernel,
                    f"{name} D{dim} {feature_map} {f'rest {block[0]}x{block[1]}' if block else 'all'}",
                    {n: kind for n, kind in types.items() if n in names and n not in constants},
                    {n: value for n, value in constants.items() if n in names},
                    frozenset(
                        n for n in names if n.startswith("p_") or n[:3] in ("s_q", "s_k", "s_x", "s_v", "s_g")
                    ),
                    constants["num_warps"],
                    constants["num_stages"],
                    may_spill=kernel in (query_kernel, key_kernel),
                    in_ci=(target.name, kernel.__name__, dim, block) in IN_CI,
                )
            )
    return out
