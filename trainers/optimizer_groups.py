"""Parameter groups of the optimizer: own learning rates for vision tower, merger and latent head, decay by a rule.

The options are those of the published training code (method cards of LASER and LVR, section 5), which a DeepSpeed file
with an optimizer section of its own puts out of action: refused here, and the files in `hub_configs/deepspeed` have
none. Weight decay acts on what is neither a bias nor the weight of a norm. That is the rule of transformers, which
goes by names and misses the RMS norms of Qwen2.5-VL's vision tower (`norm1`, `norm2`, `ln_q`); here the module's class
counts too. The rule of the published LVR code leaves out only biases and `nn.LayerNorm`: RMS norms decay.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

# What an optimizer that arranges the parameters itself (GaLore, LOMO, layer-wise ones) already gives.
_OWN_ARRANGEMENT = {"params", "model", "optimizer_dict"}
# Part of a model to the option that gives it a learning rate of its own, in the order of the groups.
PART_RATES = {"vision": "vision_lr", "merger": "merger_lr", "latent head": "latent_head_lr"}
DECAY_RULES = ("transformers", "published")
_REMEDIES = {
    "vision": "freeze_vision_tower: false; with LoRA: target modules in `visual`",
    "merger": "freeze_vision_tower: false or freeze_merger: false; with LoRA: target modules in `visual`",
    "latent head": "latent_head: simple or glu; in GRPO with latent_policy: gaussian",
}
logger = logging.getLogger(__name__)


def part_of(name: str) -> str:
    """`"vision"`, `"merger"`, `"latent head"` or `"main"`: the part of the model that a parameter belongs to, by its
    dotted name. The heads for training count as latent heads. The VQ encoder of Chameleon is its vision tower; no
    gradient reaches it. The vector that ends a span belongs to the main part, as in the published code.

    Example:
        >>> part_of("model.visual.blocks.0.norm1.weight"), part_of("base_model.model.model.visual.merger.mlp.0.bias")
        ('vision', 'merger')
        >>> part_of("model.visual.deepstack_merger_list.1.norm.weight"), part_of("lm_head.weight")
        ('merger', 'main')
        >>> part_of("latent_head.mlp.0.weight"), part_of("latent_stop_vector.weight")
        ('latent head', 'main')
        >>> part_of("concept_head.mlp.0.bias"), part_of("attention_head.query_proj.weight")
        ('latent head', 'latent head')
    """
    pieces = name.split(".")
    if not {"latent_head", "concept_head", "attention_head"}.isdisjoint(pieces):
        return "latent head"
    if "vqmodel" in pieces:
        return "vision"
    if "visual" not in pieces:
        return "main"
    below = pieces[pieces.index("visual") + 1 :]
    return "merger" if any(piece in ("merger", "deepstack_merger_list") for piece in below) else "vision"


def decayed_names(model: nn.Module, rule: str = "transformers") -> set[str]:
    """Names of the parameters that weight decay acts on.

    Args:
        rule: `"transformers"`: no biases, and nothing of a norm. `"published"`: the LVR code, no name with "bias" in
            it, and nothing of an `nn.LayerNorm`; other norms decay.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in DECAY_RULES:
        raise ValueError(f"weight_decay_rule={rule!r} is unknown; choose one of {list(DECAY_RULES)}")
    if rule == "published":
        plain = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
        return {name for name, p in model.named_parameters() if "bias" not in name and id(p) not in plain}
    names = set(Trainer.get_decay_parameter_names(None, model))
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            names -= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return names


def optimizer_groups(model: nn.Module, args: Any) -> list[dict[str, Any]]:
    """The trained parameters in groups, the main part first; empty groups are left out.

    Vision tower, merger (the projector into the language model) and latent head are groups of their own only with
    `vision_lr`, `merger_lr` and `latent_head_lr`; without, they are in the main part, with `learning_rate`. The
    scheduler scales the rate of each group.

    Args:
        model: its parameters with `requires_grad` are trained; wrapped by PEFT or sharded is fine.
        args: `learning_rate`, `weight_decay`, and where there are any `vision_lr`, `merger_lr`, `latent_head_lr` and
            `weight_decay_rule`, as in [`LatentSFTConfig`].

    Returns:
        Dicts with `params` (list of parameters), `names` (their names), `lr`, `weight_decay` and `name`, e.g.
        `"main"`, `"main, no decay"`, `"vision"`.

    Raises:
        ValueError: a learning rate for a part that is not trained, or a model with nothing to train.
    """
    decayed = decayed_names(model, getattr(args, "weight_decay_rule", "transformers"))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model has requires_grad; leave something to train")
    rates = {part: getattr(args, PART_RATES[part]) for part in PART_RATES if PART_RATES[part] in given_rates(args)}
    found = {part_of(name) for name, _ in trained}
    for part in rates:
        if part not in found:
            raise ValueError(
                f"{PART_RATES[part]}={rates[part]!r}, but no parameter of the {part} part is trained; leave "
                f"{PART_RATES[part]} out, or train that part ({_REMEDIES[part]})"
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


def given_rates(args: Any) -> list[str]:
    """The options among `vision_lr`, `merger_lr` and `latent_head_lr` that are set."""
    return [option for option in PART_RATES.values() if getattr(args, option, None) is not None]


def check_deepspeed_optimizer(args: Any) -> None:
    """A DeepSpeed file with an optimizer section makes one flat group of all parameters, whatever the options say.

    The file is `args.deepspeed`, or the one that `accelerate launch` names in ACCELERATE_DEEPSPEED_CONFIG_FILE.

    Raises:
        ValueError: such a section together with a learning rate for a part; without one a warning is logged, since
            biases and norms then decay, too.
    """
    settings = getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    source = "deepspeed" if isinstance(settings, dict) else f"deepspeed={settings!r}"
    if isinstance(settings, str) and settings.lstrip().startswith("{"):
        settings = json.loads(settings)
    elif isinstance(settings, str | Path) and Path(settings).is_file():
        settings = json.loads(Path(settings).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not settings.get("optimizer"):
        return
    section = f"{source} has an optimizer section, with which DeepSpeed puts all parameters into one group"
    given = given_rates(args)
    if given:
        raise ValueError(f"{section} and ignores {given}; take the section out of the file, or leave {given} out")
    logger.warning("%s: weight decay acts on biases and norms, too; take the section out of the file", section)


def with_optimizer_groups(
    optimizer_cls: Any, optimizer_kwargs: dict[str, Any], args: Any, model: PreTrainedModel | None
) -> tuple[Any, dict[str, Any]]:
    """The class and arguments of an optimizer, as `Trainer.get_optimizer_cls_and_kwargs` gives them, with our groups.

    Optimizers that arrange the parameters themselves stay as they are.

    Raises:
        ValueError: such an optimizer together with a learning rate for a part.
    """
    if model is None:
        return optimizer_cls, optimizer_kwargs
    is_class = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)
    if _OWN_ARRANGEMENT & optimizer_kwargs.keys() or not is_class:  # Muon and its like come as a factory
        given = given_rates(args)
        if given:
            raise ValueError(f"optim={args.optim!r} arranges the parameters itself and takes no {given}; leave it out")
        return optimizer_cls, optimizer_kwargs
    kept = ("params", "lr", "weight_decay", "name")
    groups = [{key: group[key] for key in kept} for group in optimizer_groups(model, args)]
    return optimizer_cls, {**optimizer_kwargs, "params": groups}
