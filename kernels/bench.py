"""Time block-sparse attention against dense attention, in alternation, and print one CSV row per measurement.

    python -m dit_sparse.kernels.bench
    python -m dit_sparse.kernels.bench --device cuda --backends triton,flex --dtype bfloat16 --seconds 5

Times are the 20th, 50th and 80th percentile in milliseconds. ``eta`` is dense time x density / sparse time:
the share of dense attention's throughput that is kept, 1 being perfect. On a CPU that other processes use,
set OMP_WAIT_POLICY=passive: threads that spin at barriers cost more than the work between them.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels import block_sparse_attention
from dit_sparse.kernels.ops import resolve_backend
from dit_sparse.plan import Plan

# Batch, heads, tokens, head dim, block: the bundled model twice, then one head group of a large video model.
SHAPES = ((1, 4, 4224, 48, 32), (1, 4, 4224, 48, 64), (1, 2, 8192, 128, 128))
DENSITIES = (0.2, 0.5)
COLUMNS = "device,threads,backend,dtype,B,H,S,D,block,density,p20_ms,p50_ms,p80_ms,dense_p50_ms,speedup,eta"


def random_plan(heads: int, tokens: int, block: int, density: float, device: torch.device) -> Plan:
    """Every row reads its own random key blocks, equally many: the hardest pattern to group."""
    blocks = -(-tokens // block)
    scores = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    keep = scores.argsort(-1).argsort(-1) < max(1, round(density * blocks))
    return Plan.from_blocks(keep, block).to(device)


def alternate(
    calls: dict[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, Tensor]:
    """Seconds of each call, taken in turns so that a disturbance meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).replace(",", " ")
    return f"{device.type} {platform.machine()}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time block-sparse against dense attention.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", default="auto", help="comma-separated; auto picks one for the device")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=4.0, help="per shape and density")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    names = [resolve_backend(device)[0] if n == "auto" else n for n in options.backends.split(",")]
    print(COLUMNS)
    for batch, heads, tokens, head_dim, block in SHAPES:
        q, k, v = (torch.randn(batch, heads, tokens, head_dim, device=device, dtype=dtype) for _ in range(3))
        for wanted in DENSITIES:
            plan = random_plan(heads, tokens, block, wanted, device)
            density = plan.counts.double().mean().item() / plan.keys
            calls: dict[str, Callable[[], object]] = {
                "dense": partial(F.scaled_dot_product_attention, q, k, v)
            }
            for name in names:
                calls[name] = partial(block_sparse_attention, q, k, v, plan, backend=name)
            times = alternate(calls, options.seconds, device)
            dense = times["dense"].quantile(0.5).item()
            for name in names:
                low, mid, high = (
                    times[name].quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
                )
                row = [_device_name(device), torch.get_num_threads(), name, options.dtype]
                row += [batch, heads, tokens, head_dim, block, f"{density:.3f}"]
                row += [f"{1e3 * x:.2f}" for x in (low, mid, high, dense)]
                row += [f"{dense / mid:.2f}", f"{dense * density / mid:.2f}"]
                print(*row, sep=",", flush=True)


if __name__ == "__main__":
    main()
