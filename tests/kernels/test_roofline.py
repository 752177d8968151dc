"""ROOFLINE.md is what its command writes, and the bounds follow from the definition of attention."""

import pytest

from dit_sparse.kernels.bench import SHAPES, Shape
from dit_sparse.kernels.roofline import BLOCK, GPUS, MODELS, NOTE, render, works


def test_the_note_is_current():
    assert NOTE.read_text() == render(), "run make aot"


def test_sizes_are_those_of_the_models():
    shapes = [SHAPES[model] for model in MODELS]
    assert [(s.tokens, s.heads, s.head_dim) for (s,) in shapes] == [(75600, 40, 128), (119056, 24, 128)]


def test_dense_forward_by_counting():
    tokens, heads, head_dim = 3 * BLOCK, 2, 16
    work = next(w for w in works(Shape(tokens, heads, head_dim)) if w.name == "forward, dense")
    operations = memory = l2 = 0
    for _ in range(heads):
        memory += 4 * tokens * head_dim * 2 + tokens * 4 + 3 * 3 * 4
        for _ in range(tokens // BLOCK):  # tiles of queries
            for _ in range(tokens // BLOCK):  # blocks of keys
                operations += BLOCK * BLOCK * (2 * head_dim + 2 * head_dim)
                l2 += 2 * BLOCK * head_dim * 2
    assert (work.operations, work.memory, work.l2) == (operations, memory, l2)
    assert work.exponentials == heads * tokens**2


def test_the_busiest_unit_sets_the_bound():
    gpus = {gpu.name: gpu for gpu in GPUS}
    wan = {work.name: work for work in works(*SHAPES["wan2.1-14b-720p"])}
    forward = wan["forward, dense"]
    assert forward.operations == pytest.approx(4 * 75600**2 * 128 * 40)
    assert forward.bound(gpus["H100 SXM"]) == "118 tensor"  # 117 TFLOP at 989 TFLOP/s
    # Eight operations of a B200's tensor cores wait for one exponential where D is 128: 512 to 16 in a clock.
    assert forward.bound(gpus["B200 (HGX)"]) == "52 tensor, exp"
    assert wan["linear attention"].bound(gpus["A100 SXM 80 GB"]).endswith("memory")
    assert wan["quantised forward (fp8 scores, fp8 values), dense"].bound(gpus["A100 SXM 80 GB"]) == "no fp8"
