"""LoRA training through sparse attention: peft on the attached bundled model, and its loss falls."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig

import dit_sparse
from dit_sparse import RadialProcessor
from dit_sparse.pipelines.tiny import MODEL_DIR
from dit_sparse.pipelines.tiny.data import clips


def losses(checkpointing: bool, steps: int) -> tuple[list[float], list[torch.Tensor], dit_sparse.Session]:
    """Adapt the model to two clips drawn upside down, at fixed noise and times."""
    from diffusers import WanPipeline

    pipe: Any = WanPipeline.from_pretrained(MODEL_DIR, torch_dtype=torch.float32)
    video, scenes = clips(seed=7, start=0, count=2, frames=17)
    captions = [scene.caption for scene in scenes]
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    with torch.no_grad():
        x0 = (pipe.vae.encode(video.flip(-2)).latent_dist.mode() - mean) / std
        text, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=32)
    torch.manual_seed(0)
    noise, t = torch.randn_like(x0), torch.tensor([0.4, 0.8])
    noisy = (1 - t.view(-1, 1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1, 1) * noise

    model = pipe.transformer.train().requires_grad_(False)
    session = dit_sparse.apply(
        model, RadialProcessor(block=32, decay=0.2, decimate_below=128), schedule="always"
    )
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if checkpointing:
        model.enable_gradient_checkpointing()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    values = []
    for _ in range(steps):
        out = model(noisy, t * 1000, text, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(out, noise - x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values, [p.grad.clone() for p in parameters if p.grad is not None], session


def test_lora_learns_through_sparse_attention() -> None:
    values, _, session = losses(checkpointing=False, steps=8)
    report = session.report()
    assert len(report.sparse_rows) == len(report.rows) == 8
    assert report.sparse_density < 0.7
    assert values[-1] < 0.8 * values[0]


def test_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = (losses(checkpointing, steps=1) for checkpointing in (False, True))
    assert plain[0] == checkpointed[0]
    for a, b in zip(plain[1], checkpointed[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
