"""Seconds and memory of whole generations, dense and sparse in turn: ``dit-sparse bench generate``.

    dit-sparse bench generate --method radial --rounds 5

The stock model runs twice in every round: how much its two times differ is how much any ratio here wobbles.

    python -m dit_sparse.eval.latency --pairs 20

times what attaching costs by itself, the transformer with an all-kept plan against the stock one: once with
the shortcut that leaves such a plan to the model's own call and once with every block computed by the
block-sparse kernels.

    python -m dit_sparse.eval.latency --search 4096

does the same for a search of AdaSpa, from a known log-sum-exp to the plan, against a dense attention call
over so many tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_sparse.request import Request

DENSE, AGAIN = "dense", "dense again"


def measure(asked: Request, rounds: int) -> dict[str, Any]:
    """Check, load, warm up, and run dense, the method and dense again in turn; in the next round in reverse.

    Args:
        asked: As for ``dit-sparse generate``; ``output`` is not looked at.

    Returns:
        What ``--output`` writes: what was measured on what, and every sample. ``seconds`` has the parts that
        ``Stopwatch`` names and ``total``; ``attention`` and ``planning`` within it are part of
        ``transformer``, and missing where a compiled graph leaves no room for a timer.

    Raises:
        ValueError: Something asked cannot be, told before weights are loaded.
    """
    from dit_sparse.generate import (
        attached,
        call_of,
        device_of_run,
        identity,
        left_alone,
        placed_pipeline,
        removed,
        say,
        timed_run,
        versions,
        warm_up,
    )
    from dit_sparse.kernels import bench
    from dit_sparse.pipelines.load import find
    from dit_sparse.request import (
        check_flags,
        check_prompt,
        choice_of,
        device_of,
        makes_video,
        settings_of,
        with_method,
    )
    from dit_sparse.stopwatch import PeakMemory

    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    check_flags(asked)
    device = device_of(asked)
    check_prompt(asked.model, asked.prompt)
    source = find(asked.model)
    asked = with_method(asked, makes_video(asked, source))
    if asked.is_stock:
        raise ValueError(f"--method {asked.method}: dense is timed beside every method; which one?")
    settings = settings_of(asked, source)
    choice = choice_of(asked, source, settings)
    pipe = placed_pipeline(asked, source, device, settings)
    call = call_of(asked, source, settings)
    attach = {
        DENSE: partial(left_alone, pipe),
        asked.method: partial(attached, pipe, asked, choice, choice.schedule),
        AGAIN: partial(left_alone, pipe),
    }
    rows: dict[str, dict[str, Any]] = {name: {"seconds": {}, "peak_memory_mib": []} for name in attach}
    say("one untimed step of each")
    # "always": a single step could be a dense one of the method's schedule.
    for warm in (attach[DENSE], partial(attached, pipe, asked, choice, "always")):
        with removed(warm()):
            warm_up(pipe, call, asked.seed)
    for i in range(rounds):
        for name in list(rows) if i % 2 == 0 else reversed(rows):
            row = rows[name]
            with removed(attach[name]()) as session, PeakMemory(device) as memory:
                run = timed_run(pipe, call, asked, session, f"{name}, round {i + 1}")
            for part, taken in {**run.seconds, **run.inside}.items():
                row["seconds"].setdefault(part, []).append(taken)
            row["peak_memory_mib"].append(memory.peak_mib)
            report = session.report()
            row["density"] = {"full_run": report.density, "sparse_calls": report.sparse_density}
            row["backend"] = report.about["backend"]
    return {
        "format": 1,
        "versions": versions(),
        **identity(asked, source, settings, choice),
        "device": {**device_of_run(asked, pipe), **bench.identity(device)},
        "dense_attention": dense_backend(pipe),
        "rounds": rounds,
        "rows": rows,
        "amdahl_bound": _bound(rows[DENSE], rows[asked.method]),
        "speed_up": {name: spread(ratios(rows[DENSE], row)) for name, row in rows.items() if name != DENSE},
    }


def _bound(dense: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Amdahl's, of medians; None where attention was not timed."""
    from dit_sparse.generate import amdahl_bound

    seconds = dense["seconds"]
    if "attention" not in seconds:
        return None
    share = statistics.median(seconds["attention"]) / statistics.median(seconds["total"])
    return amdahl_bound(share, row["density"]["full_run"])


