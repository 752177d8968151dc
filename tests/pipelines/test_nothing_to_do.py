"""The transformers without attention to make sparse are what the table says of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from tiny_models import randn

from dit_sparse.pipelines import FAMILIES, NOTHING_TO_DO


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """(queries, keys) of every softmax attention."""
    found: set[tuple[int, int]] = set()
    stock = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        found.add((query.shape[2], key.shape[2]))
        return stock(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return found


def test_the_table_names_classes_of_no_family() -> None:
    import diffusers

    lacking = [cls for cls in NOTHING_TO_DO if not hasattr(diffusers, cls)]
    assert not lacking or Version(diffusers.__version__) < Version("0.42")
    assert not set(NOTHING_TO_DO) & set(FAMILIES)


@torch.no_grad()
def test_latte_attends_in_space_and_in_time_apart(lengths: set[tuple[int, int]]) -> None:
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        sample_size=8,
        video_length=3,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    model(randn(1, 4, 3, 8, 8), torch.tensor([5]), randn(1, 7, 16))
    frame, text, frames = 16, 7, 3
    assert lengths == {(frame, frame), (frame, text), (frames, frames)}


SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 16,
    "sample_size": 8,
}


@pytest.mark.parametrize(
    ("cls", "config", "size"),
    [
        ("SanaTransformer2DModel", {}, (8, 8)),
        ("SanaVideoTransformer3DModel", {"rope_max_seq_len": 16}, (3, 8, 8)),
    ],
)
@torch.no_grad()
def test_sana_has_softmax_for_text_alone(
    cls: str, config: dict[str, Any], size: tuple[int, ...], lengths: set[tuple[int, int]]
) -> None:
    import diffusers

    model = getattr(diffusers, cls)(**SANA, **config)
    model(randn(1, 4, *size), randn(1, 7, 16), timestep=torch.tensor([5]))
    assert {keys for _, keys in lengths} == {7}
