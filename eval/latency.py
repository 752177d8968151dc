"""What attaching costs by itself: the transformer with an all-kept plan against the stock one.

    python -m dit_sparse.eval.latency --pairs 20

times alternating forward passes of the bundled model in one process and prints the median ratio and its
spread, once with the shortcut that leaves an all-kept plan to the model's own call and once with every block
computed by the block-sparse kernels.

    python -m dit_sparse.eval.latency --search 4096

does the same for a search of AdaSpa, from a known log-sum-exp to the plan, against a dense attention call
over so many tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any


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
