"""tiny-wan: its data, the folder it ships as, and a trainer that survives being stopped."""

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file
from torch import nn

from dit_sparse.pipelines import tiny
from dit_sparse.pipelines.tiny import attention, build, data, train, vae

CAPTION = "a red circle moving left and a blue square moving up on a gray background"
SMALL = {"height": 64, "width": 128, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def pipe():
    """The shipped model, as a user without this package's code would load it."""
    loaded = WanPipeline.from_pretrained(tiny.MODEL_DIR)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_captions_round_trip():
    for i in range(50):
        scene = data.sample(3, i)
        words = data.parse(scene.caption)
        assert words.caption == scene.caption
        assert set(scene.caption.split()) <= set(data.WORDS)
    with pytest.raises(ValueError, match="a pink circle"):
        data.parse("a pink circle moving left on a gray background")


def test_scenes_are_reproducible_and_stay_inside():
    for i in range(50):
        scene = data.sample(3, i)
        assert scene == data.sample(3, i)
        for shape in scene.shapes:
            path = shape.path(data.LONGEST)
            left, right, up, down = (shape.radius * r for r in data.REACH[shape.kind])
            assert (path >= [left - 1e-6, up - 1e-6]).all()
            assert (path <= [data.WIDTH - right + 1e-6, data.HEIGHT - down + 1e-6]).all()
            straight = np.diff(path[: data.STRAIGHT], axis=0)
            np.testing.assert_allclose(
                straight,
                shape.speed * np.array([data.DIRECTIONS[shape.direction]] * len(straight)),
                atol=1e-9,
            )


def test_meaning_says_where_each_word_is():
    scene = data.parse("a red circle moving left and a blue square moving up on a gray background")
    circle, square = scene.shapes
    circle = dataclasses.replace(circle, radius=12.0, x=40.0, y=20.0, speed=1.0)
    square = dataclasses.replace(square, radius=10.0, x=100.0, y=40.0, speed=1.0)
    scene = dataclasses.replace(scene, shapes=(circle, square))
    meaning = data.meaning(scene, 9)
    assert meaning.shape == (5, 8, 16, len(data.MEANINGS))
    area = {word: 64 * meaning[..., i].sum((1, 2)) for i, word in enumerate(data.MEANINGS)}
    for word in ("red", "circle", "left"):
        torch.testing.assert_close(area[word], torch.full((5,), np.pi * 12**2), rtol=0.01, atol=0)
    for word in ("blue", "square", "up"):
        torch.testing.assert_close(area[word], torch.full((5,), (2 * 8.9) ** 2), rtol=0.01, atol=0)
    assert sum(float(area[w].sum()) for w in set(data.MEANINGS) - set(scene.caption.split())) == 0
    # Token (2, 5) covers rows 16-23 and columns 40-47, all inside the circle in the first frame.
    assert meaning[0, 2, 5, data.MEANINGS.index("red")] == 1
    # Latent frame f is the mean of pixel frames 2f - 1 and 2f, so the circle's centre moves by 2 pixels.
    columns = meaning[..., data.MEANINGS.index("left")].sum(1)
    centre = (columns * torch.arange(4, 128, 8)).sum(1) / columns.sum(1)
    torch.testing.assert_close(centre, torch.tensor([40.0, 38.5, 36.5, 34.5, 32.5]), rtol=0, atol=0.3)


def test_held_out_captions_are_never_trained_on():
    prompts = data.held_out_prompts(64)
    captions = {caption for caption, _ in prompts}
    assert len(captions) == 64
    assert captions == {scene.caption for _, scene in prompts}
    assert all(data.is_held_out(c) for c in captions)
    assert not any(data.is_held_out(data.sample(0, i).caption) for i in range(300))
    assert data.held_out_prompts(8) == prompts[:8]
    with pytest.raises(ValueError, match="65"):
        data.held_out_prompts(65)


def test_folder_is_small_and_has_no_pickles():
    files = [p for p in tiny.MODEL_DIR.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 20e6
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    weights = load_file(tiny.MODEL_DIR / "transformer" / "diffusion_pytorch_model.safetensors")
    assert 2e6 < sum(w.numel() for w in weights.values()) < 8e6
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


def test_folder_loads_with_plain_diffusers(pipe):
    frames = pipe(CAPTION, generator=torch.Generator().manual_seed(0), output_type="np", **SMALL).frames[0]
    assert frames.shape == (9, 64, 128, 3)
    assert np.isfinite(frames).all()


def test_settings_have_the_token_counts_they_state(pipe):
    for setting, tokens in ((tiny.DEFAULT, 4224), (tiny.STUDY, 1664)):
        latent = (setting["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
        side = pipe.vae_scale_factor_spatial * 2
        assert latent * (setting["height"] // side) * (setting["width"] // side) == tokens


def test_training_reads_prompts_as_the_pipeline_does(pipe):
    model = build.Denoiser().eval()
    model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    # transformers loads the encoder in the bf16 it is stored in; compare what both do in float32.
    parts = {**pipe.components, "text_encoder": model.text_encoder}
    prompts = [CAPTION, "A white triangle, moving down, on a black background."]
    with torch.no_grad():
        wanted, empty = WanPipeline(**parts).encode_prompt(prompts, max_sequence_length=64)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(prompts, 64), wanted)
        torch.testing.assert_close(model.encode(["", ""], 64), empty)
    assert pipe.tokenizer.unk_token_id not in pipe.tokenizer(prompts[1]).input_ids


@torch.no_grad()
def test_autoencoder_reconstructs(pipe):
    quality = []
    for i in range(5):
        video = data.render(data.sample(11, i, held_out=True), 9).permute(3, 0, 1, 2)[None] * 2 - 1
        latents = vae.normalized_latents(pipe.vae, video)
        assert latents.shape == (1, vae.CHANNELS, 5, 16, 32)
        assert 0.5 < latents.std() < 2
        quality.append(vae.psnr(pipe.vae.decode(pipe.vae.encode(video).latent_dist.mode()).sample, video))
    assert np.mean(quality) >= 30


def test_every_word_speaks_of_its_phrase():
    words = (*data.MEANINGS, *data.BACKGROUNDS)
    said = [{words[i] for i in row.nonzero()[:, 0].tolist()} for row in data.described(data.parse(CAPTION))]
    circle, square = {"red", "circle", "left"}, {"blue", "square", "up"}
    assert said == [circle] * 5 + [set()] + [square] * 5 + [{"gray"}] * 4
    assert len(said) == len(CAPTION.split())


def test_shipped_text_encoder_knows_which_word_belongs_to_which(pipe):
    """Swapping the two shapes' directions changes the embeddings of their colours and kinds as well."""
    model = build.Denoiser().eval()
    model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    with torch.no_grad():
        one = model.encode([CAPTION], 32)[0]
        two = model.encode([CAPTION.replace("left", "x").replace("up", "left").replace("x", "up")], 32)[0]
    change = (one - two).norm(dim=-1) / one.norm(dim=-1)
    about_shapes, about_background = [*range(5), *range(6, 11)], range(11, 15)
    assert change[about_shapes].min() > 3 * change[about_background].max()


@pytest.mark.parametrize(("queries", "keys"), [(700, 1100), (70, 9)])
def test_training_attention_and_its_gradients(queries, keys):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, 3, 48, dtype=torch.float64, requires_grad=True) for n in (queries, keys, keys)
    )
    gradient = torch.randn_like(q)
    out = attention.attention(q, k, v)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, wanted)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), gradient) for o in (out, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    torch.library.opcheck(attention.attention, (q, k, v))


def test_training_attention_changes_no_prediction():
    stock, fast = build.Denoiser().eval(), build.Denoiser().eval()
    nn.init.normal_(stock.transformer.proj_out.weight)
    fast.load_state_dict(stock.state_dict())
    attention.use_fast_attention(fast.transformer)
    calls = []
    core = attention.attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attention", lambda *a: calls.append(1) or core(*a))
        inputs = torch.randn(2, 8, 3, 8, 16), torch.tensor([200.0, 900.0]), [CAPTION, ""], 32
        with torch.no_grad():
            torch.testing.assert_close(fast(*inputs), stock(*inputs), rtol=1e-4, atol=1e-5)
    assert len(calls) == 16, "every self- and cross-attention"


def test_plan_and_learning_rate():
    assert train.stage_of("2:1x8 3:3x4,5x2", 1) == ([(1, 8)], 5)
    assert train.stage_of("2:1x8 3:3x4,5x2", 2) == ([(3, 4), (5, 2)], 5)
    args = type("Args", (), {"lr": 1.0, "warmup": 10, "decay": 0.25})
    assert train.learning_rate(0, 100, args) == pytest.approx(0.1)
    assert train.learning_rate(50, 100, args) == 1.0
    assert 0.05 < train.learning_rate(99, 100, args) < 0.1


def test_stopped_training_resumes_to_the_same_weights(tmp_path):
    """SIGTERM to a run of 4 steps, then a resumed run: the same checkpoint as without the interruption."""
    vae.build().save_pretrained(tmp_path / "vae")

    def arguments(out: str) -> list[str]:
        fixed = ["--threads=1", "--warmup=2", "--log-every=1", "--plan=4:1x2", "--text-steps=2"]
        return ["--vae", str(tmp_path / "vae"), "--out", str(tmp_path / out), *fixed]

    command = [sys.executable, "-P", "-m", train.__name__, *arguments("stopped")]
    stopped = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert json.loads(stopped.stdout.readline())["text_steps"] == 2
    assert json.loads(stopped.stdout.readline())["step"] == 1
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=60) == 0
    _, state = train.load(tmp_path / "stopped" / "checkpoint.safetensors")
    assert state["step"] < 4, "stopped too late to prove anything"

    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    try:
        train.main(arguments("stopped"))
        train.main(arguments("straight"))
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    one, first = train.load(tmp_path / "straight" / "checkpoint.safetensors")
    two, second = train.load(tmp_path / "stopped" / "checkpoint.safetensors")
    assert first["step"] == second["step"] == 4
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], msg=name)
    assert not list(tmp_path.rglob("*.partial"))


def test_export_replaces_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale.json").write_text("{}")
    build.export(AutoencoderKLWan.from_pretrained(tiny.MODEL_DIR / "vae"), build.Denoiser(), folder)
    assert not (folder / "stale.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    index = json.loads((folder / "model_index.json").read_text())
    # The name both transformers 4 and 5 know.
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    WanPipeline.from_pretrained(folder)
