"""LoRA through the pipelines' own loaders, before and after attaching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict

import dit_sparse

METHODS = {"per-call": tiny.TopK(keep=2), "step-cached": tiny.Cached(keep=2)}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two safetensors files as the pipeline saves them."""
    folders = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("lora")
        pipe = tiny.wan_pipeline()
        torch.manual_seed(seed)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        pipe.save_lora_weights(folder, get_peft_model_state_dict(pipe.transformer))
        folders.append(folder)
    return folders


def load(pipe: Any, adapters: list[Path]) -> None:
    for i, folder in enumerate(adapters):
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name=f"a{i}")


def attach(pipe: Any, method: Any) -> dit_sparse.Session:
    return dit_sparse.apply(pipe, method, schedule="refresh 0, 2")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_loaded_before_or_after_attaching_is_the_same(method: Any, adapters: list[Path]) -> None:
    """Loaded, weighted, fused, unfused and unloaded: each as if attached to that very model."""
    pipe, other = tiny.wan_pipeline(), tiny.wan_pipeline()
    session = attach(pipe, method)
    plain = tiny.run_wan(pipe)

    def both(change: Any) -> torch.Tensor:
        """The change made while attached, equal to attaching after it."""
        change(pipe)
        change(other)
        with attach(other, method):
            wanted = tiny.run_wan(other)
        assert torch.equal(tiny.run_wan(pipe), wanted)
        assert session.active
        assert len(session.report().sparse_rows) == len(session.report().rows)
        return wanted

    loaded = both(lambda p: load(p, adapters))
    assert (loaded - plain).abs().max() > 1e-3
    weighted = both(lambda p: p.set_adapters(["a0", "a1"], [0.7, 0.3]))
    assert (weighted - loaded).abs().max() > 1e-4
    fused = both(lambda p: p.fuse_lora(adapter_names=["a0", "a1"]))
    torch.testing.assert_close(fused, weighted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(both(lambda p: p.unfuse_lora()), weighted, atol=1e-3, rtol=1e-3)
    both(lambda p: p.delete_adapters("a1"))
    torch.testing.assert_close(both(lambda p: p.unload_lora_weights()), plain, atol=1e-4, rtol=1e-4)
    session.remove()
    assert torch.equal(tiny.run_wan(pipe), tiny.run_wan(other))


def test_an_adapter_may_be_saved_while_attached(adapters: list[Path], tmp_path: Path) -> None:
    pipe = tiny.wan_pipeline()
    load(pipe, adapters[:1])
    with attach(pipe, METHODS["per-call"]):
        pipe.transformer.save_lora_adapter(tmp_path, adapter_name="a0")
    saved = pipe.lora_state_dict(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    given = pipe.lora_state_dict(adapters[0], weight_name="pytorch_lora_weights.safetensors")
    assert sorted(n.removeprefix("transformer.") for n in given) == sorted(saved)
