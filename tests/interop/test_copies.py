"""Copies and files of an attached model are those of the stock model, also while it is trained."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from families import Pipe, cases
from peft import LoraConfig
from safetensors.torch import load_file

import dit_sparse
from dit_sparse import RadialProcessor, SLAProcessor, VSAProcessor

pytestmark = pytest.mark.filterwarnings("ignore:.*outside a pipeline run")

METHODS = {
    "radial": RadialProcessor(block=8, decay=0.3, decimate_below=32),
    "sla": SLAProcessor(ratio=0.3, block=8),
    "vsa": VSAProcessor(keep=0.3, tile=(2, 2, 2), gate=True),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_saved_files_are_those_of_the_stock_model(method: Any, tmp_path: Path) -> None:
    model = tiny.wan()
    model.save_pretrained(tmp_path / "stock")
    session = dit_sparse.apply(Pipe(model), method)
    model.save_pretrained(tmp_path / "attached", safe_serialization=True)
    assert dit_sparse.session(model) is session
    files = sorted(p.name for p in (tmp_path / "stock").iterdir())
    assert sorted(p.name for p in (tmp_path / "attached").iterdir()) == files
    for name in files:
        assert (tmp_path / "attached" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    again = type(model).from_pretrained(tmp_path / "attached")
    assert dit_sparse.session(again) is None
    with torch.no_grad():
        session.remove()
        assert torch.equal(again(**tiny.wan_inputs())[0], model(**tiny.wan_inputs())[0])


def test_a_pipeline_is_saved_with_its_stock_transformer(tmp_path: Path) -> None:
    pipe = tiny.wan_pipeline()
    dit_sparse.apply(pipe, METHODS["vsa"])
    pipe.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any("sparse_branch" in name for name in saved)
    assert type(pipe).from_pretrained(tmp_path).transformer is not None


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_whole_model_may_be_pickled(method: Any) -> None:
    """It comes back without the session; trained parts go with it, as parameters without a use."""
    model, inputs = tiny.wan(), tiny.wan_inputs()
    stock = model(**inputs)[0]
    session = dit_sparse.apply(model, method, schedule="always")
    sparse = model(**inputs)[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert dit_sparse.session(again) is None
    assert torch.equal(again(**inputs)[0], stock)
    assert list(again.state_dict()) == list(model.state_dict())
    assert torch.equal(model(**inputs)[0], sparse)
    second = dit_sparse.apply(again, method, schedule="always")
    assert torch.equal(again(**inputs)[0], sparse)
    second.remove()
    session.remove()
    assert torch.equal(model(**inputs)[0], stock)


def test_a_state_dict_may_be_loaded_while_attached() -> None:
    model, inputs = tiny.wan(), tiny.wan_inputs()
    torch.manual_seed(1)
    other = type(model)(**{**tiny.WAN}).eval()
    dit_sparse.apply(model, METHODS["radial"], schedule="always")
    model.load_state_dict(other.state_dict())
    dit_sparse.apply(other, METHODS["radial"], schedule="always")
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], other(**inputs)[0])


@pytest.mark.parametrize("name", ["flux", "cogvideox"])
@pytest.mark.parametrize("method", [METHODS["sla"], tiny.Cached(keep=3)], ids=["sla", "step-cached"])
def test_lora_trains_under_gradient_checkpointing(name: str, method: Any) -> None:
    """In models whose text shares the sequence: the gradients are those without checkpointing."""
    case = cases()[name]
    gradients = []
    for checkpointing in (False, True):
        model = case.model().train().requires_grad_(False)
        dit_sparse.apply(Pipe(model), method, schedule="always")
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
        if checkpointing:
            model.enable_gradient_checkpointing()
        case.output(model(**case.inputs(model, 2, case.grid, 0))).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(
        grad.abs().sum() > 0 for n, grad in gradients[0].items() if "lora_B" in n and "sparse" not in n
    )
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-6, rtol=1e-4)
