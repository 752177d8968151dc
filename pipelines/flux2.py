"""FLUX.2: text and any number of reference images to image. Double and then single blocks attend over
[text, image, references] alike; single blocks project q, k and v together with the hidden states of their
MLP. The KV variant of Klein attends in a helper function of diffusers, where nothing can be redirected.
"""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Checkpoint, Config, Family, stacks
from dit_sparse.pipelines.flux import layout, packed

TINY: Config = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}


def layers(model: Any) -> list[Layer]:
    """Double blocks, then single blocks.

    Raises:
        ValueError: The model has the processors of ``Flux2KleinKVPipeline``.
    """
    if any("Flux2KV" in type(processor).__name__ for processor in model.attn_processors.values()):
        raise ValueError(
            "Flux2KleinKVPipeline attends to reference images kept from its first step in a function that "
            "cannot be redirected; FLUX.2-klein in Flux2KleinPipeline can run sparse"
        )
    config = model.config
    return stacks(
        model,
        ("transformer_blocks", "attn"),
        ("single_transformer_blocks", "attn"),
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        dim=config.num_attention_heads * config.attention_head_dim,
    )


def pipeline_class(index: Config, image: bool) -> str:
    """Every pipeline takes images and does without."""
    return index["_class_name"]


# Configurations: src/flux2/model.py of black-forest-labs/flux2; dev is the class's defaults. Calls: the
# model cards and the examples of diffusers 0.42.
_1024 = {"height": 1024, "width": 1024}
_LAYOUT = TokenLayout((1, 64, 64), text=512, text_first=True)


def _klein(layers: int, single: int, heads: int, text: int) -> Config:
    return {
        "num_layers": layers,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "guidance_embeds": False,
    }


_4B, _9B = _klein(5, 20, 24, 7680), _klein(8, 24, 32, 12288)
_DISTILLED = {**_1024, "num_inference_steps": 4, "guidance_scale": 1.0}
_BASE = {**_1024, "num_inference_steps": 50, "guidance_scale": 4.0}
_WHAT = "text and reference images to image"
_ACCESS = "needs access granted on the Hub"


def _checkpoint(
    name: str, size: str, about: str, defaults: Config, config: Config, attention: tuple[int, int, int]
) -> Checkpoint:
    return Checkpoint(
        f"black-forest-labs/{name}",
        size,
        f"{_WHAT}{about}",
        defaults,
        "Flux2Transformer2DModel",
        config,
        attention,
        _LAYOUT,
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    "flux.2-dev": _checkpoint(
        "FLUX.2-dev", "32b", f"; {_ACCESS}; 32B, on a 24 GB card with --offload group",
        {**_1024, "num_inference_steps": 50, "guidance_scale": 4.0}, {}, (56, 48, 128),
    ),
    "flux.2-klein-4b": _checkpoint(
        "FLUX.2-klein-4B", "4b", " in 4 steps; fits a 24 GB card in bfloat16", _DISTILLED, _4B, (25, 24, 128),
    ),
    "flux.2-klein-base-4b": _checkpoint(
        "FLUX.2-klein-base-4B", "4b", "; fits a 24 GB card in bfloat16", _BASE, _4B, (25, 24, 128),
    ),
    "flux.2-klein-9b": _checkpoint(
        "FLUX.2-klein-9B", "9b", f" in 4 steps; {_ACCESS}; on a 24 GB card with --offload model",
        _DISTILLED, _9B, (32, 32, 128),
    ),
    "flux.2-klein-base-9b": _checkpoint(
        "FLUX.2-klein-base-9B", "9b", f"; {_ACCESS}; on a 24 GB card with --offload model",
        _BASE, _9B, (32, 32, 128),
    ),
}  # fmt: skip

FAMILY = Family(
    name="flux2",
    transformers={"Flux2Transformer2DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=packed,
    joint=True,
    video=False,
    checkpoints=CHECKPOINTS,
    pipeline_class=pipeline_class,
)
