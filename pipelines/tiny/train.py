"""Train tiny-wan's text encoder, then its transformer, on captioned videos of moving shapes.

    python -m dit_sparse.pipelines.tiny.train --vae runs/vae/model --out runs/wan    # trains, or resumes
    torchrun --standalone --nproc-per-node 2 -m dit_sparse.pipelines.tiny.train \\
        --vae runs/vae/model --out runs/wan --threads 1 --compile       # on two cores, about twice as fast
    kill -TERM PID                                                      # writes a checkpoint, ends with 0
    python -m dit_sparse.pipelines.tiny.build --vae runs/vae/model --train runs/wan    # exports the average

The text encoder learns from captions alone, in a minute, and is frozen: every word comes to tell the colour,
kind and direction of its own shape, so that cross-attention need not find out which word belongs to which.

Flow matching: x_t = (1 - t) x_0 + t noise, the model predicts noise - x_0 at timestep 1000 t. Clips are
rendered and encoded as they are needed, so no example comes twice. Everything random in a step follows from
the step's number: a run that was interrupted ends with the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from dit_sparse.pipelines.tiny import data
from dit_sparse.pipelines.tiny.attention import use_fast_attention
from dit_sparse.pipelines.tiny.build import TEXT_DIM, Denoiser
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
from dit_sparse.pipelines.tiny.vae import normalized_latents

# Steps, then the clips of a step as LATENT FRAMES x BATCH; several alternatives take turns at random. Single
# pictures teach colours and shapes at a fraction of a video's cost, clips teach motion, the last stage the
# full length.
PLAN = "300:1x32 1200:1x32,5x8,13x4 2600:5x8,13x4,13x4 400:13x4,33x2"
# WanPipeline pads a prompt with zeros to `max_sequence_length`, and cross-attention reads them. Training
# meets two lengths, so that the model does well with our 32 and with diffusers' default of 512.
TEXT_LENGTHS = (32, 32, 32, 32, 32, 32, 32, 512)


def stage_of(plan: str, step: int) -> tuple[list[tuple[int, int]], int]:
    """The alternatives (latent frames, batch) at a step of a plan, and the plan's length in steps."""
    total, found = 0, []
    for stage in plan.split():
        steps, shapes = stage.split(":")
        if total <= step < total + int(steps):
            found = [(int(f), int(b)) for f, b in (s.split("x") for s in shapes.split(","))]
        total += int(steps)
    return found, total


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Warm-up, then constant, then a straight line to 5 % over the last `args.decay` of the plan."""
    left = (total - step) / max(1.0, args.decay * total)
    return args.lr * min(1.0, (step + 1) / args.warmup) * (0.05 + 0.95 * min(1.0, left))


def draw(
    args: argparse.Namespace, step: int, index: int, batch: int, frames: int
) -> tuple[torch.Generator, float, bool]:
    """For example `index` of a step: its generator, its time t, and whether its caption is dropped."""
    generator = torch.Generator().manual_seed(args.seed + (step << 10) + index)
    u, mix, drop = torch.rand(3, generator=generator).tolist()
    # One example from each of `batch` equal slices of the distribution: less noise in the loss.
    u = (index + u) / batch
    if mix < 0.1:
        return generator, u, drop < args.drop
    t = torch.special.ndtri(torch.tensor(u).clamp(1e-4, 1 - 1e-4)).sigmoid().item()
    # The frames of a clip repeat each other, so that a long clip shows through noise that hides a picture.
    shift = args.shift * (frames / 13) ** 0.35
    return generator, shift * t / (1 + (shift - 1) * t), drop < args.drop


def example_batch(
    vae: AutoencoderKLWan, args: argparse.Namespace, step: int, rank: int, processes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str], int]:
    """This process's share of a step: x_t, timestep, target, meaning, captions, padded text length."""
    shapes, _ = stage_of(args.plan, step)
    choose = torch.Generator().manual_seed(args.seed + (step << 10) + 1023)
    frames, batch = shapes[int(torch.randint(len(shapes), (), generator=choose))]
    length = TEXT_LENGTHS[int(torch.randint(len(TEXT_LENGTHS), (), generator=choose))]
    share = batch // processes
    first = rank * share
    video, scenes = data.clips(args.seed, (step << 10) + first, share, 2 * frames - 1)
    captions = [s.caption for s in scenes]
    meaning = torch.stack([data.meaning(s, 2 * frames - 1) for s in scenes]).flatten(1, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        x0 = normalized_latents(vae, video)
    noise, times = torch.empty_like(x0), torch.empty(share)
    for i in range(share):
        generator, times[i], dropped = draw(args, step, first + i, batch, frames)
        noise[i] = torch.randn(x0.shape[1:], generator=generator)
        captions[i] = "" if dropped else captions[i]
    t = times.view(-1, 1, 1, 1, 1)
    return (1 - t) * x0 + t * noise, times * 1000, noise - x0, meaning, captions, length


def teach_text(model: Denoiser, args: argparse.Namespace) -> float:
    """Train the text encoder so that each word's embedding tells linearly what its phrase says.

    See `data.described`; every process does the same. Returns the last loss.
    """
    head = torch.nn.Linear(TEXT_DIM, len(data.MEANINGS) + len(data.BACKGROUNDS))
    optimizer = torch.optim.AdamW([*model.text_encoder.parameters(), *head.parameters()], lr=2e-3)
    last = math.nan
    for step in range(args.text_steps):
        scenes = [data.sample(args.seed, (1 << 40) + 64 * step + i) for i in range(64)]
        said = [data.described(s) for s in scenes]
        # The end token of the longest caption is cut off: it says nothing.
        text = model.encode([s.caption for s in scenes], max(map(len, said)))
        there = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s)) for s in said], batch_first=True) > 0
        loss = F.binary_cross_entropy_with_logits(head(text[there]), torch.cat(said))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / args.text_steps)
        optimizer.step()
        last = loss.item()
    return last


