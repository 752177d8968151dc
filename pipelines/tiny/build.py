"""The parts of tiny-wan, and the WanPipeline folder they become.

    python -m dit_sparse.pipelines.tiny.build --vae runs/vae/model --train runs/wan    # replaces model/

The folder holds nothing of this package: plain `diffusers.WanPipeline.from_pretrained(folder)` loads it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import tokenizers
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_sparse.pipelines.tiny import MODEL_DIR, data, vae
from dit_sparse.pipelines.tiny.training import load, part

TEXT_DIM = 96
SHIFT = 5.0
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "in_channels": vae.CHANNELS,
    "out_channels": vae.CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 8,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the captions' grammar; case and punctuation are ignored, others become <unk>."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *data.WORDS))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Whitespace(),
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[^\w]+"), "removed"),
        ]
    )
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def text_encoder() -> UMT5EncoderModel:
    """A fresh two-layer UMT5 encoder."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=3 + len(data.WORDS),
            d_model=TEXT_DIM,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


class Denoiser(nn.Module):
    """The transformer and its text encoder, and for training alone a head on a middle block.

    The head tells from the features of block `MIDDLE` which words of the caption each token shows
    (`data.meaning`). Denoising alone teaches that slowly, because a kind of shape is a few pixels of its
    outline; with the head, features that mean something come early (the idea of REPA, arXiv:2410.06940, with
    the truth in place of a pretrained encoder). It is not exported.
    """

    MIDDLE = 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = WanTransformer3DModel(**TRANSFORMER)
        self.text_encoder = text_encoder()
        self.tokenizer = tokenizer()
        nn.init.zeros_(self.transformer.proj_out.weight)
        dim = self.transformer.proj_out.in_features
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, len(data.MEANINGS)))
        self.transformer.blocks[self.MIDDLE].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.features = output

    def load_pipeline(self, folder: Path) -> None:
        """Take the weights of an exported pipeline."""
        for name in ("transformer", "text_encoder"):
            module = getattr(self, name)
            kept = type(module).from_pretrained(folder, subfolder=name, torch_dtype=torch.float32)
            module.load_state_dict(kept.state_dict())

    def encode(self, captions: list[str], length: int) -> Tensor:
        """Text embeddings [B, length, TEXT_DIM] as `WanPipeline` makes them: zeros after a caption's end."""
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt")
        mask = tokens.attention_mask
        text = self.text_encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]
        return nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))

    def forward(self, latents: Tensor, timestep: Tensor, captions: list[str], length: int) -> Tensor:
        """Predicted velocity, the shape of `latents` [B, 8, F, H, W]; `timestep` [B] in 0..1000."""
        text = self.encode(captions, length)
        return self.transformer(latents, timestep, text, return_dict=False)[0]

    def meanings(self) -> Tensor:
        """Logits of `data.meaning`, [B, tokens, len(data.MEANINGS)], of the last `forward`."""
        return self.head(self.features)


def pipeline(autoencoder: AutoencoderKLWan, denoiser: Denoiser) -> WanPipeline:
    """The whole as a diffusers pipeline."""
    return WanPipeline(
        tokenizer=denoiser.tokenizer,
        text_encoder=denoiser.text_encoder,
        transformer=denoiser.transformer,
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )


def export(autoencoder: AutoencoderKLWan, denoiser: Denoiser, folder: Path) -> None:
    """Write the pipeline in bf16, replacing `folder` only once the new one is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
    pipeline(autoencoder, denoiser).to(torch.bfloat16).save_pretrained(partial, safe_serialization=True)
    # transformers 5 writes the class's new name, which transformers 4 does not know; both know the old one.
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        text = (partial / name).read_text()
        (partial / name).write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    # Where a part was loaded from is nobody's business.
    for path in partial.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    partial.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", type=Path, required=True, help="finished autoencoder (vae.py --finish)")
    parser.add_argument("--train", type=Path, help="folder train.py wrote; without it the weights are random")
    parser.add_argument("--raw", action="store_true", help="the last weights instead of the averaged ones")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="the pipeline folder")
    args = parser.parse_args()
    denoiser = Denoiser().eval()
    if args.train:
        tensors, state = load(args.train / "checkpoint.safetensors")
        denoiser.load_state_dict(part(tensors, "model" if args.raw else "ema"))
        print(f"weights of step {state['step']}")
    export(AutoencoderKLWan.from_pretrained(args.vae), denoiser, args.out)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
