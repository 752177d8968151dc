"""What is told of a plan is what the plan computes, token by token, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dit_sparse import Order, Plan, RadialProcessor, TokenLayout
from dit_sparse.cli import app
from dit_sparse.eval import inspection
from dit_sparse.eval.inspection import TOY_TOKENS, Inspection, inspect
from dit_sparse.processors import METHODS, NeighborhoodProcessor, SLAProcessor
from dit_sparse.processors.vmoba import VMoBAProcessor

FIRST, LAST, IMAGE = (
    TokenLayout((5, 7, 9), text=11, text_first=True),
    TokenLayout((5, 7, 9), text=11),
    TokenLayout((1, 13, 17), text=5, text_first=True),
)
NEEDS_FRAMES = {"radial", "efficient_vdit"}


def tokens(plan: Plan, order: Order, head: int) -> torch.Tensor:
    """Which token reads which, in model order, bool [S, S]."""
    index = order.rows[0, min(head, order.rows.shape[1] - 1)]
    keep = plan.to_blocks()[0, min(head, plan.counts.shape[1] - 1)]
    slot = torch.arange(len(index))
    read = keep[slot // plan.block[0]][:, slot // plan.block[1]]
    if plan.rule is not None:
        read &= plan.rule(index[:, None], index)
    there = index >= 0
    pairs = torch.zeros(order.tokens, order.tokens, dtype=torch.bool)
    pairs[index[there][:, None], index[there]] = read[there][:, there]
    return pairs


def facts(look: Inspection) -> dict[str, str]:
    return dict(look.facts)


@pytest.mark.parametrize("layout", [FIRST, LAST, IMAGE])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:Re-ttention keeps")
def test_every_method_is_drawn_or_refused(name: str, layout: TokenLayout) -> None:
    method = METHODS[name]()
    if layout is IMAGE and name in NEEDS_FRAMES:
        with pytest.raises(ValueError, match="an image is one frame, and its"):
            inspect(method, layout)
        return
    look = inspect(method, layout, heads=3, layer=1, layers=4)
    for head, density in enumerate(look.density):
        assert density == pytest.approx(float(tokens(look.plan, look.order, head).double().mean()))
    assert ("toy" in look.title.partition("\n")[2]) == (not method.is_static)
    assert ("q and k" in facts(look)) == (not method.is_static)
    figure = look.figure()
    assert 2 <= len(figure.axes) <= 6
    assert look.title.partition("\n")[0] in figure.get_suptitle()


def test_numbers_of_a_plan_that_is_known() -> None:
    """A band over 4 frames of 5 tokens, in blocks of 5: 4 of 16 blocks on the diagonal and 6 beside it."""

    class Band(RadialProcessor):
        def order(self, call: Any) -> Order:
            return Order.raster(call.layout)

        def plan(self, q: Any, k: Any, call: Any) -> Plan:
            rows = torch.arange(4)
            return Plan.from_blocks((rows[:, None] - rows).abs() <= 1, 5)

    look = inspect(Band(), TokenLayout((4, 1, 5)), heads=6, head_dim=8, layers=3)
    told = facts(look)
    assert look.density == pytest.approx((10 / 16,) * 6)
    assert told["grid"] == "4 x 1 x 5 = 20 tokens"
    assert told["block"] == "5 queries x 5 keys"
    assert told["density"] == "0.6250 over 6 heads (exact)"
    assert told["key blocks a row"] == "2 to 3, mean 2.5"
    # Lists of 3 and a count in each of 4 rows, 4 bytes each; 4 bits in a byte a row.
    assert told["bytes of the plan"] == "64 B as lists, 4 B as bits"
    assert told["bytes in 3 layers"] == "64 B as lists, 4 B as bits: 1 plan"
    assert told["reads"] == "layout: made once for a run"
    assert told["token pairs"] == "4500 of 7200 in 6 heads x 3 layers"
    assert told["FLOPs of attention"].startswith("2.304e-07 T dense, 1.44e-07 T sparse")
    assert "speed-up 1.6x" in told["FLOPs of attention"]


def test_a_ragged_end_and_holes() -> None:
    told = facts(inspect(METHODS["window"](block=16), LAST))
    assert told["sequence"] == "326 tokens in 331 slots, 5 holes"
    assert told["blocks"].endswith("the last has 11 x 11 slots")


def test_blocks_of_one_query_and_per_head_plans() -> None:
    look = inspect(SLAProcessor(block=(1, 32)), FIRST, heads=5)
    assert look.plan.block == (1, 32)
    assert "and 1 more plan of other heads" in look.figure().get_suptitle()
    assert inspect(VMoBAProcessor(), FIRST, heads=2).plan.block[0] == 1


def test_a_rule_counted_in_part_comes_close(monkeypatch: pytest.MonkeyPatch) -> None:
    method = NeighborhoodProcessor(tile=(2, 4, 4), window=(4, 8, 8), stride=(1, 1, 1))
    layout = TokenLayout((8, 24, 24))
    exact = inspect(method, layout)
    assert "rule" in facts(exact)
    assert "(exact)" in facts(exact)["density"]
    monkeypatch.setattr(inspection, "TOY_TOKENS", 100)
    part = inspect(method, layout)
    assert "estimated: the rule was counted in 64 of 144 rows" in facts(part)["density"]
    assert part.density == pytest.approx(exact.density, rel=0.1)


@pytest.mark.parametrize("name", [n for n, cls in METHODS.items() if cls().is_static])
def test_static_methods_at_720p(name: str) -> None:
    """75,600 tokens: nothing of S x S, which is 5.7 GB of bools, is made."""
    layout = TokenLayout((21, 45, 80))
    look = inspect(METHODS[name](), layout, heads=2, layers=3)
    assert "mass kept" not in facts(look)
    assert look.plan.counts.shape[2] * look.plan.keys < 2e6
    assert len(look.figure().axes) >= 2


def test_what_is_too_long_for_toy_attention_comes_with_what_is_not() -> None:
    for layout in (TokenLayout((21, 45, 80)), TokenLayout((1, 300, 200)), TokenLayout((9000, 1, 2), text=9)):
        with pytest.raises(ValueError, match=f"at most {TOY_TOKENS} tokens, got") as error:
            inspect(METHODS["draft"](), layout)
        smaller = tuple(map(int, str(error.value).split("--grid ")[1].split(",")))
        assert layout.extra + smaller[0] * smaller[1] * smaller[2] <= TOY_TOKENS
        assert smaller[0] * smaller[1] * smaller[2] > TOY_TOKENS / 2


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def told(output: str) -> str:
    """A table's text, with its lines put together."""
    return " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_command(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"plan.{suffix}"
    arguments = ("--grid", "3,8,8", "--text", 5, "--text-first", "--heads", 2, "--density", 0.5)
    done = run("--method", "draft", *arguments, "--param", "pool=(2,2)", "--output", output)
    assert done.exit_code == 0, done.output
    assert "5, before the grid" in told(done.output)
    assert "another q and k gives another plan" in told(done.output)
    assert "layout, qk: made anew in every call" in told(done.output)
    if suffix == "png":
        with Image.open(output) as image:
            assert image.width > 1000
    else:
        assert "<svg" in output.read_text()