def optimizers(model: Denoiser, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def means(recent: list[tuple[int, float, float]], column: int) -> dict[int, float]:
    """Mean of a column of the log by number of latent frames."""
    lengths = sorted({row[0] for row in recent})
    return {f: round(fmean(row[column] for row in recent if row[0] == f), 4) for f in lengths}


def train(args: argparse.Namespace) -> None:
    """Run or resume training to the end of the plan, or until asked to stop."""
    rank, processes = join()
    stop = StopRequest()
    path = args.out / "checkpoint.safetensors"
    _, total = stage_of(args.plan, 0)
    vae = AutoencoderKLWan.from_pretrained(args.vae).eval()
    model = Denoiser()
    if args.weights:
        model.load_pipeline(args.weights)
    elif not path.exists():
        text_loss = teach_text(model, args)
        if rank == 0:
            print(json.dumps({"text_steps": args.text_steps, "text_loss": round(text_loss, 5)}), flush=True)
    model.text_encoder.requires_grad_(False)
    use_fast_attention(model.transformer)
    if args.compile:
        for block in model.transformer.blocks:
            # Not `block.compile`: hooks stay outside.
            block.forward = torch.compile(block.forward, dynamic=False)
    steppers = optimizers(model, args)
    average = Average(model, args.ema)
    first = 0
    if path.exists():
        tensors, state = load(path)
        model.load_state_dict(part(tensors, "model"))
        average.weights = part(tensors, "ema")
        for i, optimizer in enumerate(steppers):
            load_optimizer(optimizer, part(tensors, f"optimizer{i}"))
        first = state["step"]

    def checkpoint(step: int) -> None:
        groups = {"model": model.state_dict(), "ema": average.weights}
        groups |= {f"optimizer{i}": optimizer_tensors(o) for i, o in enumerate(steppers)}
        tensors = {k: v for name, group in groups.items() for k, v in prefixed(group, name).items()}
        save(path, tensors, {"step": step, "plan": args.plan, "seed": args.seed})

    started, recent = time.monotonic(), []
    for step in range(first, total):
        x, timestep, target, meaning, captions, length = example_batch(vae, args, step, rank, processes)
        # A new shape costs a minute of compilation: worth it for the common text length and short clips only.
        eager = length != TEXT_LENGTHS[0] or x.shape[2] > 13
        torch.compiler.set_stance("force_eager" if eager else "default")
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            out = model(x, timestep, captions, length)
            logits = model.meanings()
        loss = F.mse_loss(out.float(), target)
        words = F.binary_cross_entropy_with_logits(logits.float(), meaning)
        model.zero_grad()
        rate = learning_rate(step, total, args)
        (loss + args.head * rate / args.lr * words).backward()
        average_over_processes([p.grad for p in model.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        average.update(model, step)
        recent.append((x.shape[2], loss.item(), words.item()))
        if rank == 0 and (step + 1) % args.log_every == 0:
            row = {"step": step + 1, "loss": means(recent, 1), "words": means(recent, 2)}
            row |= {"grad_norm": round(norm.item(), 3), "lr": round(rate, 6)}
            row |= {
                "s_per_step": round((time.monotonic() - started) / len(recent), 3),
                "at": time.strftime("%H:%M:%S"),
            }
            print(json.dumps(row), flush=True)
            if not all(math.isfinite(v) for _, v, _ in recent):
                raise FloatingPointError(
                    f"the loss is not finite near step {step + 1}: resume with a smaller --lr"
                )
            started, recent = time.monotonic(), []
        stopping = stop.agreed()
        if rank == 0 and (stopping or (step + 1) % args.save_every == 0 or step + 1 == total):
            checkpoint(step + 1)
        if stopping:
            return


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", type=Path, required=True, help="finished autoencoder (vae.py --finish)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--weights", type=Path, help="begin with those of this pipeline folder")
    parser.add_argument(
        "--plan", default=PLAN, help="'STEPS:FRAMESxBATCH,... ...', frames in latents; %(default)s"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--warmup", type=int, default=100, help="steps of warm-up (%(default)s)")
    parser.add_argument(
        "--decay", type=float, default=0.3, help="share of the plan with falling rate (%(default)s)"
    )
    parser.add_argument(
        "--shift",
        type=float,
        default=5.0,
        help="shift of the logit-normal times at 13 latent frames (%(default)s)",
    )
    parser.add_argument(
        "--drop", type=float, default=0.1, help="chance that a caption is dropped (%(default)s)"
    )
    parser.add_argument(
        "--ema", type=float, default=0.999, help="decay of the averaged weights (%(default)s)"
    )
    parser.add_argument(
        "--text-steps", type=int, default=600, help="steps of the text encoder alone (%(default)s)"
    )
    parser.add_argument(
        "--head",
        type=float,
        default=10,
        help="weight of the loss on the meaning of features; it falls with the rate (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="stream of scenes and noise (%(default)s)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--log-every", type=int, default=25, help="steps between log lines (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)"
    )
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks: about 20 %% faster")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