def dense_backend(pipe: Any) -> str:
    """The attention backend of diffusers that the stock model uses."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return str(_AttentionBackendRegistry.get_active_backend()[0].value)


def ratios(dense: Mapping[str, Any], row: Mapping[str, Any]) -> list[float]:
    """Dense seconds over a row's, round by round."""
    pairs = zip(dense["seconds"]["total"], row["seconds"]["total"], strict=True)
    return [theirs / ours for theirs, ours in pairs]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, the 20th and 80th percentile between samples, and the extremes."""
    import numpy as np

    low, p20, mid, p80, high = (float(x) for x in np.quantile(values, (0, 0.2, 0.5, 0.8, 1)))
    return {"median": mid, "p20": p20, "p80": p80, "low": low, "high": high}


def rows_of(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and lines for a terminal: parts of a run down, settings across."""
    rows = result["rows"]
    parts = dict.fromkeys(part for row in rows.values() for part in row["seconds"])
    within = [part for part in ("attention", "planning") if part in parts]
    alone = [part for part in parts if part not in ("total", *within)]
    named = {part: part.replace("_", " ") for part in ("total", *alone)}
    if within:
        at = list(named).index("transformer") + 1
        inner = {"attention": "  self-attention", "planning": "    of it planning"}
        items = list(named.items())
        named = dict(items[:at] + list(inner.items()) + items[at:])
    lines = [
        (f"{name}, s", *(_cell(row["seconds"].get(part)) for row in rows.values()))
        for part, name in named.items()
    ]
    rest = {
        name: [
            total - sum(row["seconds"][part][i] for part in alone if part in row["seconds"])
            for i, total in enumerate(row["seconds"]["total"])
        ]
        for name, row in rows.items()
    }
    lines.append(("rest, s", *(_cell(values) for values in rest.values())))
    lines.append(("speed-up", "", *(_cell_of(found) for found in result["speed_up"].values())))
    if result["amdahl_bound"] is not None:
        lines.append(("Amdahl's bound", "", f"{result['amdahl_bound']:.2f}", ""))
    densities = (row["density"] for row in rows.values())
    lines.append(("density", *(f"{d['full_run']:.3f}, sparse {d['sparse_calls']:.3f}" for d in densities)))
    peaks = ([m for m in row["peak_memory_mib"] if m is not None] for row in rows.values())
    lines.append(("peak memory, MiB", *(f"{max(known):.0f}" if known else "not known" for known in peaks)))
    return ("median (20-80 %)", *rows), lines


def _cell(values: Sequence[float] | None) -> str:
    return "" if values is None else _cell_of(spread(values))


def _cell_of(found: Mapping[str, float]) -> str:
    text = f"{found['median']:.2f}"
    return text if found["low"] == found["high"] else f"{text} ({found['p20']:.2f}-{found['p80']:.2f})"


def alternate(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> list[float]:
    """Seconds of ``first`` over those of ``second``, ``pairs`` runs in turn after an untimed one of each."""
    first(), second()
    ratios = []
    for _ in range(pairs):
        seconds = []
        for run in (first, second):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return ratios


def overhead(frames: int, pairs: int, full_plan_is_dense: bool) -> list[float]:
    """Attached over stock, transformer forward passes of the bundled model at ``frames`` latent frames."""
    import torch
    from diffusers import WanTransformer3DModel

    import dit_sparse
    from dit_sparse.pipelines.tiny import DEFAULT, MODEL_DIR

    models: list[Any] = [
        WanTransformer3DModel.from_pretrained(MODEL_DIR, subfolder="transformer", torch_dtype=torch.float32)
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    channels, height, width = models[0].config.in_channels, DEFAULT["height"] // 4, DEFAULT["width"] // 4
    inputs = {
        "hidden_states": torch.randn(1, channels, frames, height, width, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 32, models[0].config.text_dim, generator=generator),
    }
    with torch.no_grad(), dit_sparse.apply(models[0], "dense", block=64, schedule="always") as session:
        session.full_plan_is_dense = full_plan_is_dense
        return alternate(partial(models[0], **inputs), partial(models[1], **inputs), pairs)


def search(tokens: int, pairs: int) -> list[float]:
    """A search of AdaSpa over a dense call of the same backend, 4 heads of 64 channels, blocks of 64."""
    import torch

    from dit_sparse import AdaSpaProcessor, Call, TokenLayout

    method, call = AdaSpaProcessor(), Call.standalone(TokenLayout((1, 1, tokens)), heads=4)
    call = call.at(order=method.order(call))
    q, k, v = torch.randn(3, 1, 4, tokens, 64, generator=torch.Generator().manual_seed(0))
    _, lse = call.run_dense(q, k, v)
    # A memory of its own for each search: with the plan of the last one there would be nothing to do.
    return alternate(
        lambda: method.plan(q, k, call.at(lse=lse, cache={})), lambda: call.run_dense(q, k, v), pairs
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20, help="timed pairs")
    parser.add_argument("--frames", type=int, default=33, help="latent frames of 128 tokens")
    parser.add_argument("--search", type=int, metavar="TOKENS", help="time AdaSpa's search instead")
    args = parser.parse_args()
    cases = {
        "the model's own call": partial(overhead, args.frames, args.pairs, True),
        "every block through the kernels": partial(overhead, args.frames, args.pairs, False),
    }
    if args.search:
        cases = {"a search over a dense call": partial(search, args.search, args.pairs)}
    for how, measure in cases.items():
        ratios = sorted(measure())
        middle, tenth = statistics.median(ratios), len(ratios) // 10
        low, high = ratios[tenth], ratios[-1 - tenth]
        print(f"{how}: median {middle:.3f}, 10-90 % {low:.3f}-{high:.3f}, {len(ratios)} pairs")


if __name__ == "__main__":
    main()
