"""How near the CPU kernels come to what this machine can do.

    python -m dit_sparse.kernels.cpu_profile
    python -m dit_sparse.kernels.cpu_profile --shape 8192,2,128 --density 0.2 --block 128 --seconds 20

prints, for each shape of the CPU's yardstick or those given, GFLOP/s of the forward, of the backward and of
PyTorch's matrix product, each with its share of the multiply-adds that this machine issues in a loop of
nothing else. All four take turns, and the best round of each counts: what else runs only slows them.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch

from dit_sparse.kernels.bench import Case, alternate, cases
from dit_sparse.kernels.build import library
from dit_sparse.kernels.cpu import attention

# As many independent sums as two units with a latency of four cycles need, and some to spare.
PEAK = """
#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
typedef float Vec __attribute__((vector_size(BYTES)));

extern "C" double multiply_add(long chunks, long threads) {  // returns how many operations it made
  constexpr long ROUNDS = 10000;
  float seen = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : seen)
  for (long chunk = 0; chunk < chunks; chunk++) {
    // Nothing a compiler can spare: sums and lanes that differ, all read, and squares, not constant factors.
    constexpr int LANES = BYTES / sizeof(float);
    Vec sums[12], more;
    for (int lane = 0; lane < LANES; lane++) {
      more[lane] = 0.1f / (1 + lane + chunk);
      for (int n = 0; n < 12; n++) sums[n][lane] = 0.01f * n;
    }
    for (long i = 0; i < ROUNDS; i++)
#pragma GCC unroll 12
      for (int n = 0; n < 12; n++) sums[n] = sums[n] * sums[n] + more;
    for (Vec& sum : sums)
      for (int lane = 0; lane < LANES; lane++) seen += sum[lane];
  }
  const double made = 2.0 * 12 * (BYTES / sizeof(float)) * ROUNDS * chunks;
  return seen < 0 ? 0 : made;
}
"""
# Dealt out like the kernels' work, so that a thread held up by other programs does not hold up all.
CHUNKS = 2000
# Side of the square matrices that PyTorch multiplies.
SIDE = 1024
# Matrix products of the kernels, each of 2 D operations for a token pair: scores and output; and in the
# backward scores again, and the gradients of weights, queries, keys and values.
FORWARD, BACKWARD = 2, 5


@cache
def _multiply_add() -> Callable[[int, int], float]:
    function = library(PEAK).multiply_add
    function.argtypes, function.restype = [ctypes.c_long, ctypes.c_long], ctypes.c_double
    return function


def profile(case: Case, seconds: float) -> dict[str, tuple[float, float]]:
    """GFLOP/s of each contender in its best round, and its share of the multiply-adds'."""
    plan = case.plan()
    q, k, v = (x.requires_grad_() for x in case.tensors())
    run = partial(attention, q, k, v, plan, valid=None, scale=case.shape.head_dim**-0.5, positions=None)
    out, lse = run()
    grads = torch.randn_like(out), torch.randn_like(lse)
    matrix = torch.randn(SIDE, SIDE)
    peak = partial(_multiply_add(), CHUNKS, torch.get_num_threads())
    calls: dict[str, Callable[[], object]] = {
        "multiply-adds": peak,
        "matmul": partial(torch.mm, matrix, matrix),
        "forward": torch.no_grad()(run),
        "backward": partial(torch.autograd.grad, (out, lse), (q, k, v), grads, retain_graph=True),
    }
    product = 2 * case.shape.head_dim * case.shape.heads * case.shape.tokens**2 * case.density_of(plan)
    operations = {
        "multiply-adds": peak(),
        "matmul": 2 * SIDE**3,
        "forward": FORWARD * product,
        "backward": BACKWARD * product,
    }
    times = alternate(calls, seconds, wait=lambda: None)
    rates = {name: operations[name] / times[name].min().item() / 1e9 for name in calls}
    return {name: (rate, rate / rates["multiply-adds"]) for name, rate in rates.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Rates of the CPU kernels, and their shares of what the CPU can do."
    )
    parser.add_argument("--shape", nargs="*", default=(), help="names of the benchmark's, or tokens,heads,D")
    parser.add_argument("--density", type=float, nargs="*", default=())
    parser.add_argument("--block", help="tokens, or query and key tokens as 128x64")
    parser.add_argument("--seconds", type=float, default=10, help="for each shape and density")
    a = parser.parse_args(arguments)
    try:
        chosen = cases(shapes=a.shape, densities=a.density, block=a.block, dtype="float32")
    except ValueError as error:
        parser.error(str(error))
    for case in chosen:
        print(f"{case}, {torch.get_num_threads()} threads")
        for name, (rate, share) in profile(case, a.seconds).items():
            print(f"  {name:<14}{rate:8.1f} GFLOP/s  {share:4.0%}")


if __name__ == "__main__":
    main()
