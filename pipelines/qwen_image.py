"""Qwen-Image: text to image, editing with reference images, and images in layers. Blocks attend over [text,
image, references], whose sizes the model is told. A padded prompt comes with a mask of keys. Layers of one
size are frames here; the image they are taken from is a reference.
"""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, own_pipeline, stacks

TINY: Config = {
    "in_channels": 4,
    "out_channels": 1,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def layers(model: Any) -> list[Layer]:
    return stacks(model, ("transformer_blocks", "attn"))


def layout(model: Any, args: Arguments) -> TokenLayout | str:
    """``img_shapes`` has (frames, height, width) of the images of each batch item, or of its only one."""
    shapes = args["img_shapes"]
    if any(shape != shapes[0] for shape in shapes):
        return "batch items have images of different sizes"
    images = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
    made = images[:-1] if model.config.get("use_layer3d_rope") else images[:1]
    if len({tuple(image[1:]) for image in made}) > 1:
        return "layers have different sizes"
    frames, (_, height, width) = sum(image[0] for image in made), made[0]
    references = sum(f * h * w for f, h, w in images[len(made) :])
    return TokenLayout((frames, height, width), text_first=True, suffix=references)


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """A token is 2 x 2 latents; each stage of the autoencoder that has a say on frames halves the sides."""
    side = 2 * 2 ** len(vae["temperal_downsample"])
    return 1, side, side


def pipeline_class(index: Config, image: bool) -> str:
    """Qwen-Image also goes on from an image; the editing models need one.

    Raises:
        ValueError: No image for an editing model; layers, which are many images.
    """
    name: str = index["_class_name"]
    if name == "QwenImageLayeredPipeline":
        raise ValueError(f"{name} makes several images: call it with dit_sparse.apply in Python")
    if name == "QwenImagePipeline" and image:
        return "QwenImageImg2ImgPipeline"
    return own_pipeline(index, image, "Edit")


_CALL = {"num_inference_steps": 50, "true_cfg_scale": 4.0, "negative_prompt": " "}
_1024 = {"height": 1024, "width": 1024}
_EDIT = TokenLayout((1, 64, 64), text=512, text_first=True, suffix=4096)


def _checkpoint(
    name: str, about: str, defaults: Config, tokens: TokenLayout, config: Config | None = None
) -> Checkpoint:
    return Checkpoint(
        f"Qwen/{name}",
        "20b",
        f"{about}; 20B, on a 24 GB card with --offload group",
        defaults,
        "QwenImageTransformer2DModel",
        config or {},
        (60, 24, 128),
        tokens,
    )


# Configurations: the class's defaults, and what tells the later models apart: Edit-2511 leaves its references
# without noise, Layered's pipeline needs both of its. Calls: the model cards.
CHECKPOINTS: dict[str, Checkpoint] = {
    "qwen-image": _checkpoint(
        "Qwen-Image",
        "text to image, 1328x1328",
        {"height": 1328, "width": 1328, **_CALL},
        TokenLayout((1, 83, 83), text=512, text_first=True),
    ),
    "qwen-image-2512": _checkpoint(
        "Qwen-Image-2512",
        "text to image, 1328x1328",
        {"height": 1328, "width": 1328, **_CALL},
        TokenLayout((1, 83, 83), text=512, text_first=True),
    ),
    "qwen-image-edit": _checkpoint(
        "Qwen-Image-Edit", "edits an image as the prompt says", {**_1024, **_CALL}, _EDIT
    ),
    "qwen-image-edit-2509": _checkpoint(
        "Qwen-Image-Edit-2509",
        "edits one to three images as the prompt says",
        {**_1024, **_CALL, "num_inference_steps": 40},
        _EDIT,
    ),
    "qwen-image-edit-2511": _checkpoint(
        "Qwen-Image-Edit-2511",
        "edits one to three images as the prompt says",
        {**_1024, **_CALL, "num_inference_steps": 40},
        _EDIT,
        {"zero_cond_t": True},
    ),
    "qwen-image-layered": _checkpoint(
        "Qwen-Image-Layered",
        "takes an image apart into layers, 640x640",
        {"layers": 4, "resolution": 640, **_CALL},
        TokenLayout((5, 40, 40), text=512, text_first=True, suffix=1600),
        {"use_additional_t_cond": True, "use_layer3d_rope": True},
    ),
}

FAMILY = Family(
    name="qwen_image",
    transformers={"QwenImageTransformer2DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    joint=True,
    video=False,
    checkpoints=CHECKPOINTS,
    pipeline_class=pipeline_class,
)
