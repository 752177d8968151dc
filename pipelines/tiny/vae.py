"""Train tiny-wan's video autoencoder, an `AutoencoderKLWan`: 4x4 pixels, 2 frames to a latent of 8 channels.

    python -m dit_sparse.pipelines.tiny.vae --out runs/vae                 # trains, or resumes where it was
    torchrun --standalone --nproc-per-node 2 -m dit_sparse.pipelines.tiny.vae --out runs/vae --threads 1
    python -m dit_sparse.pipelines.tiny.vae --out runs/vae --finish        # measure, and write runs/vae/model
    python -m dit_sparse.pipelines.tiny.vae --out runs/vae2 --start runs/vae/model    # then the decoder alone

SIGTERM writes a checkpoint and ends with status 0. `--finish` measures reconstruction on held-out clips at
full size and full length, and the mean and spread of each latent channel, which go into the config as
`latents_mean` and `latents_std`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import Tensor, nn

from dit_sparse.pipelines.tiny import data
from dit_sparse.pipelines.tiny.training import (
    Average,
    StopRequest,
    average_over_processes,
    join,
    load,
    load_optimizer,
    optimizer_tensors,
    part,
    prefixed,
    save,
)

CHANNELS = 8
# Wan 2.2's residual layout. The pixel unshuffle (patch_size) comes first, so that nothing is ever convolved
# at full size: decoding 65 frames takes about a second on two cores.
CONFIG = {
    "base_dim": 16,
    "z_dim": CHANNELS,
    "dim_mult": [2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 4,
    "latents_mean": [0.0] * CHANNELS,
    "latents_std": [1.0] * CHANNELS,
}


def build(config: dict | None = None) -> AutoencoderKLWan:
    """A fresh autoencoder that starts close to a linear one, which learns faster.

    Residual branches begin at zero, and the posterior's spread at 0.1, so that noise does not hide the
    signal.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_config(config or CONFIG)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    nn.init.constant_(vae.quant_conv.bias[CHANNELS:], -4.6)
    return vae


