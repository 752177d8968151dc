"""Finding and loading models: names, Hub ids, folders, and what is said when something is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import tiny_models as models
import torch
from huggingface_hub import constants, errors

from dit_sparse import METHODS, Schedule
from dit_sparse.pipelines import families, tiny
from dit_sparse.pipelines import load as loading
from dit_sparse.pipelines.load import checkpoints, find, load

REPO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random-wan"
    models.wan_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty Hub cache and no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_a_folder_loads_and_computes_what_was_saved(folder: Path) -> None:
    pipe, checkpoint = load(str(folder), dtype=torch.float32, device="cpu")
    assert checkpoint is None
    assert type(pipe).__name__ == "WanPipeline"
    stock = models.wan_pipeline()
    assert torch.equal(models.run_wan(pipe, steps=2), models.run_wan(stock, steps=2))


def test_the_autoencoder_stays_in_float32(folder: Path) -> None:
    pipe, _ = load(str(folder), dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


def test_a_source_tells_sizes_before_weights_are_loaded(folder: Path) -> None:
    source = find(str(folder))
    assert source.multiples == (4, 16, 16)
    assert source.grid(17, 64, 96) == (5, 4, 6)
    assert source.size is None
    assert source.family.name == "wan"


@pytest.mark.parametrize(
    ("heads", "layers", "two", "size"),
    [(12, 30, False, "1.3b"), (40, 40, False, "14b"), (40, 40, True, "a14b"), (24, 30, False, "5b")],
)
def test_a_fine_tuned_copy_gets_the_presets_of_its_size(
    copy: Path, heads: int, layers: int, two: bool, size: str
) -> None:
    config = json.loads((copy / "transformer/config.json").read_text())
    config.update(num_attention_heads=heads, num_layers=layers)
    (copy / "transformer/config.json").write_text(json.dumps(config))
    if two:
        index = json.loads((copy / "model_index.json").read_text())
        index["transformer_2"] = index["transformer"]
        (copy / "model_index.json").write_text(json.dumps(index))
    assert find(str(copy)).size == size


def test_every_name_has_settings() -> None:
    """A model's own, or its pipeline's: nothing is asked of who types a name but a prompt (and an image)."""
    known = checkpoints()
    assert {"tiny-wan", "wan2.1", "wan2.1-14b", "wan2.2"} <= set(known)
    for family in families().values():
        for name, checkpoint in family.checkpoints.items():
            assert known[name] is checkpoint
            assert family.video or "fps" not in checkpoint.defaults, name


def test_every_preset_is_of_a_named_model_and_can_be_made() -> None:
    for family in families().values():
        sizes = {checkpoint.size for checkpoint in family.checkpoints.values()} | {"tiny"}
        for (method, size), presets in family.presets.items():
            assert size in sizes, (family.name, method, size)
            assert set(presets) == {"quality", "balanced", "fast"}, (family.name, method, size)
            for preset in presets.values():
                METHODS[method](**preset.parameters)
                Schedule.parse(preset.schedule)
                assert preset.source


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'wan3'.*Hub id \(owner/name\).*tiny-wan, wan2\.1"):
        find("wan3")


def test_a_missing_folder_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find(str(tmp_path / "nowhere"))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").touch()
    with pytest.raises(ValueError, match=r"has no model_index\.json.*weights\.ckpt"):
        find(str(tmp_path))


def test_another_kind_of_model(copy: Path) -> None:
    index = {"_class_name": "OmniGenPipeline", "transformer": ["diffusers", "OmniGenTransformer2DModel"]}
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"OmniGenTransformer2DModel; supported are .*WanTransformer3DModel"):
        find(str(copy))


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("text_encoder", "text_encoder/"),
        ("transformer/diffusion_pytorch_model.safetensors", r"transformer/\*\.safetensors"),
    ],
)
def test_an_incomplete_folder_names_what_it_lacks(copy: Path, lost: str, named: str) -> None:
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=f"not complete, it lacks {named}"):
        load(str(copy), dtype=torch.float32)


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    part = copy / "text_encoder"
    (part / "model.safetensors").rename(part / "model-00001-of-00002.safetensors")
    (part / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks text_encoder/model-00002-of-00002\.safetensors;"):
        load(str(copy), dtype=torch.float32)


def test_pickled_weights_are_not_loaded(copy: Path) -> None:
    part = copy / "transformer"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks transformer/\*\.safetensors"):
        load(str(copy), dtype=torch.float32)


def test_a_damaged_file_is_one_line(copy: Path) -> None:
    config = copy / "scheduler/scheduler_config.json"
    config.write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load(str(copy), dtype=torch.float32)
    assert "\n" not in str(error.value)


def test_offline_without_weights_says_how_to_get_them(offline: Path) -> None:
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set") as error:
        find("wan2.1")
    for part in (REPO, str(offline), f"hf download {REPO}", "29 GB"):
        assert part in str(error.value)


def test_no_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise errors.LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"https://.* cannot be reached.*hf download"):
        find(REPO)


def test_the_bundled_model_says_when_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "MODEL_DIR", tmp_path)
    with pytest.raises(ValueError, match=r"bundled model is incomplete.*install the package again"):
        find(loading.TINY)


def test_text_and_image_models_tell_each_other_apart(copy: Path) -> None:
    with pytest.raises(ValueError, match="text-to-video model takes no image"):
        find(str(copy)).pipeline_class(True)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanImageToVideoPipeline"}))
    with pytest.raises(ValueError, match="needs an image"):
        find(str(copy)).pipeline_class(False)
    (copy / "model_index.json").write_text(json.dumps({**index, "expand_timesteps": True}))
    both = find(str(copy))
    assert [both.pipeline_class(image) for image in (False, True)] == [
        "WanPipeline",
        "WanImageToVideoPipeline",
    ]
