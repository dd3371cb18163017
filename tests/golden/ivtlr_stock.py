"""The IVT-LR vectors as Python objects: cases, tensors, and the stock models that their weight files describe.

Independent of the library's own conversion: adapters are merged here by the formula of the manifest.
"""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from tests.golden.conftest import golden_dir, golden_json

FOLDER = golden_dir("ivtlr")
TOLERANCES: dict[str, Any] = golden_json(FOLDER, "manifest.json", {}).get("tolerance", {})
LORA = "base_causallm.base_model.model."
# Family -> configuration, head class, beginnings of published names that the stock model calls otherwise.
STOCK = {
    "qwen2vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        {"visual.": "model.visual.", "model.": "model.language_model."},
    ),
    "chameleon": (ChameleonConfig, ChameleonForConditionalGeneration, {}),
    "coconut": (GPT2Config, GPT2LMHeadModel, {}),
}
ORDERS = {"cuda": "index_then_kth", "score": "score"}


def bound(name: str) -> float:
    """A tolerance of the manifest, by the beginning of its name."""
    return next(float(value) for key, value in TOLERANCES.items() if key.startswith(name))


def table(family: str) -> dict[str, Any]:
    """The JSON table of a family, empty when the set lacks it."""
    return golden_json(FOLDER, f"{family}_cases.json", {})


def case_names(family: str) -> list[str]:
    """Names of the cases of a family."""
    return list(table(family).get("cases", {}))


def tensors(family: str, kind: str = "cases") -> dict[str, torch.Tensor]:
    """The tensors of a family: integers as int64, weights as float32."""
    found = load_file(FOLDER / f"{family}_{kind}.safetensors")
    return {name: value.long() if value.dtype == torch.int16 else value.float() for name, value in found.items()}


def stock_name(name: str, family: str) -> str:
    """A published tensor name as the stock model has it."""
    name = name.removeprefix(LORA).removeprefix("base_causallm.").replace(".base_layer.", ".")
    renamed = STOCK[family][2]
    return next((new + name.removeprefix(old) for old, new in renamed.items() if name.startswith(old)), name)


def stock_model(family: str) -> PreTrainedModel:
    """The stock model of a weight file, adapters merged, float32, eager attention, in evaluation mode."""
    config_class, model_class, _ = STOCK[family]
    settings = dict(table(family)["config"])
    settings["vocab_size"] = settings.pop("vocab_size_after_resize", settings["vocab_size"])
    model = model_class._from_config(config_class(**settings), attn_implementation="eager")
    published = tensors(family, "weights")
    state = {}
    for name, value in published.items():
        if "lora_" in name or name == "embedding.weight":
            continue
        wrapper = name.removesuffix(".base_layer.weight")
        if f"{wrapper}.lora_A.default.weight" in published:
            down, up = (published[f"{wrapper}.lora_{side}.default.weight"] for side in "AB")
            value = value + table(family)["lora"]["scaling"] * up @ down
        state[stock_name(name, family)] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    buffers = {name for name, _ in model.named_buffers()}
    assert not unexpected and set(missing) <= tied | buffers, (missing, unexpected)
    return model.float().eval()


@dataclass
class Case:
    """One case of a family.

    Attributes:
        info: its entry of the JSON table.
        batch: the collated tensors `(B, S)`.
        expected: all its tensors, by the rest of their name.
    """

    family: str
    name: str
    info: dict[str, Any]
    batch: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]

    @classmethod
    def read(cls, family: str, name: str) -> "Case":
        found = {
            key.removeprefix(f"{name}."): value for key, value in tensors(family).items() if key.startswith(f"{name}.")
        }
        batch = {key: found[key] for key in ("input_ids", "attention_mask", "labels")}
        return cls(family, name, table(family)["cases"][name], batch, found)

    @property
    def gradient(self) -> str:
        """Whether the reference ran unchanged, or with the chain of gradients left whole."""
        return "bptt" if self.name.endswith("_bptt") else "detach"

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Published name of a parameter to its gradient."""
        return {key.removeprefix("grad."): value for key, value in self.expected.items() if key.startswith("grad.")}


def images(family: str, samples: list[int]) -> dict[str, torch.Tensor]:
    """The image inputs of some samples, as the stock model takes them."""
    chosen = [table(family)["base_samples"][sample]["image_index"] for sample in samples]
    if family == "qwen2vl":
        pixels = tensors(family)["pixel_values"][chosen].flatten(0, 1)
        grid = torch.tensor([table(family)["grid_thw"]]).expand(len(samples), -1)
        return {"pixel_values": pixels, "image_grid_thw": grid}
    low = tensors(family)["pixel_values_lowres"][chosen]
    factor = table(family)["config"]["vq_config"]["resolution"] // low.shape[-1]
    return {"pixel_values": low.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)}


def parameter_gradient(model: PreTrainedModel, name: str, family: str) -> torch.Tensor:
    """Gradient of a published parameter from that of the merged model, by the chain rule through the adapter."""
    if ".lora_" not in name:
        return model.get_parameter(stock_name(name, family)).grad
    wrapper, side = name.removesuffix(".default.weight").split(".lora_")
    merged = model.get_parameter(stock_name(f"{wrapper}.base_layer.weight", family)).grad
    published, scaling = tensors(family, "weights"), table(family)["lora"]["scaling"]
    down, up = (published[f"{wrapper}.lora_{one}.default.weight"] for one in "AB")
    return scaling * (up.T @ merged if side == "A" else merged @ down.T)


def assert_final_logits(case: Case, logits: torch.Tensor, mask: torch.Tensor) -> None:
    """Compare `(B, L, V)` logits with the stored columns and log sums at the positions that are no padding."""
    first = case.info.get("final_logits_rows_from", 0)
    rows = mask[:, first:].bool()
    columns = logits[:, first:, table(case.family)["logit_cols"]]
    sums = logits[:, first:].logsumexp(-1)
    for ours, key in ((columns, "final_logits_cols"), (sums, "final_logits_lse")):
        torch.testing.assert_close(ours[rows], case.expected[key][rows], atol=bound("logits"), rtol=0)


def assert_gradient(ours: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Compare relative to the largest value of the expected gradient."""
    error = float((ours - expected).abs().max() / expected.abs().max())
    assert error <= bound("gradients"), f"{name}: {error:.2e}"
