"""The charts of a comparison's page, as SVG that takes its ink from the page and so fits light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from dit_sparse.eval.comparison import Comparison, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#010203"
"""Stands for the colour of the page's text until the drawing is done."""
COLOURS = ("#3b82d6", "#d9730d", "#2a9d6f", "#c0506f", "#8a6fd1", "#a08a1f", "#4aa3a8", "#9a6a4b")
"""Legible on white and on black."""
_MARKS = "osD^vPX*"
_NEAR = 10.0
"""The noise floor is drawn if it is at most so many dB above everything else."""
_SIZE = (5.2, 3.7)
_LABEL_GAP = 0.06
"""Of the height of the axes, between the names beside them."""


def colours(result: Comparison) -> dict[str, tuple[str, str]]:
    """Colour and mark of each method's rows: a method has one colour, its densities have marks."""
    found: dict[str, tuple[str, str]] = {}
    methods: dict[str, int] = {}
    for row in result.rows:
        if row.kind != "method" or row.refused:
            continue
        method = row.method.partition("(")[0]
        seen = methods.setdefault(method, 0)
        methods[method] += 1
        colour = COLOURS[list(methods).index(method) % len(COLOURS)]
        found[row.label] = colour, _MARKS[seen % len(_MARKS)]
    return found


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in speed and PSNR at once, the slowest first."""

    def beats(a: Row, b: Row) -> bool:
        x, y = _place(a), _place(b)
        return x != y and x[0] >= y[0] and x[1] >= y[1]

    best = [row for row in rows if not any(beats(other, row) for other in rows)]
    return sorted(best, key=_place)


def _place(row: Row) -> tuple[float, float]:
    decibels = row.summary["psnr"]["mean"]
    return row.summary["speed_up"]["median"], math.inf if decibels is None else decibels


def noise_floor(result: Comparison) -> str:
    """Mean PSNR of dense attention by other kernels, in words."""
    decibels = next(row for row in result.rows if row.kind == "floor").summary["psnr"]["mean"]
    return "no difference" if decibels is None else f"{decibels:.1f} dB"


def scatter(result: Comparison) -> str:
    """Speed-up against PSNR, with intervals where there are any, the Pareto front and the noise floor."""
    rows = [row for row in result.rows if row.kind == "method" and not row.refused]
    rows = [row for row in rows if row.summary["psnr"]["mean"] is not None]
    floor = next(row for row in result.rows if row.kind == "floor")
    best = front(rows)

    def draw(axes: Axes) -> None:
        look = colours(result)
        axes.plot(*zip(*map(_place, best), strict=True), color=_INK, alpha=0.35, lw=1, zorder=1)
        for row in rows:
            (x, y), (colour, mark) = _place(row), look[row.label]
            ratio, bounds = row.summary["speed_up"], row.summary["psnr"]["interval"]
            across = [[x - ratio["low"]], [ratio["high"] - x]] if len(ratio["ratios"]) > 1 else None
            along = None if bounds is None else [[y - bounds[0]], [bounds[1] - y]]
            axes.errorbar(
                x, y, yerr=along, xerr=across, color=colour, marker=mark, ms=7, lw=1, alpha=0.9, zorder=2
            )
        axes.axvline(1, color=_INK, lw=0.9, ls=":", alpha=0.7)
        axes.axvline(floor.summary["speed_up"]["median"], color=_INK, lw=0.9, ls="--", alpha=0.7)
        axes.set_xlabel("speed-up over dense, end to end")
        axes.set_ylabel("PSNR to dense, dB")
        _pad(axes)
        named = [(row.label, *_place(row), *look[row.label]) for row in rows]
        _names_beside(axes, named)

    if not rows:
        return ""
    points = "; ".join(f"{row.label} {_place(row)[0]:.2f} times, {_place(row)[1]:.2f} dB" for row in rows)
    return _svg(
        draw,
        _SIZE,
        "Speed and quality",
        f"{points}. Pareto front: {', '.join(row.label for row in best)}. "
        f"Dense by the same kernels: {_place(floor)[0]:.2f} times, {noise_floor(result)}.",
    )


def curves(result: Comparison, prompt: int) -> str:
    """PSNR of each frame of one prompt's videos; frames identical to the dense ones are gaps."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in result.rows if row.kind != "dense" and not row.refused]
    if len(rows[0].clips[prompt].per_frame["psnr"]) < 2:
        return ""
    highest = max((v for r in rows[1:] for v in _known(r, prompt)), default=-math.inf)
    if min(_known(rows[0], prompt), default=math.inf) > highest + _NEAR:
        del rows[0]

    def draw(axes: Axes) -> None:
        look = colours(result)
        named = []
        for row in rows:
            values = [math.nan if v is None else v for v in row.clips[prompt].per_frame["psnr"]]
            if not _known(row, prompt):
                continue
            is_floor = row.kind == "floor"
            colour, mark = (_INK, "") if is_floor else look[row.label]
            axes.plot(
                range(len(values)),
                values,
                color=colour,
                lw=1.4,
                ls=":" if is_floor else "-",
                marker=mark,
                markevery=max(1, len(values) // 6),
                ms=4,
            )
            end = max(i for i, value in enumerate(values) if not math.isnan(value))
            named.append((row.label, end, values[end], colour, mark))
        axes.set_xlabel("frame")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("PSNR to dense, dB")
        _pad(axes)
        _names_beside(axes, named)

    means = [
        f"{row.label} {'identical' if mean is None else f'{mean:.2f} dB'}"
        for row in rows
        for mean in [row.clips[prompt].quality["psnr"]]
    ]
    return _svg(draw, _SIZE, f"PSNR frame by frame, prompt {prompt + 1}", "; ".join(means) + ".")


def _known(row: Row, prompt: int) -> list[float]:
    return [v for v in row.clips[prompt].per_frame["psnr"] if v is not None]


def _pad(axes: Axes) -> None:
    axes.margins(0.08)
    axes.grid(True, color=_INK, alpha=0.1, lw=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _names_beside(axes: Axes, points: Sequence[tuple[str, float, float, str, str]]) -> None:
    """Names right of the axes at the heights of their points, moved apart, with a line to each point.

    Points are name, x, y, colour and mark.
    """
    if not points:
        return
    low, high = axes.get_ylim()
    heights = [(y - low) / (high - low) for _, _, y, _, _ in points]
    order = sorted(range(len(points)), key=lambda i: heights[i])
    gap = min(_LABEL_GAP, 1 / len(points))
    places: dict[int, float] = {}
    last = -math.inf
    for i in order:
        last = places[i] = max(heights[i], last + gap)
    top = 1.0
    for i in reversed(order):
        places[i] = min(places[i], top)
        top = places[i] - gap
    for i, (label, x, y, colour, mark) in enumerate(points):
        beside: Any = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([1.045], [places[i]], color=colour, marker=mark or "_", ms=5, ls="", **beside)
        axes.annotate(
            _plain(label),
            xy=(x, y),
            xytext=(1.075, places[i]),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=_INK,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.5,
                "lw": 0.7,
                "shrinkA": 12,
                "shrinkB": 4,
            },
        )


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # which begins a formula


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], title: str, about: str) -> str:
    """A drawing as an SVG element with a name and a description."""
    from html import escape

    import matplotlib
    from matplotlib.figure import Figure

    parts = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = {
        **dict.fromkeys(parts, _INK),
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 10,
    }
    stream = StringIO()
    with matplotlib.rc_context(settings):
        figure: Figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(
            stream,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    head, rest = text.split(">", 1)
    named = f"<title>{escape(title)}</title><desc>{escape(about)}</desc>"
    return f'{head} role="img" aria-label="{escape(f"{title}. {about}", quote=True)}">{named}{rest}'
