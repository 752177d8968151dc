"""Where the attention of a real model goes: what ``dit-sparse attention-maps`` captures, measures and draws.

    maps = BlockMaps(layers=(0, -1), heads=None, steps=(0, -1), branch=None, resolution=128)
    capture(pipe, maps, lambda: pipe("a cat runs"))
    maps.save(Path("maps"), about={})

A map [Q, K] is the share of the softmax mass of each query block that goes to each key block: the sum over
queries a of block i and keys c of block j of exp(scale * q_a . k_c - lse_a), over the number of queries of i.
Each row adds up to 1; rows without a query (padding only) are 0. Blocks are runs of tokens in raster order
within a frame, every frame starting a block, and after the grid history, reference and text tokens.

What :func:`measure` says of a map, as means over the queries of the grid, with f and p the frame of a block
and its place in the frame, y and x the mean row and column of its tokens:

    frame      sum of M over key blocks of the same frame
    position   sum of M over key blocks of the same place in other frames
    text       sum of M over key blocks after the grid (text, history, reference tokens)
    entropy    -sum of M ln M over ln K: 1 is even attention, 0 all on one block

and which pattern would capture how much at density 1/4. Every pattern orders the key blocks of a row by a
distance and keeps the nearest until their tokens are a quarter of all keys, of the last block what fits:

    spatial        (|df|, |dp|): the own frame first, then the next frames
    temporal       (|dp|, |df|): the same place in every frame first, then places beside it
    neighbourhood  max(|df| / F, |dy| / H, |dx| / W): a window of the grid's own proportions
    text           only what is after the grid
    best           by M itself: what no choice of blocks exceeds

An image has one frame, so that spatial and temporal say nothing of it and are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.calibration import Observer
from dit_sparse.kernels import block_mass
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.order import Order
from dit_sparse.video import staged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dit_sparse.pipelines.load import Source
    from dit_sparse.request import Request

DENSITY = 0.25
"""At which patterns are compared."""
LIMIT = 512 * 2**20
"""Bytes that all maps of a run may take."""
COLUMNS = 8
"""Heads beside each other on a sheet."""
BORDERS = 12
"""Frame borders drawn on a map: more would hide it."""


@dataclass(frozen=True, eq=False)
class Map:
    """One head's map.

    Args:
        model: Transformer: Wan2.2 has two.
        item: Which batch item; a "cond_uncond" call has the two halves of guidance as items.
        mass: float32 [Q, K], on the CPU.
        queries, keys: int64 [Q] and [K], tokens of each block that ask and that may be read.
    """

    model: str
    step: int | None
    layer: int
    head: int
    branch: str
    item: int
    block: int
    layout: TokenLayout
    mass: Tensor
    queries: Tensor
    keys: Tensor

    @property
    def name(self) -> str:
        """ "step/layer/head/branch", and ".item" where there is more than one."""
        return f"{'?' if self.step is None else self.step}/{self.layer}/{self.head}/{self.branch}"


class BlockMaps:
    """Is shown the chosen calls of a dense run, and keeps their maps.

    Args:
        layers, heads, steps: Indices; negative ones count from the end, None is all.
        branch: "cond", ...; None is all. A call that has both halves of guidance, "cond_uncond", counts as
            either, and both are kept.
        resolution: Most rows of a map.
        limit: Bytes of all maps.

    Raises:
        ValueError: While it watches: a resolution below one block a frame, an index beyond the model's, or
            more than ``limit``.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int] | None,
        heads: Sequence[int] | None,
        steps: Sequence[int] | None,
        branch: str | None = None,
        resolution: int = 128,
        limit: int = LIMIT,
    ) -> None:
        self.layers, self.heads, self.steps = layers, heads, steps
        self.branch, self.resolution, self.limit = branch, resolution, limit
        self.maps: list[Map] = []
        self.bytes = 0
        self._seen: Counter[tuple[str, int | None, str]] = Counter()
        self.branches: set[str] = set()

    def wants(self, call: Call) -> bool:
        """Whether a call is among those chosen."""
        self.branches.add(call.branch)
        if self.branch not in (None, call.branch, *call.branch.split("_")):
            return False
        if self.steps is not None and (call.step is None or call.steps is None):
            raise ValueError("--at-steps: this run does not tell its denoising steps")
        picked = picks("--layers", self.layers, call.layers)
        return call.layer in picked and (
            self.steps is None or call.step in picks("--at-steps", self.steps, call.steps or 0)
        )

    def observe(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
        """See :class:`dit_sparse.calibration.Sees`; q, k and lse come in the order of :func:`order_of`."""
        order, layout = call.order, call.layout
        assert order is not None
        block = block_of(layout, self.resolution)
        heads = picks("--heads", self.heads, call.heads)
        asked, valid = order.valid(call.asked), call.slots_valid()
        rows = -(-order.slots // block)
        self.bytes += q.shape[0] * len(heads) * rows**2 * 4
        if self.bytes > self.limit:
            raise ValueError(too_much(self.bytes, self.limit))
        group = call.heads // call.kv_heads
        chosen = torch.tensor(heads, device=q.device)
        # Padding asks too, and what it gets is read by nobody: its rows are none of the map's.
        queries = asked & valid
        mass = block_mass(
            q[:, chosen],
            k[:, chosen // group],
            lse[:, chosen].masked_fill(~queries, torch.inf),
            block,
            valid=valid,
            scale=call.scale,
        )
        filled = [
            x.expand(q.shape[0], -1, -1)[:, 0] for x in (_filled(queries, block), _filled(valid, block))
        ]
        asking, there = (x.cpu() for x in filled)
        shares = (mass / _filled(queries, block)[..., None].clamp(min=1)).float().cpu()
        part = call.name.partition("/")[0]
        key = call.name, call.step, call.branch
        before = self._seen[key]
        self._seen[key] += q.shape[0]
        for b in range(q.shape[0]):
            for i, head in enumerate(heads):
                place = call.step, call.layer, head, call.branch, before + b
                found = Map(part, *place, block, layout, shares[b, i], asking[b], there[b])
                self.maps.append(found)

    def named(self) -> dict[str, Map]:
        """The maps by name: "step/layer/head/branch", and ".item" or "/transformer" where there are more."""
        many = Counter(m.name for m in self.maps)
        parts = {m.model for m in self.maps}
        found = {}
        for m in self.maps:
            name = m.name + (f".{m.item}" if many[m.name] > 1 else "")
            found[name + (f"/{m.model}" if name in found and len(parts) > 1 else "")] = m
        return found

    def lines(self) -> list[tuple[str, ...]]:
        """For a table: name, shares, entropy, the pattern and what it and the best blocks capture."""
        found = []
        for name, m in self.named().items():
            said = measure(m)
            shares = (f"{said[key]:.0%}" for key in ("frame", "position", "text"))
            captured = said["captured"]
            best = f"{captured[said['pattern']]:.0%}", f"{captured['best']:.0%}"
            found.append((name, *shares, f"{said['entropy']:.2f}", said["pattern"], *best))
        return found

    def save(self, folder: Path, about: Mapping[str, Any]) -> list[Path]:
        """Write maps.safetensors, maps.json (``about`` and what is said of every map) and a PNG a layer."""
        from safetensors.torch import save

        named = self.named()
        rows = [
            {
                "name": name,
                "model": m.model,
                "step": m.step,
                "layer": m.layer,
                "head": m.head,
                "branch": m.branch,
                "item": m.item,
                "grid": m.layout.grid,
                "text_tokens": m.layout.text,
                "text_first": m.layout.text_first,
                "block": m.block,
                "shape": list(m.mass.shape),
                **measure(m),
            }
            for name, m in named.items()
        ]
        content = {"format": 1, **about, "density": DENSITY, "maps": rows}
        sheets: dict[tuple[str, int], list[tuple[Map, dict[str, Any]]]] = {}
        for m, row in zip(named.values(), rows, strict=True):
            sheets.setdefault((m.model, m.layer), []).append((m, row))
        paths = [folder / "maps.safetensors", folder / "maps.json"]
        several = len({model for model, _ in sheets}) > 1
        with staged() as stage:
            stage(paths[0]).write_bytes(save({name: m.mass.contiguous() for name, m in named.items()}))
            stage(paths[1]).write_text(json.dumps(content, indent=1) + "\n")
            for (model, layer), cells in sheets.items():
                paths.append(folder / f"{model + '-' if several else ''}layer-{layer:02d}.png")
                sheet(cells, f"{model}, layer {layer}").savefig(stage(paths[-1]), dpi=110)
        return paths


class MapObserver(Observer):
    """Leaves the calls that are not chosen to the model."""

    def order(self, call: Call) -> Order:
        assert isinstance(self.search, BlockMaps)
        return order_of(call.layout, self.search.resolution)

    def is_dense(self, call: Call) -> bool:
        assert isinstance(self.search, BlockMaps)
        return not self.search.wants(call)


def capture(pipe: Any, maps: BlockMaps, run: Callable[[], object]) -> Any:
    """Show ``run``'s chosen calls to ``maps``; the session's report.

    Raises:
        ValueError: None of the calls was chosen, or what :class:`BlockMaps` says.
    """
    from dit_sparse.attach import apply

    with torch.no_grad(), apply(pipe, MapObserver(search=maps), schedule="always") as session:
        run()
        if not maps.maps:
            seen = ", ".join(sorted(maps.branches)) or "none"
            raise ValueError(f"no attention call was among those chosen; branches seen: {seen}")
        return session.report()


def attention_maps(asked: Request, maps: BlockMaps) -> tuple[list[Path], list[tuple[str, ...]]]:
    """Check, load, run dense, write; the files, and a line for every map.

    Raises:
        ValueError: It cannot be done; what configurations can tell is told before weights are loaded.
    """
    from dit_sparse.generate import call_of, placed_pipeline, say, versions
    from dit_sparse.pipelines.load import find
    from dit_sparse.request import check_flags, check_prompt, device_of, settings_of
    from dit_sparse.video import check_writable

    check_flags(asked)
    device = device_of(asked)
    source = find(asked.model)
    check_prompt(asked.model, asked.prompt)
    for name in ("maps.safetensors", "maps.json"):
        check_writable("--output-dir", asked.output / name)
    settings = settings_of(asked, source)
    _check_size(maps, source, settings)
    pipe = placed_pipeline(asked, source, device, settings)
    call = {**call_of(asked, source, settings), "output_type": "latent"}
    pipe.set_progress_bar_config(desc="attention maps")
    generator = torch.Generator().manual_seed(asked.seed)
    capture(pipe, maps, lambda: pipe(**call, generator=generator))
    about = {
        "model": asked.model,
        "prompt": call["prompt"],
        "negative_prompt": asked.negative_prompt,
        "image": None if asked.image is None else str(asked.image),
        "seed": asked.seed,
        "settings": settings,
        "resolution": maps.resolution,
        "versions": versions(),
    }
    say(f"{len(maps.maps)} maps, {maps.bytes / 2**20:.1f} MiB")
    paths = maps.save(asked.output, about)
    return paths, maps.lines()


def _check_size(maps: BlockMaps, source: Source, settings: Mapping[str, Any]) -> None:
    """ValueError for indices, a resolution or a size of all maps that the configuration shows to be wrong."""
    from dit_sparse.request import grid_of

    layout = TokenLayout(grid_of(source, settings))
    rows = -(-order_of(layout, maps.resolution).slots // block_of(layout, maps.resolution))
    if source.family.joint:
        rows = maps.resolution
    alike, config = source.alike, source.transformer
    known = None if alike is None or alike.attention is None else alike.attention[:2]
    layers, heads = known or (config.get("num_layers"), config.get("num_attention_heads"))
    steps = settings.get("num_inference_steps")
    size = rows**2 * 4
    for flag, chosen, count in (
        ("--layers", maps.layers, layers),
        ("--heads", maps.heads, heads),
        ("--at-steps", maps.steps, steps),
    ):
        if type(count) is int:
            size *= len(picks(flag, chosen, count))
        elif chosen is not None:
            size *= len(set(chosen))
    if maps.branch is None or source.family.branches == ("cond_uncond",):
        size *= 2
    if size > maps.limit:
        raise ValueError(too_much(size, maps.limit))


def picks(flag: str, chosen: Sequence[int] | None, count: int) -> list[int]:
    """Indices in 0..count-1, ascending; negative ones count from the end, None is all."""
    if chosen is None:
        return list(range(count))
    for index in chosen:
        if not -count <= index < count:
            raise ValueError(f"{flag} {index}: there are {count}, 0 to {count - 1} or -{count} to -1")
    return sorted({index % count for index in chosen})


def too_much(size: int, limit: int) -> str:
    """What to say of maps of ``size`` bytes."""
    return (
        f"the maps take {size / 2**20:.0f} MiB, more than {limit / 2**20:.0f} MiB: "
        "choose fewer --layers, --heads or --at-steps, or a lower --resolution"
    )


def block_of(layout: TokenLayout, resolution: int) -> int:
    """The smallest block with which a map has at most ``resolution`` rows.

    Raises:
        ValueError: Not even one block a frame fits.
    """

    def rows(block: int) -> int:
        return layout.grid[0] * ceil(layout.frame / block) + ceil(layout.extra / block)

    whole = max(layout.frame, layout.extra)
    if rows(whole) > resolution:
        raise ValueError(
            f"--resolution must be at least {rows(whole)} for {layout.grid[0]} frames"
            f"{' and text' if layout.extra else ''}, got {resolution}"
        )
    low, high = 1, whole
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if rows(middle) <= resolution else (middle + 1, high)
    return low


def order_of(layout: TokenLayout, resolution: int) -> Order:
    """Raster order with every frame starting a block of :func:`block_of`."""
    return Order.frames(layout, block_of(layout, resolution))


def _filled(slots: Tensor, block: int) -> Tensor:
    from dit_sparse.order import fill_counts

    return fill_counts(slots, block)


def measure(m: Map) -> dict[str, Any]:
    """Shares, entropy and captured mass of a map: the formulas are at the top of the module."""
    f, p, y, x = _places(m)
    on_grid = f >= 0
    weight = m.queries.double() * on_grid
    weight = weight / weight.sum().clamp(min=1)
    mass = m.mass.double()

    def mean(values: Tensor) -> float:
        return float((values * weight).sum())

    same_frame = (f[:, None] == f) & on_grid
    same_place = (p[:, None] == p) & on_grid & ~same_frame
    found = {
        "frame": mean((mass * same_frame).sum(1)),
        "position": mean((mass * same_place).sum(1)),
        "text": mean((mass * ~on_grid).sum(1)),
        "entropy": mean(-torch.special.xlogy(mass, mass).sum(1)) / max(log(len(f)), 1e-9),
    }
    frames, height, width = m.layout.grid
    df, dp = ((a[:, None] - a).abs() for a in (f, p))
    dy, dx = ((a[:, None] - a).abs() for a in (y, x))
    costs = {
        "spatial": df * (int(p.max()) + 1) + dp,
        "temporal": dp * frames + df,
        "neighbourhood": torch.stack([df / frames, dy / height, dx / width]).amax(0),
    }
    if frames == 1:
        del costs["spatial"], costs["temporal"]
    costs = {name: cost.double().masked_fill(~on_grid, torch.inf) for name, cost in costs.items()}
    if not bool(on_grid.all()):
        costs["text"] = torch.zeros_like(mass).masked_fill(on_grid, torch.inf)
    share = {name: mean(_captured(mass, cost, m.keys)) for name, cost in costs.items()}
    found_best = max(share, key=lambda name: share[name])
    density = -mass / m.keys.clamp(min=1)
    share["best"] = mean(_captured(mass, density, m.keys))
    return {**found, "pattern": found_best, "captured": share}


def _places(m: Map) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frame, place in it, mean row and mean column of each block; frame -1 beyond the grid."""
    frames, _, width = m.layout.grid
    each = ceil(m.layout.frame / m.block)
    index = torch.arange(len(m.mass))
    frame = torch.where(index < frames * each, index // each, -1)
    place = index % each
    tokens = torch.arange(m.layout.frame)
    block = tokens // m.block
    count = torch.bincount(block, minlength=each).clamp(min=1)
    row, column = (
        (torch.bincount(block, weights=a.double(), minlength=each) / count)[place]
        for a in (tokens // width, tokens % width)
    )
    return frame, place, row, column


def _captured(mass: Tensor, cost: Tensor, keys: Tensor) -> Tensor:
    """Mass [Q] in the key blocks of least ``cost`` whose tokens are ``DENSITY`` of all keys."""
    order = cost.argsort(dim=1, stable=True)
    tokens = keys.double()[order]
    budget = DENSITY * float(keys.sum())
    room = budget - (tokens.cumsum(1) - tokens)
    part = (room / tokens.clamp(min=1)).clamp(0, 1) * cost.gather(1, order).isfinite()
    return (mass.gather(1, order) * part).sum(1)


def sheet(cells: Sequence[tuple[Map, Mapping[str, Any]]], title: str) -> Figure:
    """A contact sheet of one layer: for every step and branch its heads, on one logarithmic colour scale.

    White lines are frame borders, or every n-th of them so that there are at most :data:`BORDERS`; the green
    one is where the grid ends and text begins.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    lines: dict[tuple[int | None, str, int], list[tuple[Map, Mapping[str, Any]]]] = {}
    for m, row in cells:
        lines.setdefault((m.step, m.branch, m.item), []).append((m, row))
    several = len({(branch, item) for _, branch, item in lines}) > 1
    chunks = [
        (place, line[i : i + COLUMNS]) for place, line in lines.items() for i in range(0, len(line), COLUMNS)
    ]
    wide = max(len(chunk) for _, chunk in chunks)
    figure = Figure(figsize=(0.9 + 2.3 * wide, 0.6 + 2.95 * len(chunks)), layout="constrained")
    axes = figure.subplots(len(chunks), wide, squeeze=False)
    norm, image = LogNorm(1e-4, 1), None
    for ((step, branch, item), chunk), places in zip(chunks, axes, strict=True):
        for axis in places[len(chunk) :]:
            axis.axis("off")
        for axis, (m, row) in zip(places, chunk, strict=False):
            image = axis.imshow(
                m.mass.clamp(min=1e-4).numpy(), cmap="magma", norm=norm, interpolation="nearest"
            )
            _borders(axis, m)
            axis.set_title(f"head {m.head}", fontsize=9)
            axis.set_xlabel(_caption(row), fontsize=7, family="monospace")
            axis.set_xticks([])
            axis.set_yticks([])
        label = f"step {'?' if step is None else step}" + (f"\n{branch}.{item}" if several else "")
        places[0].set_ylabel(label, fontsize=10)
    layout = cells[0][0].layout
    apart = ceil(layout.grid[0] / BORDERS)
    lines_are = "a frame" if apart == 1 else f"{apart} frames"
    figure.suptitle(
        f"{title}: share of a query block's attention (row) in a key block (column)\n"
        f"{'x'.join(map(str, layout.grid))} tokens in blocks of {cells[0][0].block}; "
        f"white lines are {lines_are} apart",
        fontsize=10,
    )
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=min(1.0, 2.5 / len(chunks)), pad=0.01).ax.tick_params(
            labelsize=8
        )
    return figure


def _borders(axis: Any, m: Map) -> None:
    frames, each = m.layout.grid[0], ceil(m.layout.frame / m.block)
    apart = ceil(frames / BORDERS)
    for f in range(apart, frames, apart):
        for line in (axis.axhline, axis.axvline):
            line(f * each - 0.5, color="white", lw=0.5, alpha=0.6)
    if m.layout.extra:
        for line in (axis.axhline, axis.axvline):
            line(frames * each - 0.5, color="#4fd1c5", lw=1.2)


def _caption(row: Mapping[str, Any]) -> str:
    best = row["captured"]["best"]
    return (
        f"frame {row['frame']:.0%}  position {row['position']:.0%}\n"
        f"text {row['text']:.0%}  entropy {row['entropy']:.2f}\n"
        f"quarter: {row['pattern']} {row['captured'][row['pattern']]:.0%}, best {best:.0%}"
    )
