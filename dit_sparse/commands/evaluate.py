"""``dit-sparse eval``: quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_sparse.commands import vbench
from dit_sparse.commands.terminal import plainly, table, write_json
from dit_sparse.request import check_json

app = typer.Typer(help="Measure quality.", no_args_is_help=True)
app.add_typer(vbench.app, name="vbench")


@app.command()
def fidelity(
    reference: Annotated[Path, typer.Argument(help="A video, or a folder of videos, one for each prompt.")],
    outputs: Annotated[
        list[Path],
        typer.Argument(help="What to hold against it; videos of the same names in folders."),
    ],
    floor: Annotated[
        Path | None,
        typer.Option(help="The reference again, by another backend or dtype: the noise there is anyway."),
    ] = None,
    protocol: Annotated[str, typer.Option(help="default, svg, skimage or pooled.")] = "default",
    lpips: Annotated[bool, typer.Option("--lpips", help="Also LPIPS; its weights are fetched once.")] = False,
    output: Annotated[Path | None, typer.Option(help="A .json with formulas and curves over frames.")] = None,
) -> None:
    """PSNR, SSIM and LPIPS of videos against the dense ones.

    Reads .mp4 and .png, and .safetensors with a tensor "frames", which no codec has changed. With folders
    every mean has its bootstrap 95 % interval over the videos, and every further folder its paired difference
    from the first.
    """

    from dit_sparse.eval.fidelity_files import compare, rows_of

    with plainly("stopped; nothing was written"):
        if output is not None:
            check_json(output)
        result = compare(reference, outputs, floor=floor, protocol=protocol, with_lpips=lpips)
        write_json(output, result)
        table(*rows_of(result))
        formulas = dict(result["protocol"])
        print(f"protocol {formulas.pop('name')}")
        for name, formula in formulas.items():
            print(f"{name}: {formula}")
