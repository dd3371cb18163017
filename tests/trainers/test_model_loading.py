"""From model options to a model: what is frozen, latent heads and end vectors that are made, kept, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_latent import load_latent_model
from modeling_latent.latent_patch_embed import LinearPatchProjection
from tests.modeling_latent.test_lvr import head_tensors, publish
from trainers.adapters import save_latent_settings
from trainers.model_loading import LatentModelConfig, freeze_parts, load_for_training
from trainers.optimizer_groups import part_of
from trainers.tiny import save_tiny_stock_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stock_checkpoint(tmp_path_factory.mktemp("stock") / "base")


def load(name: Path, method: str = "lvr", weights: bool = True, **options: Any) -> tuple:
    options = {"dtype": "float32", **options}
    return load_for_training(LatentModelConfig(model_name_or_path=str(name), **options), method, weights=weights)


def trained_parts(model: nn.Module) -> set[str]:
    """Parts of which everything is trained; raises when a part is so in part."""
    found: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        part = "end vector" if name.startswith("latent_stop_vector") else part_of(name)
        found.setdefault(part, set()).add(parameter.requires_grad)
    assert all(len(values) == 1 for values in found.values()), found
    return {part for part, values in found.items() if values == {True}}


# What is frozen -----------------------------------------------------------------------------------------------------


ALWAYS = {"latent head", "end vector"}
FREEZING = [
    ({}, {"main", "vision", "merger"}),
    ({"freeze_vision_tower": True}, {"main"}),
    ({"freeze_vision_tower": True, "freeze_merger": False}, {"main", "merger"}),
    ({"freeze_merger": True}, {"main", "vision"}),
    ({"freeze_llm": True}, {"vision", "merger"}),
    ({"freeze_llm": True, "freeze_vision_tower": True}, set()),
    ({"freeze_llm": True, "freeze_vision_tower": True, "freeze_merger": False}, {"merger"}),
]


@pytest.mark.parametrize(("options", "parts"), FREEZING, ids=lambda value: str(value))
def test_what_is_trained(options: dict[str, bool], parts: set[str], base: Path) -> None:
    model, _, _ = load(base, weights=False, latent_head="simple", latent_stop_vector=True, **options)
    assert trained_parts(model) == parts | ALWAYS


def test_embeddings_and_lm_head_belong_to_the_language_model(base: Path) -> None:
    model, _, _ = load(base, weights=False, freeze_llm=True)
    assert not model.get_input_embeddings().weight.requires_grad
    assert not model.get_output_embeddings().weight.requires_grad
    freeze_parts(model, vision_tower=True, merger=True, llm=True)
    assert not trained_parts(model)


# Latent heads and end vectors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["simple", "glu"])
def test_a_new_head_has_the_dtype_of_the_model_and_is_kept(head: str, base: Path, tmp_path: Path) -> None:
    """Made for a stock checkpoint; when training goes on from what was saved, nothing is drawn again (card 9.1)."""
    options = {"latent_head": head, "latent_stop_vector": True, "latent_head_timing": "reference"}
    options |= {"latent_head_size": 24} if head == "glu" else {}
    model, processor, _ = load(base, dtype="bfloat16", **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.config.latent_head, model.config.latent_head_size) == (head, options.get("latent_head_size"))
    assert model.head_at_slots and model.latent_stop_vector.weight.float().norm().item() == pytest.approx(8, rel=0.02)
    with torch.no_grad():  # training moved them
        for parameter in (*model.latent_head.parameters(), *model.latent_stop_vector.parameters()):
            parameter.add_(1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for given in (options, {}):  # said again, or left out
        torch.manual_seed(1)
        again, _, _ = load(tmp_path, dtype="bfloat16", **given)
        state = again.state_dict()
        assert not [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
        assert trained_parts(again) >= ALWAYS and again.head_at_slots


CONTRADICTIONS = [
    ({"latent_head": "simple"}, "latent_head='simple', but .* was made with latent_head='glu'; leave latent_head out"),
    ({"latent_head_size": 32}, "latent_head_size=32, but .* was made with latent_head_size=24"),
    ({"latent_head_timing": "reference"}, "latent_head_timing='reference', but .* latent_head_timing='train'"),
    ({"latent_stop_vector": True}, "latent_stop_vector=True, but .* latent_stop_vector=False; .*stock checkpoint"),
    ({"patch_embed_fp32": True}, "patch_embed_fp32=True, but .* patch_embed_fp32=False"),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS, ids=lambda value: str(value)[:30])
def test_what_a_latent_checkpoint_is_made_of_is_not_changed(
    options: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    model, processor, _ = load(base, latent_head="glu", latent_head_size=24)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **options)


def test_published_checkpoints_keep_their_parts(tmp_path: Path) -> None:
    """A part that the folder has is read, also when it is named; one that it lacks is made; no part is dropped."""
    weights = publish(tmp_path / "head", "simple", False)
    model, _, _ = load(tmp_path / "head", latent_head="simple", latent_stop_vector=True)
    assert torch.equal(model.latent_head.mlp[0].weight, weights["lvr_head.mlp.0.weight"])
    assert model.latent_stop_vector.weight.norm().item() == pytest.approx(8, rel=1e-4)
    with pytest.raises(ValueError, match="latent_head='glu', but .* was made with latent_head='simple'"):
        load(tmp_path / "head", latent_head="glu")
    publish(tmp_path / "vector", None, True)
    with pytest.raises(ValueError, match="latent_stop_vector=False, but .*latent_stop_vector=True"):
        load(tmp_path / "vector", latent_stop_vector=False)
    publish(tmp_path / "lost", "simple", False, lvr_head_type="glu")  # says glu, holds the tensors of simple
    with pytest.raises(ValueError, match="the tensors do not fit its config.json: missing"):
        load(tmp_path / "lost", latent_head="glu")


def test_a_gated_head_of_another_width_is_read(tmp_path: Path) -> None:
    """The paper's width is three times the hidden size, the code's is the decoder's (card 4.5)."""
    publish(tmp_path, "glu")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | head_tensors("glu", inner=192), file, metadata={"format": "pt"})
    model, _, _ = load(tmp_path, latent_head_size=192)
    assert torch.equal(model.latent_head.up_proj.weight, load_file(file)["lvr_head.up_proj.weight"])


