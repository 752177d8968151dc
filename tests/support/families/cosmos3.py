"""Cosmos 3: one packed sequence, with a given frame, and with sound behind the grid."""

from functools import partial
from math import prod
from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int, given: int = 0, sound: int = 0) -> dict[str, Any]:
    """For one item: the model packs what it is called with into one sequence.

    Args:
        given: Leading frames without noise.
        sound: Tokens of sound.
    """
    assert batch == 1
    config, text, tokens = model.config, 12, prod(grid)
    size = grid[0], *(n * config.latent_patch_size for n in grid[1:])
    places, frame = torch.arange(text + tokens + sound), prod(grid[1:])
    noisy = torch.arange(given, grid[0])
    ids = torch.randint(config.vocab_size, (text,), generator=torch.Generator().manual_seed(first))
    axes = [torch.arange(n) for n in grid]
    positions = torch.cat([
        torch.arange(text).expand(3, -1),
        torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + text,
        torch.arange(sound).expand(3, -1) + text,
    ], dim=1)  # fmt: skip
    call = {
        "input_ids": ids,
        "text_indexes": places[:text],
        "position_ids": positions.float(),
        "und_len": text,
        "sequence_length": len(places),
        # Like the tokens of a video these have much in common: else no method could leave out any.
        "vision_tokens": [1 + items(first, 1, config.latent_channel, *size, seed=1)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": places[text : text + tokens],
        "vision_mse_loss_indexes": places[text + given * frame : text + tokens],
        "vision_timesteps": torch.full((len(noisy) * frame,), 500.0),
        "vision_noisy_frame_indexes": [noisy],
        "return_dict": False,
    }
    if sound:
        call |= {
            "sound_tokens": [items(first, 1, config.sound_dim, sound, seed=2)[0]],
            "sound_token_shapes": [(sound, 1, 1)],
            "sound_sequence_indexes": places[text + tokens :],
            "sound_mse_loss_indexes": places[text + tokens :],
            "sound_timesteps": torch.full((sound,), 500.0),
            "sound_noisy_frame_indexes": [torch.arange(sound)],
        }
    return call


def video(out: Any) -> torch.Tensor:
    return out[0][0]


CASES = {
    "cosmos3": Case("Cosmos3OmniTransformer", inputs, output=video, batched=False),
    "cosmos3-given": Case(
        "Cosmos3OmniTransformer", partial(inputs, given=1, sound=7), output=video, batched=False
    ),
}