def normalized_latents(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Latents as the transformer sees them, about N(0, 1).

    video: [B, 3, F, H, W] in -1..1. Returns [B, 8, (F+1)/2, H/4, W/4].
    """
    z = vae.encode(video).latent_dist.mode().float()
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (z - mean) / std


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB of two videos in -1..1."""
    return 10 * math.log10(4 / F.mse_loss(a, b).item())


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels along height and width."""
    return x.diff(dim=-2), x.diff(dim=-1)


def loss_of(
    vae: AutoencoderKLWan, video: Tensor, args: argparse.Namespace
) -> tuple[Tensor, dict[str, float]]:
    """Training loss of clips [B, 3, F, H, W], and its parts for the log."""
    with torch.autocast("cpu", torch.bfloat16) if args.bf16 else contextlib.nullcontext():
        posterior = vae.encode(video).latent_dist
        out = vae.decode(posterior.sample()).sample
    out = out.float()
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(out), edges(video), strict=True))
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    l1, l2 = F.l1_loss(out, video), F.mse_loss(out, video)
    return l1 + 2 * l2 + args.edge * edge + args.kl * kl, {
        "l1": l1.item(),
        "psnr": psnr(out.detach(), video),
        "kl": kl.item(),
    }


def train(args: argparse.Namespace) -> None:
    """Run or resume training until `args.steps`, or until asked to stop."""
    rank, processes = join()
    stop = StopRequest()
    path = args.out / "checkpoint.safetensors"
    vae = AutoencoderKLWan.from_pretrained(args.start) if args.start else build()
    if args.start:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = Average(vae, args.ema)
    first = 0
    if path.exists():
        tensors, state = load(path)
        vae.load_state_dict(part(tensors, "model"))
        average.weights = part(tensors, "ema")
        load_optimizer(optimizer, part(tensors, "optimizer"))
        first = state["step"]

    def checkpoint(step: int) -> None:
        groups = {
            "model": vae.state_dict(),
            "ema": average.weights,
            "optimizer": optimizer_tensors(optimizer),
        }
        save(path, {k: v for name, g in groups.items() for k, v in prefixed(g, name).items()}, {"step": step})

    started, recent = time.monotonic(), []
    for step in range(first, args.steps):
        # Everything random in a step follows from its number, so that a resumed run is the same run.
        torch.manual_seed(step * processes + rank)
        share = args.batch // processes
        video, _ = data.clips(args.seed, step * args.batch + rank * share, share, args.frames)
        # Half-width crops: the convolutions have no idea of where they are, so only the speed changes.
        left = int(torch.randint(0, (data.WIDTH - args.crop) // 4 + 1, ())) * 4
        video = video[..., left : left + args.crop]
        for group in optimizer.param_groups:
            decay = 0.5 * (1 + math.cos(math.pi * step / args.steps))
            group["lr"] = args.lr * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * decay)
        loss, parts = loss_of(vae, video, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_over_processes([p.grad for p in vae.parameters() if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae, step)
        recent.append({"loss": loss.item(), **parts})
        if rank == 0 and (step + 1) % 50 == 0:
            means = {k: round(sum(r[k] for r in recent) / len(recent), 4) for k in parts}
            seconds = (time.monotonic() - started) / len(recent)
            print(json.dumps({"step": step + 1, **means, "s_per_step": round(seconds, 3)}), flush=True)
            started, recent = time.monotonic(), []
        stopping = stop.agreed()
        if rank == 0 and (stopping or (step + 1) % 250 == 0 or step + 1 == args.steps):
            checkpoint(step + 1)
        if stopping:
            return


@torch.no_grad()
def finish(args: argparse.Namespace) -> None:
    """Measure the averaged weights on held-out clips and write the finished autoencoder to `out/model`."""
    tensors, state = load(args.out / "checkpoint.safetensors")
    vae = build().eval()
    vae.load_state_dict(part(tensors, "ema"))
    vae.to(torch.bfloat16).float()
    scenes = [data.sample(args.seed + 1, i, held_out=True) for i in range(args.clips)]
    quality, latents = [], []
    for scene in scenes:
        video = data.render(scene, data.LONGEST).permute(3, 0, 1, 2)[None] * 2 - 1
        z = vae.encode(video).latent_dist.mode()
        latents.append(z)
        quality.append(psnr(vae.decode(z).sample, video))
    z = torch.cat(latents)
    if args.start:
        config = dict(AutoencoderKLWan.load_config(args.start))
    else:
        config = {
            **CONFIG,
            "latents_mean": z.mean((0, 2, 3, 4)).tolist(),
            "latents_std": z.std((0, 2, 3, 4)).tolist(),
        }
    out = build(config).eval()
    out.load_state_dict(vae.state_dict())
    out.to(torch.bfloat16).save_pretrained(args.out / "model")
    mean = sum(quality) / len(quality)
    print(
        json.dumps(
            {"step": state["step"], "clips": len(quality), "psnr_mean": mean, "psnr_worst": min(quality)}
        )
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the checkpoint and the finished model"
    )
    parser.add_argument(
        "--finish", action="store_true", help="measure and write out/model instead of training"
    )
    parser.add_argument(
        "--start", type=Path, help="a finished model: train only its decoder, its latents stay as they are"
    )
    parser.add_argument("--steps", type=int, default=3000, help="training ends after this many steps")
    parser.add_argument("--batch", type=int, default=4, help="clips per step")
    parser.add_argument("--frames", type=int, default=9, help="frames per clip, 1 + a multiple of 4")
    parser.add_argument("--crop", type=int, default=64, help="width of a training crop in pixels")
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="peak learning rate; cosine decay, 50 steps of warm-up"
    )
    parser.add_argument(
        "--edge", type=float, default=0.5, help="weight of the L1 loss between pixel differences"
    )
    parser.add_argument("--kl", type=float, default=2e-4, help="weight of the KL term, per latent element")
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the averaged weights")
    parser.add_argument("--clips", type=int, default=16, help="held-out clips that --finish measures")
    parser.add_argument("--seed", type=int, default=0, help="stream of training scenes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (finish if args.finish else train)(args)


if __name__ == "__main__":
    main()
