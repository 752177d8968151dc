"""Parameters and schedules of the methods that were published for HunyuanVideo, by intent.

Densities of static methods at the sparse calls, 720x1280 and 129 frames with 256 text tokens:

=============  =======  ========  ====
method         quality  balanced  fast
=============  =======  ========  ====
radial         0.32     0.27      0.22
neighborhood   0.47     0.29      0.10
sliding_tile   0.37     0.23      0.08
=============  =======  ========  ====
"""

from __future__ import annotations

from collections.abc import Mapping

from dit_sparse.pipelines.family import Preset

_RADIAL = "mit-han-lab/radial-attention at 72788d4"
_RADIAL_PAPER = "arXiv 2506.19852"
_DRAFT = (
    "shawnricecake/draft-attention at f3c81d5: t > 945 (15 of 50 steps at shift 7) and blocks 0 and 1 dense; "
    "arXiv 2505.14708, Table 1, 768p: sparsity"
)
_ADASPA = "arXiv 2502.21079: 10 of 50 steps dense, searches at steps 10 and 30; sparsity"
_SPARSE_VDIT = "arXiv 2506.03065: 10 of 50 steps dense"
_GNA = "arXiv 2504.16922, 117 frames at 768x1280 on a B200, 15 of 50 steps dense"
_STA = "windows of arXiv 2502.04507; 15 of 50 steps dense as GNA, arXiv 2504.16922"
_BLOCKS = {"stride": (2, 8, 8), "exact": False}

PRESETS: dict[tuple[str, str], Mapping[str, Preset]] = {
    ("radial", "13b"): {
        "quality": Preset(
            {"decay": 1.0},
            "dense 0-24%; layers 0",
            f"{_RADIAL_PAPER}: one dense block and the first frame as sink for all models; decay of "
            "mit-han-lab/radial-attention before July 2025",
        ),
        "balanced": Preset(
            {"decay": 0.95, "sink": False},
            "dense 0-24%",
            f"{_RADIAL}, hunyuan_t2v_inference: 12 of 50 steps dense, no sink; {_RADIAL_PAPER}, Table 1, 117 "
            "frames at 768x1280: PSNR 27.3, 1.88x on an H100",
        ),
        "fast": Preset(
            {"decay": 0.5, "sink": False},
            "dense 0-24%",
            f"unpublished for this model: the default decay of the mask function of {_RADIAL}",
        ),
    },
    ("draft", "13b"): {
        "quality": Preset({"density": 0.4}, "dense 0-30%; layers 0-1", f"{_DRAFT} 0.6, PSNR 32.1, 1.31x"),
        "balanced": Preset({"density": 0.2}, "dense 0-30%; layers 0-1", f"{_DRAFT} 0.8, PSNR 29.2, 1.58x"),
        "fast": Preset({"density": 0.1}, "dense 0-30%; layers 0-1", f"{_DRAFT} 0.9, PSNR 24.2, 1.75x"),
    },
    ("adaspa", "13b"): {
        "quality": Preset({"density": 0.3}, "dense 0-20%", f"{_ADASPA} 0.7, of its sweep"),
        "balanced": Preset({"density": 0.2}, "dense 0-20%", f"{_ADASPA} 0.8: PSNR 29.1, 1.78x on an A100"),
        "fast": Preset({"density": 0.1}, "dense 0-20%", f"{_ADASPA} 0.9, of its sweep"),
    },
    ("sparse_vdit", "13b"): {
        "quality": Preset(
            {"share": 0.2, "budget": 0.3}, "dense 0-20%", f"{_SPARSE_VDIT}; share and budget unpublished"
        ),
        "balanced": Preset(
            {"share": 0.15, "budget": 0.15},
            "dense 0-20%",
            f"{_SPARSE_VDIT}; 257 of 612 PFLOPs come to density 0.15 at the others; PSNR 27.1, 1.85x on an "
            "A800; share unpublished",
        ),
        "fast": Preset(
            {"share": 0.1, "budget": 0.1}, "dense 0-20%", f"{_SPARSE_VDIT}; share and budget unpublished"
        ),
    },
    ("neighborhood", "13b"): {
        "quality": Preset(
            {**_BLOCKS, "window": (-1, 40, 40)},
            "dense 0-30%",
            f"{_GNA}: window (30, 40, 40), all frames, 58 % sparse; VBench above dense attention",
        ),
        "balanced": Preset(
            {**_BLOCKS, "window": (-1, 24, 40)}, "dense 0-30%", f"unpublished: between the two of {_GNA}"
        ),
        "fast": Preset(
            {**_BLOCKS, "window": (18, 24, 24), "stride": (16, 8, 8)},
            "dense 0-30%",
            f"{_GNA}: 91 % sparse, 1.63x",
        ),
    },
    ("sliding_tile", "13b"): {
        "quality": Preset({"window": (5, 5, 5)}, "dense 0-30%", f"{_STA}: 58 % sparse"),
        "balanced": Preset({"window": (5, 3, 5)}, "dense 0-30%", f"unpublished: between the two {_STA}"),
        "fast": Preset({"window": (3, 3, 3)}, "dense 0-30%", f"{_STA}: 91 % sparse"),
    },
}
