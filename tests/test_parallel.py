"""Context parallelism on gloo processes: what one process computes, some compute together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse import METHODS, TokenLayout
from dit_sparse.parallel import balanced, consecutive, in_turn

TESTS = Path(__file__).parent
TOGETHER = (
    ("every_method", "calibrated", "per_head", "balance", "uneven", "ring", "competing", "joint"),
    ("gradients", "compiled", "pipeline"),
    ("families",),
)
"""Checks that one start of the processes makes: it takes longer than most of them."""
Results = Callable[[str, int], Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a check of ``context_parallel_worker.py`` finds on so many processes."""
    found: dict[tuple[str, int], Any] = {}

    def of(check: str, processes: int) -> Any:
        if (check, processes) not in found:
            path = tmp_path_factory.mktemp("processes") / "results.json"
            run(processes, path, next(checks for checks in TOGETHER if check in checks))
            found.update({(name, processes): one for name, one in json.loads(path.read_text()).items()})
        return found[check, processes]

    return of


def run(processes: int, results: Path, checks: tuple[str, ...]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS / "support"))),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, TESTS / "support" / "context_parallel_worker.py", results, *checks]
    logs = [results.with_name(f"{rank}.log") for rank in range(processes)]
    started = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank)}, stdout=log.open("w"), stderr=subprocess.STDOUT
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=150) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)


def assert_equal(found: dict[str, Any]) -> None:
    assert found["difference"] <= 1e-5
    assert found["same_pairs"]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("check", ["every_method", "calibrated", "per_head", "joint"])
def test_processes_compute_together_what_one_computes(results: Results, processes: int, check: str) -> None:
    found = results(check, processes)
    for one in found.values():
        assert_equal(one)
        assert one["heads"] == f"{4 // processes} of 4 in a layer, in process 0 of {processes}"
        assert one["all_heads"] == f"all, of {processes} processes"
    if check == "every_method":
        assert set(METHODS) <= set(found)


@pytest.mark.parametrize("processes", [2, 4])
def test_heads_that_compute_more_are_spread(results: Results, processes: int) -> None:
    """The pairs of the busiest process over their mean, where two heads of four read far more."""
    found = results("balance", processes)
    for one in found.values():
        assert_equal(one)
    in_order, spread = found["InOrder"]["load"], found["SlidingTileProcessor"]["load"]
    if processes == 2:
        assert in_order > 1.8
        assert spread < 1.05
    else:
        assert spread == in_order  # one head each


@pytest.mark.parametrize("processes", [2, 4])
def test_what_processes_do_not_divide(results: Results, processes: int) -> None:
    found = results("uneven", processes)
    assert_equal(found["tokens"])
    assert_equal(found["heads"])
    heads = 2 * processes - 1
    assert f"{heads} heads cannot be shared among {processes} processes" in found["refused"]


@pytest.mark.parametrize("processes", [2, 4])
def test_rings_are_left_to_the_model(results: Results, processes: int) -> None:
    found = results("ring", processes)
    assert set(found) == {2: {"(2, 1)"}, 4: {"(2, 2)", "(4, 1)"}}[processes]
    for one in found.values():
        assert one["same"]
        assert one["reasons"] == ["ring context parallelism, in which no process has all keys of a query"]
        assert one["strict"] == f"blocks.0.attn1 cannot run sparse: {one['reasons'][0]}"
        assert one["pairs"] == 3 * 4 * 120**2  # layers, heads


@pytest.mark.parametrize("processes", [2, 4])
def test_a_method_whose_heads_compete_is_left_to_the_model(results: Results, processes: int) -> None:
    found = results("competing", processes)
    assert found["same"]
    assert found["reasons"] == ["with the competition 'overall' all heads of a layer share what is kept"]
    assert found["reasons"][0] in found["strict"]
    assert found["pairs"] == 3 * 4 * 120**2


def test_gradients_add_up(results: Results) -> None:
    assert max(results("gradients", 2).values()) < 1e-4


def test_compiled_blocks(results: Results) -> None:
    assert max(results("compiled", 2).values()) < 1e-5


def test_a_whole_pipeline_and_back(results: Results) -> None:
    found = results("pipeline", 2)
    assert found["difference"] <= 1e-5
    assert found["same_densities"]
    assert found["restored"] == 0


def test_every_family_that_diffusers_can_share(results: Results) -> None:
    found = results("families", 2)
    stock = {name: one["stock"] for name, one in found.items() if "stock" in one}
    # Timesteps of single tokens are not shared out with the tokens of LTX; Helios comes to something else
    # than alone, in diffusers itself.
    assert set(stock) <= {"ltx-i2v", "ltx-condition", "ltx2", "ltx2-references", "helios"}
    for name, one in found.items():
        if name not in stock:
            assert_equal(one)
    for name in ("wan", "wan-i2v", "chronoedit", "ltx", "flux", "flux2-references", "qwen-image"):
        assert f"{name} vsa" in found


def test_balanced_heads() -> None:
    shares = consecutive(8, 4, uneven=False)
    assert shares == ((0, 1), (2, 3), (4, 5), (6, 7))
    costs = [8.0, 7, 6, 5, 4, 3, 2, 1]
    spread = balanced(costs, shares)
    assert sorted(head for heads in spread for head in heads) == list(range(8))
    assert {len(heads) for heads in spread} == {2}
    assert {sum(costs[head] for head in heads) for heads in spread} == {9}
    assert balanced([1.0] * 8, shares) == shares
    assert [len(heads) for heads in balanced([1.0, 2, 3, 4, 5], consecutive(5, 3, uneven=True))] == [2, 2, 1]


@pytest.mark.parametrize(("heads", "processes", "uneven"), [(6, 4, False), (2, 4, True), (9, 4, False)])
def test_heads_that_cannot_be_shared(heads: int, processes: int, uneven: bool) -> None:
    with pytest.raises(ValueError, match=f"{heads} heads cannot be shared among {processes} processes"):
        consecutive(heads, processes, uneven)


@pytest.mark.parametrize("text_first", [True, False])
def test_text_and_grid_that_are_shared_out_apart(text_first: bool) -> None:
    layout = TokenLayout((1, 3, 5), text=7, text_first=text_first, suffix=2)
    model = [f"text {i}" for i in range(7)], [f"grid {i}" for i in range(17)]
    sizes = [torch.arange(n).tensor_split(4) for n in (7, 17)]
    processes = []
    for text, grid in zip(*sizes, strict=True):
        parts = [model[0][i] for i in text], [model[1][i] for i in grid]
        processes.append(parts[0] + parts[1] if text_first else parts[1] + parts[0])
    gathered = [token for tokens in processes for token in tokens]
    index = in_turn(tuple(map(len, processes)), layout, torch.device("cpu"))
    assert isinstance(index, torch.Tensor)
    expected = model[0] + model[1] if text_first else model[1] + model[0]
    assert [gathered[i] for i in index] == expected
    assert "no equal shares" in str(in_turn((24, 0, 0, 0), layout, torch.device("cpu")))
