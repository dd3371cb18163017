"""Parameter groups of the optimizer: own learning rates for vision tower and merger, decay on weights only.

The options are those of the published training code (method card of LASER, section 5), which a DeepSpeed file with an
optimizer section of its own puts out of action; the files in `hub_configs/deepspeed` have none, so the groups hold.
Weight decay acts on what is neither a bias nor the weight of a norm. That is the rule of transformers, which goes by
names and misses the RMS norms of Qwen2.5-VL's vision tower (`norm1`, `norm2`, `ln_q`); here the module's class counts
too.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

# What an optimizer that arranges the parameters itself (GaLore, LOMO, layer-wise ones) already gives.
_OWN_ARRANGEMENT = {"params", "model", "optimizer_dict"}
_OPTIONS = {"vision": "vision_lr", "merger": "merger_lr"}


def part_of(name: str) -> str:
    """`"vision"`, `"merger"` or `"main"`: the part of the model that a parameter belongs to, by its dotted name.

    Example:
        >>> part_of("model.visual.blocks.0.norm1.weight"), part_of("base_model.model.model.visual.merger.mlp.0.bias")
        ('vision', 'merger')
        >>> part_of("model.visual.deepstack_merger_list.1.norm.weight"), part_of("lm_head.weight")
        ('merger', 'main')
    """
    pieces = name.split(".")
    if "visual" not in pieces:
        return "main"
    below = pieces[pieces.index("visual") + 1 :]
    return "merger" if any(piece in ("merger", "deepstack_merger_list") for piece in below) else "vision"


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay acts on: no biases, and nothing of a norm."""
    names = set(Trainer.get_decay_parameter_names(None, model))
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            names -= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return names


def optimizer_groups(model: nn.Module, args: Any) -> list[dict[str, Any]]:
    """The trained parameters in groups, the main part first; empty groups are left out.

    Vision tower and merger (the projector into the language model) are groups of their own only with `vision_lr` and
    `merger_lr`; without, they are in the main part, with `learning_rate`. The scheduler scales the rate of each group.

    Args:
        model: its parameters with `requires_grad` are trained; wrapped by PEFT or sharded is fine.
        args: `learning_rate`, `weight_decay`, `vision_lr` and `merger_lr`, as in [`LatentSFTConfig`].

    Returns:
        Dicts with `params` (list of parameters), `names` (their names), `lr`, `weight_decay` and `name`, e.g.
        `"main"`, `"main, no decay"`, `"vision"`.

    Raises:
        ValueError: a learning rate for a part that is not trained, or a model with nothing to train.
    """
    decayed = decayed_names(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model has requires_grad; leave something to train")
    rates = {part: getattr(args, option) for part, option in _OPTIONS.items() if getattr(args, option) is not None}
    found = {part_of(name) for name, _ in trained}
    for part in rates:
        if part not in found:
            raise ValueError(
                f"{_OPTIONS[part]}={rates[part]!r}, but no parameter of the {part} part is trained; leave "
                f"{_OPTIONS[part]} out, or train that part (freeze_vision_tower: false; with LoRA: target modules in "
                "`visual`)"
            )
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for part in ("main", *rates):
        for decay in (True, False):
            groups[part, decay] = {
                "params": [],
                "names": [],
                "lr": rates.get(part, args.learning_rate),
                "weight_decay": args.weight_decay if decay else 0.0,
                "name": part if decay else f"{part}, no decay",
            }
    for name, parameter in trained:
        part = part_of(name)
        group = groups[part if part in rates else "main", name in decayed]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def with_optimizer_groups(
    optimizer_cls: Any, optimizer_kwargs: dict[str, Any], args: Any, model: PreTrainedModel | None
) -> tuple[Any, dict[str, Any]]:
    """The class and arguments of an optimizer, as `Trainer.get_optimizer_cls_and_kwargs` gives them, with our groups.

    Optimizers that arrange the parameters themselves stay as they are.

    Raises:
        ValueError: such an optimizer together with `vision_lr` or `merger_lr`.
    """
    if model is None:
        return optimizer_cls, optimizer_kwargs
    is_class = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)
    if _OWN_ARRANGEMENT & optimizer_kwargs.keys() or not is_class:  # Muon and its like come as a factory
        given = [option for option in _OPTIONS.values() if getattr(args, option) is not None]
        if given:
            raise ValueError(f"optim={args.optim!r} arranges the parameters itself and takes no {given}; leave it out")
        return optimizer_cls, optimizer_kwargs
    kept = ("params", "lr", "weight_decay", "name")
    groups = [{key: group[key] for key in kept} for group in optimizer_groups(model, args)]
    return optimizer_cls, {**optimizer_kwargs, "params": groups}