def test_options_without_effect_or_sense_are_refused(base: Path) -> None:
    for options, message in (
        ({"latent_head_timing": "train"}, "latent_head_timing='train': .* has no latent head; set latent_head"),
        ({"latent_head_size": 24}, "latent_head_size=24: .* has no latent head"),
        ({"latent_head": "mlp"}, r"unknown latent_head 'mlp'; choose one of \['glu', 'simple'\]"),
        ({"latent_head": "simple", "latent_head_size": 24}, "it is the width of the head 'glu'"),
        ({"latent_head": "glu", "latent_head_size": 0}, "at least 1; leave it out"),
        ({"latent_head": "glu", "latent_head_timing": "late"}, "unknown latent_head_timing 'late'"),
        ({"freeze_llm": True, "use_peft": True}, "freeze_llm=true with use_peft=true.*leave freeze_llm out"),
    ):
        with pytest.raises(ValueError, match=message):
            load(base, weights=False, **options)


def test_the_patch_embedding_is_chosen(base: Path) -> None:
    for chosen in (None, False, True):
        model, _, _ = load(base, weights=False, patch_embed_fp32=chosen)
        assert isinstance(model.model.visual.patch_embed.proj, LinearPatchProjection) is bool(chosen)


def test_an_adapter_trains_and_holds_the_latent_parts(base: Path, tmp_path: Path) -> None:
    """LoRA beside a new head: head and end vector are trained whole, saved with the adapter, and read from it."""
    options = {"latent_head": "simple", "latent_stop_vector": True}
    names = ["q_proj", "gate_proj"]
    model, processor, config = load(base, use_peft=True, lora_r=2, lora_target_modules=names, **options)
    wrapped = get_peft_model(model, config)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    parts = ("lora_", "latent_head.modules_to_save", "latent_stop_vector.modules_to_save", "token_adapter")
    assert all(any(part in name for part in parts) for name in trained), trained
    assert all(any(part in name for name in trained) for part in parts)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    states = torch.randn(3, 64)
    expected = wrapped.get_base_model().latent_head(states), wrapped.get_base_model().latent_stop_vector(states)
    wrapped.save_pretrained(tmp_path)
    save_latent_settings(wrapped, tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load_latent_model(tmp_path)
    torch.testing.assert_close(loaded.latent_head(states), expected[0])
    assert torch.equal(loaded.latent_stop_vector(states), expected[1])
    for given in (options, {}):
        again, _, config = load(tmp_path, **given)
        assert config is None and torch.equal(again.get_base_model().latent_stop_vector(states), expected[1])
    with pytest.raises(ValueError, match="latent_head='glu', but .* was made with latent_head='simple'"):
        load(tmp_path, latent_head="glu")
