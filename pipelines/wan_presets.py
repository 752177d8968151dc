"""Parameters and schedules of every method for the sizes of Wan, by intent; what each number comes from.

Where nothing was published for a size, its source says so. Radial's script and helper are those of
github.com/mit-han-lab/radial-attention at 72788d4, its tables those of the paper, arXiv 2506.19852; densities
are of the sparse calls alone, at the size named per model:

=====  ========  =============================================  =======  ================================
size   intent    setting                                        density  from
=====  ========  =============================================  =======  ================================
1.3b   quality   decay 1, 13 of 50 steps and layers 0-1 dense   0.46     480x832, 81 frames; decay of the
                                                                         script's command line, Table B
1.3b   balanced  decay 0.2, 12 of 50 steps and layer 0 dense    0.37     the Wan2.1 script
1.3b   fast      decay 0.2, block 64, 8 of 50 steps, layer 0    0.28     Table B; block of Wan2.2
14b    quality   decay 1, 13 of 50 steps and layers 0-1 dense   0.41     720x1280, 81 frames; as 1.3b
14b    balanced  decay 0.2, 12 of 50 steps and layer 0 dense    0.27     the Wan2.1 script; Table 1 (768x1280,
                                                                         69 frames): PSNR 23.9, 1.77x
14b    fast      decay 0.2, 8 of 50 steps and layer 0 dense     0.27     Table B: PSNR 21.7 with 8 dense
                                                                         steps, 23.2 with 11, 23.6 with 12
a14b   quality   decay 1, block 64, 12 of 40, layers 0-1        0.39     720x1280, 81 frames; decay as above
a14b   balanced  decay 0.8, block 64, 11 of 40 steps, layer 0   0.35     the Wan2.2 script
a14b   fast      decay 0.8, block 64, 5 of 40, layers 0-1       0.35     defaults of the Wan2.2 helper
5b     quality   as a14b                                        0.31     704x1280, 121 frames; unpublished
5b     others    as a14b                                        0.27     unpublished
tiny   quality   decay 1, block 32, frames down to bands of 64  0.36     64x128, 65 frames; unpublished
tiny   balanced  decay 1, block 32                              0.25     unpublished
tiny   fast      decay 0.2, block 32                            0.23     unpublished
=====  ========  =============================================  =======  ================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dit_sparse.pipelines.family import Preset

Intents = dict[str, Preset]


def _elsewhere(presets: Intents) -> Intents:
    """The same for a size they were not published for."""
    return {name: replace(p, source=f"unpublished for this size; {p.source}") for name, p in presets.items()}


def _tiny(schedules: tuple[str, str, str], shared: Mapping[str, Any], *own: Mapping[str, Any]) -> Intents:
    """Quality, balanced and fast of the bundled model."""
    return {
        name: Preset({**shared, **parameters}, schedule, "unpublished: chosen for tiny-wan")
        for name, parameters, schedule in zip(("quality", "balanced", "fast"), own, schedules, strict=True)
    }


_CAREFUL = ("dense 0-25%; layers 0", "dense 0-25%", "dense 0-10%")

_RADIAL = "mit-han-lab/radial-attention at 72788d4, "
_RADIAL_PAPER = "arXiv 2506.19852, "
_HALF_BLOCK = {"block": 64}
_SMALL_BLOCK = {"block": 32, "decay": 1.0}

_WAN22 = {
    "quality": Preset(
        {**_HALF_BLOCK, "decay": 1.0},
        "dense 0-30%; layers 0-1",
        f"{_RADIAL}default decay of the command line; 30 % warm-up as in SVG2, arXiv 2505.18875",
    ),
    "balanced": Preset(
        {**_HALF_BLOCK, "decay": 0.8},
        "dense 0-27.5%; layers 0",
        f"{_RADIAL}wan_22_t2v_inference: decay 0.8, block 64, 11 of 40 steps and 1 layer dense",
    ),
    "fast": Preset(
        {**_HALF_BLOCK, "decay": 0.8},
        "dense 0-12.5%; layers 0-1",
        f"{_RADIAL}defaults of the Wan2.2 helper: decay 0.8, 5 steps and 2 layers dense",
    ),
}
_WAN21_QUALITY = Preset(
    {"decay": 1.0},
    "dense 0-26%; layers 0-1",
    f"{_RADIAL}default decay of the command line; {_RADIAL_PAPER}Table B: no gain past 12 of 50 dense steps",
)
_WAN21_BALANCED = Preset(
    {"decay": 0.2},
    "dense 0-24%; layers 0",
    f"{_RADIAL}wan_t2v_inference: decay 0.2, 12 of 50 steps and 1 layer dense; "
    f"{_RADIAL_PAPER}Table 1: 14B at 768x1280x69, PSNR 23.9, SSIM 0.842, 1.77x on an H100",
)
_WARM_UP = f"{_RADIAL_PAPER}Table B: at equal compute, PSNR 21.7 with 8 and 23.6 with 12 of 50 dense steps"


_DRAFT_CODE = "shawnricecake/draft-attention at f3c81d5"
_DRAFT_PAPER = "arXiv 2505.14708, "
_DRAFT_BY_FRAME = {"density": 0.2, "sink": True, "same_frame": True}
_LIGHTX2V = "LightX2V: sparsity 0.8 with the first and the own frame"
_DRAFT = {
    "quality": Preset(
        {"density": 0.45},
        "dense 0-30%; layers 0",
        f"{_DRAFT_PAPER}Table 1: 768p at sparsity 0.55, PSNR 29.2, 1.22x on an H100",
    ),
    "balanced": Preset(
        {"density": 0.25},
        "dense 0-30%; layers 0",
        f"{_DRAFT_CODE}: sparsity 0.75, block 0 and t > 925 dense (15 of 50 steps at shift 5); "
        f"{_DRAFT_PAPER}Table 1: PSNR 27.2, 1.42x",
    ),
    "fast": Preset(
        _DRAFT_BY_FRAME, "dense 0-25%; layers 0", f"{_LIGHTX2V}; dense steps as in the text of {_DRAFT_PAPER}"
    ),
}
_DRAFT_480P = {
    "quality": Preset({"density": 0.45}, "dense 0-25%; layers 0", f"{_DRAFT_PAPER}sparsity 0.55"),
    "balanced": Preset(
        {"density": 0.25},
        "dense 0-20%; layers 0",
        f"{_DRAFT_CODE}: sparsity 0.75; t > 925 is 10 of 50 steps at shift 3",
    ),
    "fast": Preset(_DRAFT_BY_FRAME, "dense 0-20%; layers 0", _LIGHTX2V),
}

_ADASPA_PAPER = "arXiv 2502.21079 (HunyuanVideo, CogVideoX1.5): "
_ADASPA = {
    "quality": Preset({"density": 0.3}, "dense 0-20%", f"{_ADASPA_PAPER}its sweep, sparsity 0.7"),
    "balanced": Preset(
        {"density": 0.2},
        "dense 0-20%",
        f"{_ADASPA_PAPER}sparsity 0.8, searches at steps 10 and 30 of 50; HunyuanVideo PSNR 29.1, 1.78x on "
        "an A100",
    ),
    "fast": Preset({"density": 0.1}, "dense 0-20%", f"{_ADASPA_PAPER}its sweep, sparsity 0.9"),
}

_SPARSE_VDIT = {
    "quality": Preset(
        {"share": 0.3, "budget": 0.45},
        "dense 0-25%",
        "unpublished; arXiv 2506.03065 keeps 10 of 50 steps dense",
    ),
    "balanced": Preset(
        {"share": 0.2, "budget": 0.3},
        "dense 0-20%",
        "arXiv 2506.03065: 10 of 50 steps dense; its 397 of 660 PFLOPs come to density 0.30 at the others; "
        "share unpublished",
    ),
    "fast": Preset({"share": 0.2, "budget": 0.2}, "dense 0-20%", "unpublished"),
}

_PARO_PAPER = "arXiv 2506.16054, "
_PARO_MASKS = {"block": 64, "masks": 4}
_PARO = {
    "quality": Preset(
        {**_PARO_MASKS, "density": 0.5},
        "dense 0-20%",
        f"{_PARO_PAPER}dense rate 0.5: PSNR 22.02; jamescsq47/PAROAtten at 3ac854f: 4 masks; warm-up "
        "unpublished",
    ),
    "balanced": Preset(
        {**_PARO_MASKS, "density": 0.3},
        "always",
        f"{_PARO_PAPER}dense rate 0.3: PSNR 21.73, attention 2.71x on an A100; no dense steps",
    ),
    "fast": Preset(
        {**_PARO_MASKS, "density": 0.2},
        "always",
        f"{_PARO_PAPER}dense rate 0.2: attention 3.81x on an A100; no dense steps",
    ),
}

_RETTENTION_PAPER = "unpublished for Wan; arXiv 2505.22918: refresh every 5 steps, lambda 0.04, "


def _rettention(**residual: str) -> Intents:
    return {
        "quality": Preset(
            {**residual, "period": 3}, "dense 0-30%; layers 0", f"{_RETTENTION_PAPER}period 3 unpublished"
        ),
        "balanced": Preset(residual, "dense 0-30%", f"{_RETTENTION_PAPER}15 of 50 steps dense (CogVideoX)"),
        "fast": Preset(
            {"residual": "float8"} | residual, "dense 0-20%", f"{_RETTENTION_PAPER}10 of 50 (HunyuanDiT)"
        ),
    }


_SPARSED_PAPER = "arXiv 2509.24014, for language models: 20 % of the steps dense, "
_SPARSED = {
    "quality": Preset(
        {"density": 0.5}, "dense 0-20%; layers 0", f"{_SPARSED_PAPER}50 % of the blocks (short)"
    ),
    "balanced": Preset({"density": 0.3}, "dense 0-20%", f"{_SPARSED_PAPER}30 % of the blocks (long)"),
    "fast": Preset({"density": 0.2}, "dense 0-20%", f"{_SPARSED_PAPER}20 % of the blocks unpublished"),
}

_GNA = (
    "densities between the 58 % and 91 % sparse settings of arXiv 2504.16922, 15 of 50 steps dense as there"
)
_STA = "arXiv 2502.04507 scaled to a grid of whole tiles"
_WARM = ("dense 0-30%; layers 0", "dense 0-30%", "dense 0-16%")


def _windows(tile: tuple[int, int, int], *windows: tuple[int, int, int]) -> tuple[Intents, Intents]:
    """GNA and STA with the same windows: of whole tiles, so that no block is read in part at any size."""
    names, gna, sta = ("quality", "balanced", "fast"), {}, {}
    for name, window, schedule in zip(names, windows, _WARM, strict=True):
        tokens = tuple(w * t if w > 0 else w for w, t in zip(window, tile, strict=True))
        own = {"tile": tile, "stride": tile, "exact": False, "window": tokens}
        gna[name] = Preset(own, schedule, f"unpublished for Wan: {_GNA}")
        sta[name] = Preset({"tile": tile, "window": window}, schedule, f"unpublished for Wan: {_STA}")
    return gna, sta


# Their tiles divide the grids; densities .39 .28 .17 (480p), .39 .20 .12 (720p), .41 .21 .14 (5B).
_GNA_480P, _STA_480P = _windows((3, 10, 4), (7, 3, 5), (5, 3, 5), (5, 3, 3))
_GNA_720P, _STA_720P = _windows((3, 5, 8), (7, 7, 5), (5, 5, 5), (5, 5, 3))
_GNA_5B, _STA_5B = _windows((1, 11, 8), (21, 2, 3), (11, 2, 3), (7, 2, 3))

_TILES = "unpublished for Wan; near the share of global frames of {} of arXiv 2502.06155, Table 1"


def _frames(quality: int, balanced: int, fast: int) -> Intents:
    return {
        "quality": Preset({"frames": quality}, "dense 0-25%", _TILES.format("6:18")),
        "balanced": Preset({"frames": balanced}, "dense 0-25%", _TILES.format("4:20")),
        "fast": Preset({"frames": fast}, "dense 0-10%", _TILES.format("3:21")),
    }


_VMOBA_TABLE = "arXiv 2506.23858, training-free table, "


def _chunks(balanced: str, **chunks: Any) -> Intents:
    return {
        "quality": Preset({**chunks, "share": 0.4}, "dense 0-25%", f"a larger share than {_VMOBA_TABLE}"),
        "balanced": Preset({**chunks, "share": 0.25}, "dense 0-25%", balanced),
        "fast": Preset({**chunks, "share": 0.15}, "dense 0-25%", f"a smaller share than {_VMOBA_TABLE}"),
    }


_VMOBA_480P = _chunks(
    f"{_VMOBA_TABLE}81x480x832: local top 2/6/18 of 7/24/72; first 25 % of the steps dense",
    temporal=3,
    spatial=(5, 13),
    volume=(7, 5, 13),
)
_VMOBA_720P = _chunks(
    f"{_VMOBA_TABLE}81x720x1280: local top 2/10/9 of 7/40/36; 1.35x end to end",
    temporal=3,
    spatial=(9, 10),
    volume=(7, 15, 20),
)

_BLADE_PAPER = "2 dense steps as arXiv 2508.10774's training-free comparison"
_BLADE = {
    "quality": Preset({"most": 0.3}, "dense 0-1", f"more blocks than published; {_BLADE_PAPER}"),
    "balanced": Preset(
        {"most": 0.2, "summary": 30, "samples": 32},
        "dense 0-1",
        f"github.com/ziplab/VIDEO-BLADE, its Wan2.1 settings (density 0.23); {_BLADE_PAPER}",
    ),
    "fast": Preset(
        {"most": 0.17, "summary": 30},
        "dense 0-1",
        f"the model-agnostic fork of github.com/ziplab/VIDEO-BLADE (sparsity 0.797); {_BLADE_PAPER}",
    ),
}

_TURBO = "thu-ml/TurboDiffusion: "
_SLA = {
    "quality": Preset(
        {"ratio": 0.15, "block": (128, 64)}, "always", f"{_TURBO}ratio 0.15 for quality; needs its training"
    ),
    "balanced": Preset(
        {"ratio": 0.1, "block": (128, 64)}, "always", f"{_TURBO}its default; needs its training"
    ),
    "fast": Preset(
        {"ratio": 0.05, "linear": "rest", "skip": 0.1},
        "always",
        "arXiv 2509.24006: 5 % critical, 10 % skipped; needs its training",
    ),
}
_LINVIDEO = Preset(
    {"linear_layers": (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 22, 24, 29)},
    "always",
    "arXiv 2510.08318: 16 of 30 layers, 1.43x; needs its training",
)
_VSA = {
    "quality": Preset({"keep": 0.3}, "dense 0-25%; layers 0", "unpublished without training"),
    "balanced": Preset(
        {"keep": 0.2},
        "dense 0-25%; layers 0",
        "hao-ai-lab/FastVideo trains 1.3B at sparsity 0.8; the dense steps are unpublished",
    ),
    "fast": Preset(
        {"keep": 0.1},
        "dense 0-25%; layers 0",
        "hao-ai-lab/FastVideo trains 14B at sparsity 0.9; the dense steps are unpublished",
    ),
}

PRESETS: dict[tuple[str, str], Intents] = {
    ("radial", "1.3b"): {
        "quality": _WAN21_QUALITY,
        "balanced": _WAN21_BALANCED,
        "fast": Preset({**_HALF_BLOCK, "decay": 0.2}, "dense 0-16%; layers 0", _WARM_UP),
    },
    ("radial", "14b"): {
        "quality": _WAN21_QUALITY,
        "balanced": _WAN21_BALANCED,
        "fast": Preset({"decay": 0.2}, "dense 0-16%; layers 0", _WARM_UP),
    },
    ("radial", "a14b"): _WAN22,
    ("radial", "5b"): {
        name: Preset(p.parameters, p.schedule, f"unpublished for this model; as Wan2.2 A14B: {p.source}")
        for name, p in _WAN22.items()
    },
    ("radial", "tiny"): {
        "quality": Preset(
            {**_SMALL_BLOCK, "decimate_below": 64},
            "dense 0-25%; layers 0",
            "unpublished: chosen for tiny-wan",
        ),
        "balanced": Preset(
            {**_SMALL_BLOCK}, "dense 0-25%", "unpublished: chosen for tiny-wan, density below 0.3"
        ),
        "fast": Preset({"block": 32, "decay": 0.2}, "dense 0-10%", "unpublished: chosen for tiny-wan"),
    },
    ("draft", "1.3b"): _elsewhere(_DRAFT_480P),
    ("draft", "14b"): _DRAFT,
    ("draft", "a14b"): _elsewhere(_DRAFT),
    ("draft", "5b"): _elsewhere(_DRAFT),
    ("draft", "tiny"): _tiny(
        _CAREFUL, {"pool": (4, 8), "same_frame": True}, {"density": 0.4}, {"density": 0.25}, {"density": 0.2}
    ),
    **{("adaspa", size): _elsewhere(_ADASPA) for size in ("1.3b", "14b", "a14b", "5b")},
    ("adaspa", "tiny"): _tiny(
        ("dense 0-20%", "dense 0-20%", "dense 0-10%"),
        {"block": 32, "recall": 0.9},
        {"density": 0.4},
        {"density": 0.2},
        {"density": 0.15},
    ),
    ("sparse_vdit", "14b"): _SPARSE_VDIT,
    **{("sparse_vdit", size): _elsewhere(_SPARSE_VDIT) for size in ("1.3b", "a14b", "5b")},
    ("sparse_vdit", "tiny"): _tiny(
        ("dense 0-25%", "dense 0-25%", "dense 0-10%"),
        {"block": 32},
        {"share": 0.4, "budget": 0.4},
        {},
        {"share": 0.2, "budget": 0.205},
    ),
    ("paro", "14b"): _PARO,
    **{("paro", size): _elsewhere(_PARO) for size in ("1.3b", "a14b", "5b")},
    ("paro", "tiny"): _tiny(
        ("dense 0-25%, 92-100%",) * 3, {"block": 32}, {"density": 0.4}, {"density": 0.3}, {"density": 0.2}
    ),
    ("rettention", "1.3b"): _rettention(),
    # R takes 29 GiB for each branch at 720p.
    ("rettention", "14b"): _rettention(residual="cpu"),
    ("rettention", "a14b"): _rettention(residual="cpu"),
    ("rettention", "5b"): _rettention(),
    ("rettention", "tiny"): _tiny(
        ("dense 0-25%; layers 0", "dense 0-25%", "dense 0-15%"), {}, {"period": 3}, {}, {"residual": "float8"}
    ),
    **{("sparsed", size): _elsewhere(_SPARSED) for size in ("1.3b", "14b", "a14b", "5b")},
    ("sparsed", "tiny"): _tiny(
        ("dense 0-20%", "dense 0-20%", "dense 0-15%"),
        {"block": 32},
        {"density": 0.5},
        {"density": 0.3},
        {"density": 0.2},
    ),
    ("neighborhood", "1.3b"): _GNA_480P,
    ("neighborhood", "14b"): _GNA_720P,
    ("neighborhood", "a14b"): _GNA_720P,
    ("neighborhood", "5b"): _GNA_5B,
    ("neighborhood", "tiny"): _tiny(
        _CAREFUL,
        {"tile": (1, 8, 4), "stride": (1, 8, 4), "exact": False},
        {"window": (13, 8, 16)},
        {"window": (7, 8, 16)},
        {"window": (5, 8, 16)},
    ),
    ("sliding_tile", "1.3b"): _STA_480P,
    ("sliding_tile", "14b"): _STA_720P,
    ("sliding_tile", "a14b"): _STA_720P,
    ("sliding_tile", "5b"): _STA_5B,
    ("sliding_tile", "tiny"): _tiny(
        _CAREFUL, {"tile": (1, 8, 4)}, {"window": (13, 1, 4)}, {"window": (7, 1, 4)}, {"window": (5, 1, 4)}
    ),
    **{("efficient_vdit", size): _frames(6, 4, 2) for size in ("1.3b", "14b", "a14b")},
    ("efficient_vdit", "5b"): _frames(8, 6, 3),
    ("efficient_vdit", "tiny"): _tiny(
        ("dense 0-25%", "dense 0-25%", "dense 0-10%"),
        {"block": 32},
        {"frames": 8},
        {"frames": 5},
        {"frames": 3},
    ),
    ("vmoba", "1.3b"): _VMOBA_480P,
    ("vmoba", "14b"): _VMOBA_720P,
    ("vmoba", "a14b"): _elsewhere(_VMOBA_720P),
    ("vmoba", "5b"): _elsewhere(_chunks(f"chunk counts of {_VMOBA_TABLE}scaled to the grid")),
    ("vmoba", "tiny"): _tiny(
        _CAREFUL,
        {"temporal": 1.0, "spatial": (2, 4), "volume": (2, 4, 4)},
        {"share": 0.4},
        {"share": 0.25},
        {"share": 0.15},
    ),
    ("blade", "1.3b"): _BLADE,
    **{("blade", size): _elsewhere(_BLADE) for size in ("14b", "a14b", "5b")},
    ("blade", "tiny"): _tiny(
        _CAREFUL,
        {"block": 32},
        {"samples": 16, "most": 0.3},
        {"samples": 8, "most": 0.2},
        {"samples": 8, "most": 0.15},
    ),
    ("sla", "1.3b"): _SLA,
    ("sla", "14b"): _SLA,
    ("sla", "a14b"): _SLA,
    ("sla", "5b"): _elsewhere(_SLA),
    ("sla", "tiny"): _tiny(("always",) * 3, {"block": 32}, {"ratio": 0.4}, {"ratio": 0.25}, {"ratio": 0.15}),
    ("linvideo", "1.3b"): dict.fromkeys(("quality", "balanced", "fast"), _LINVIDEO),
    ("linvideo", "tiny"): _tiny(("always",) * 3, {"linear_layers": (2, 4, 6)}, {}, {}, {}),
    ("vsa", "1.3b"): _VSA,
    ("vsa", "14b"): _VSA,
    **{("vsa", size): _elsewhere(_VSA) for size in ("a14b", "5b")},
    ("vsa", "tiny"): _tiny(("dense 0-25%; layers 0",) * 3, {}, {"keep": 0.4}, {"keep": 0.2}, {"keep": 0.1}),
    **{
        (name, "tiny"): _tiny(_CAREFUL, {"block": 32}, {"density": 0.4}, {"density": 0.25}, {"density": 0.2})
        for name in ("window", "random")
    },
}
