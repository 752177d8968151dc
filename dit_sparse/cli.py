"""The command line, put together; each command is in ``commands``.

dit-sparse generate --prompt "a red circle moving left on a gray background" --compare-dense
dit-sparse generate --model wan2.1 --offload model --prompt "a cat runs" --output cat.mp4
dit-sparse calibrate --method sparse_vdit --output calibration.json
dit-sparse inspect --method radial --grid 21,30,52
dit-sparse attention-maps --layers 0,-1 --at-steps 0,-1 --output-dir maps
dit-sparse bench kernels --shape tiny-wan --density 0.25
"""

from __future__ import annotations

import typer

from dit_sparse.commands import bench, compare, draw, evaluate, listing, making

app = typer.Typer(
    help="Sparse attention for diffusion transformers: generate videos, and see what really ran.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    making.generate,
    compare.compare,
    making.calibrate,
    draw.inspect,
    draw.attention_maps,
    listing.methods,
    listing.models,
):
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="eval")
