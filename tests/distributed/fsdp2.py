"""Run by `worker.py` in each process: the losses of a model sharded by FSDP2 against those of a whole one.

accelerate does not shard on a CPU, so `fully_shard` is called here as it would: the decoder layers and the blocks of
the vision tower, and the rest, LM head and embeddings, as the outermost group. Each process has a batch of its own.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from tests.distributed.data import train_data
from tests.tiny import tiny_processor
from trainers import LatentSFTCollator, LatentSFTConfig
from trainers.latent_forward import add_latent_loss
from trainers.objectives import build_objective


def trained_once(base: Path, shard: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Both losses `(2,)` of this process and the gradients averaged over processes."""
    model = AutoModelForImageTextToText.from_pretrained(base).train()
    args = LatentSFTConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none")
    if shard:
        for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
            fully_shard(layer)
        fully_shard(model)
    add_fused_lm_head(model, outputs=("log_probs",))
    add_latent_loss(model, build_objective(args, model.config))
    mazes, rank = train_data("mazes"), dist.get_rank()
    output = model(**LatentSFTCollator(tiny_processor())([mazes[3 * rank], mazes[3 * rank + 1]]), fused_lm_head=True)
    (output.loss + output.latent_loss).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    if shard:
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
    else:
        for grad in grads.values():
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return torch.stack([output.loss, output.latent_loss]).detach(), grads


def compare(folder: Path) -> None:
    """Write both losses of this process, and the largest difference of each gradient relative to its largest entry."""
    base = folder.parent / "untied"
    whole, whole_grads = trained_once(base, shard=False)
    sharded, sharded_grads = trained_once(base, shard=True)
    differences = {
        name: ((sharded_grads[name] - grad).abs().max() / grad.abs().max()).item()
        for name, grad in whole_grads.items()
        if grad.any()
    }
    result = {"whole": whole.tolist(), "sharded": sharded.tolist(), "gradients": differences}
    (folder / f"fsdp2-{dist.get_rank()}.json").write_text(json.dumps(result))
