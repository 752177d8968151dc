"""tiny-wan: a small, really trained text-to-video model that comes with the package (see README.md here).

pipe = WanPipeline.from_pretrained(tiny.MODEL_DIR)
frames = pipe("a red circle moving left on a gray background", **tiny.DEFAULT).frames[0]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL_DIR = Path(__file__).parent / "model"

# Arguments of a WanPipeline call. A token grid is (latent frames, 8, 16); latents = (num_frames + 1) / 2.
# DEFAULT has 33 latent frames, 4,224 tokens: there attention is most of the work.
DEFAULT: dict[str, Any] = {
    "height": 64,
    "width": 128,
    "num_frames": 65,
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
    "max_sequence_length": 32,
}
# STUDY has 13 latent frames, 1,664 tokens: short enough for tables over many prompts.
STUDY: dict[str, Any] = {**DEFAULT, "num_frames": 25, "num_inference_steps": 12}