def test_a_models_usual_size(tmp_path: Path) -> None:
    done = run("--method", "radial", "--model", "hunyuanvideo", "--output", tmp_path / "plan.png")
    assert done.exit_code == 0, done.output
    assert "33 x 45 x 80 = 118800 tokens" in told(done.output)
    assert "256, after the grid" in told(done.output)
    assert "in 24 heads x 60 layers" in told(done.output)
    done = run("--method", "window", "--model", "tiny-wan", "--output", tmp_path / "plan.png")
    assert "33 x 8 x 16 = 4224 tokens" in told(done.output)
    assert "in 4 heads x 8 layers" in told(done.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "radial"], "--grid or --model is missing"),
        (["--method", "radical", "--grid", "3,4,5"], "--method must be one of radial, draft"),
        (["--method", "radial", "--grid", "3,4"], "grid must be three positive integers"),
        (["--method", "radial", "--grid", "3x4x5"], "--grid must be FRAMES,HEIGHT,WIDTH in tokens"),
        (
            ["--method", "radial", "--grid", "1,4,5"],
            "an image is one frame, and its bands lie between frames",
        ),
        (["--method", "radial", "--grid", "3,4,5", "--heads", "0"], "--heads must be at least 1, got 0"),
        (["--method", "radial", "--grid", "3,4,5", "--density", "2"], "--density must be above 0"),
        (["--method", "radial", "--grid", "3,4,5", "--param", "bands=2"], "radial has no parameter bands"),
        (["--method", "radial", "--grid", "3,4,5", "--layers", "2", "--layer", "2"], "--layer must be below"),
        (
            ["--method", "radial", "--grid", "3,4,5", "--output", "plan.pdf"],
            "--output must end in .png or .svg",
        ),
        (["--method", "radial", "--model", "sora"], "--model must be a name out of `dit-sparse models`"),
        (["--method", "draft", "--model", "wan2.1-14b"], "got 75600: try --grid 21,14,26"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    where = [] if "--output" in arguments else ["--output", tmp_path / "plan.png"]
    done = run(*arguments, *where)
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert message in done.output
    assert not list(tmp_path.iterdir())
