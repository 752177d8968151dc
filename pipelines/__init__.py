"""Model families: one file each, found by the transformer's class name."""

from importlib import import_module
from typing import Any

from dit_sparse.pipelines.family import Checkpoint, Family, Preset

__all__ = ["FAMILIES", "NOTHING_TO_DO", "Checkpoint", "Family", "Preset", "families", "family_of"]

FAMILIES: dict[str, str] = {
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
    "WanAnimateTransformer3DModel": "wan",
    "ChronoEditTransformer3DModel": "wan",
    "SkyReelsV2Transformer3DModel": "wan",
    "CosmosTransformer3DModel": "cosmos",
    "Cosmos3OmniTransformer": "cosmos3",
    "FluxTransformer2DModel": "flux",
    "LongCatImageTransformer2DModel": "flux",
    "OvisImageTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "ChromaTransformer2DModel": "chroma",
    "QwenImageTransformer2DModel": "qwen_image",
    "CogVideoXTransformer3DModel": "cogvideox",
    "ConsisIDTransformer3DModel": "cogvideox",
    "MochiTransformer3DModel": "mochi",
    "AllegroTransformer3DModel": "allegro",
    "EasyAnimateTransformer3DModel": "easyanimate",
    "CogView4Transformer2DModel": "cogview4",
    "CogView3PlusTransformer2DModel": "cogview3plus",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "HunyuanVideoFramepackTransformer3DModel": "hunyuan_framepack",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "HunyuanImageTransformer2DModel": "hunyuan_image",
    "LTXVideoTransformer3DModel": "ltx",
    "LTX2VideoTransformer3DModel": "ltx",
    "Kandinsky5Transformer3DModel": "kandinsky5",
    "HeliosTransformer3DModel": "helios",
    "MiniMaxH3Transformer3DModel": "minimax_h3",
    "SD3Transformer2DModel": "sd3",
    "PixArtTransformer2DModel": "pixart",
    "AuraFlowTransformer2DModel": "auraflow",
    "ZImageTransformer2DModel": "z_image",
    "Lumina2Transformer2DModel": "lumina2",
    "HiDreamImageTransformer2DModel": "hidream",
}
"""Transformer class in diffusers -> file of its family."""

_LINEAR = "self-attention is linear in the number of tokens, and cross-attention reads a short text"
_AUDIO = "it makes audio, whose tokens lie along time alone, not in the grid of an image or a video"

NOTHING_TO_DO: dict[str, str] = {
    "WanAnimate2Transformer3DModel": "its attention is sparse already: a block mask lets each frame read the "
    "video and its own frame of the reference video",
    "LatteTransformer3DModel": "it attends within a frame, 1,024 tokens at 512x512, and apart from that "
    "along the 16 frames at one place: no attention sees frames, height and width together",
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": "three blocks of four are recurrent, linear in the number of tokens, and the "
    "softmax attention of the fourth is a module without a processor to redirect",
    "PriorTransformer": "its sequence is a prompt and a few embeddings, 81 tokens by default",
    "AceStepTransformer1DModel": _AUDIO,
    "LongCatAudioDiTTransformer": _AUDIO,
    "MiniMaxMusic3Transformer1DModel": _AUDIO,
    "StableAudioDiTModel": _AUDIO,
    "StableAudio3DiTModel": _AUDIO,
    "T5FilmDecoder": _AUDIO,
    "RFD4ProteinaTransformer": "it makes proteins, and every pair of residues has a bias of its own",
}
"""Transformer class in diffusers -> why there is nothing to make sparse in it."""


def families() -> dict[str, Family]:
    """File of a family -> the family, in the order of the table."""
    return {
        file: import_module(f"dit_sparse.pipelines.{file}").FAMILY
        for file in dict.fromkeys(FAMILIES.values())
    }


def family_of(model: Any) -> Family:
    """The family of a transformer, by its class or a base class of it.

    Raises:
        ValueError: No family knows the class; the message names those that are known.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return import_module(f"dit_sparse.pipelines.{FAMILIES[cls.__name__]}").FAMILY
        if cls.__name__ in NOTHING_TO_DO:
            raise ValueError(
                f"there is nothing to make sparse in {cls.__name__}: {NOTHING_TO_DO[cls.__name__]}"
            )
    known = ", ".join(sorted(FAMILIES))
    raise ValueError(f"{type(model).__name__} is not a supported transformer; supported are {known}")
