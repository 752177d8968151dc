"""CogView3-Plus: text to image. Text stands before the grid in one sequence and has no mask; positions are
added to the tokens. Classifier-free guidance is one batch, [uncond, cond], and the schedulers have no
``step_index``.
"""

from __future__ import annotations

from dit_sparse.layout import TokenLayout
from dit_sparse.pipelines.cogview4 import layers, layout
from dit_sparse.pipelines.family import Checkpoint, Config, Family, square_patches

TINY: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "pos_embed_max_size": 24,
}

# The call: the pipeline's defaults. The released model has the defaults of the class, as
# scripts/convert_cogview3_to_diffusers.py of diffusers has it.
CHECKPOINTS: dict[str, Checkpoint] = {
    "cogview3-plus": Checkpoint(
        "zai-org/CogView3-Plus-3B",
        "3b",
        "text to image, 512 to 2048 pixels a side; 15 GB of weights in bfloat16",
        {"height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 5.0},
        "CogView3PlusTransformer2DModel",
        {},
        (30, 64, 40),
        TokenLayout((1, 64, 64), text=224, text_first=True),
    ),
}

FAMILY = Family(
    name="cogview3plus",
    transformers={"CogView3PlusTransformer2DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=square_patches,
    joint=True,
    video=False,
    branches=("cond_uncond",),
    checkpoints=CHECKPOINTS,
)
