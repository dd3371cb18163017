"""The one file that touches TRL's fused LM head: an extra loss inside the wrapped forward, on supervised rows only.

TRL replaces `model.forward` on the instance and, in training, calls the backbone and multiplies its hidden states
with the LM head in chunks. [`add_latent_loss`] wraps that forward once more. During the call a hook on the backbone
hands the supervised hidden states on (only those meet the LM head, on every device) and keeps all of them for the
latent loss, which is computed inside the same forward, so that DDP, ZeRO and FSDP see every parameter where they
expect it. Which rows those are is found before the backbone runs: behind it, the host would wait for all of it.
"""

import functools
import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import trl
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, maybe_gather_lm_head_ctx

from .exposure import LatentExposure

_TRL_PARAMETERS = {"fused_lm_head", "labels", "shift_labels"}
# What TRL's fused head knows of scaled and capped logits: entry of the text configuration, and its value for none.
_LOGIT_TRANSFORMS = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "output_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "logits_scaling": 1.0,
}


@dataclass
class LatentLoss:
    """Result of a latent loss.

    Args:
        loss: 0-dim tensor with its graph, not yet weighted.
        sums: name to `(numerator, denominator)`, 0-dim tensors without gradient, for metrics that add up over
            micro-batches and ranks.
        count: 0-dim tensor, the number of terms that `loss` is the mean of (0 when there are none, then `loss` is 0),
            so that `loss * count` adds up over micro-batches and ranks; `None` when `loss` is no mean.
        auxiliary: further losses, each with its count, in the order of [`LatentObjective.auxiliary`].
    """

    loss: torch.Tensor
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]]
    count: torch.Tensor | None = None
    auxiliary: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()


class LatentObjective(ABC):
    """What a method computes in the forward; it holds options, no parameters.

    A step calls `ce_labels`, `prepare`, `fed_positions`, `during_forward` and `loss`, in this order and with the same
    `input_ids`.

    Attributes:
        main_loss: name, as it is logged, of [`LatentLoss.loss`].
        global_step: optimizer steps that are done; the trainer says it before each forward.
        sum_names: keys of [`LatentLoss.sums`] in training, the same in every batch.
        eval_sum_names: further ones in evaluation, behind them.
        watched: name, as it is logged, to a piece of the names of parameters whose gradient norm is logged.
        auxiliary: name, as it is logged, and weight of each further loss of [`LatentLoss.auxiliary`].
        batch_inputs: tensors of a batch that are the objective's alone; the backbone does not get them.
        exposures: kinds of exposure (`exposure.py`) that the method can be trained with.
        has_latent_loss: `False` for a method that trains the cross entropy alone.
    """

    main_loss: str = "loss_latent"
    global_step: int = 0
    sum_names: tuple[str, ...] = ()
    eval_sum_names: tuple[str, ...] = ()
    watched: Mapping[str, str] = MappingProxyType({})
    auxiliary: Mapping[str, float] = MappingProxyType({})
    batch_inputs: tuple[str, ...] = ()
    exposures: tuple[str, ...] = ("text", "own", "free")
    has_latent_loss: bool = True

    def bind(self, model: PreTrainedModel) -> None:
        """Called once with the head class, before optimizer and wrappers exist: refuse it, or freeze parts of it."""
        return None

    @abstractmethod
    def ce_labels(self, input_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.LongTensor:
        """Labels `(batch, length)` for the cross-entropy term."""

    @abstractmethod
    def fed_positions(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """Positions `(batch, length)` that are fed by a latent at inference."""

    def prepare(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """What changes in the inputs of the backbone before the exposure: teacher's latents, image embeddings that
        were made already. `inputs` has `batch_inputs` too."""
        return {}

    def during_forward(self, model: PreTrainedModel, inputs: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        """What is open while the backbone runs on `inputs`; what it yields is among the inputs of `loss`."""
        return nullcontext({})

    @abstractmethod
    def loss(self, model: PreTrainedModel, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> LatentLoss:
        """Latent loss of the batch from the backbone's final-norm hidden states `(batch, length, hidden)`.

        `inputs` are those that the backbone was given, with `batch_inputs` and `labels`. An objective that can be
        averaged over tokens has a method `count_terms(input_ids, labels)`, too: `(2 + number of auxiliary losses,)`,
        the labels of the cross entropy, `LatentLoss.count` and the counts of the auxiliary losses of a batch before it
        is run. It is called, with `loss_average="token"` only, for all micro-batches of a step before the first runs.
        """


@dataclass
class LatentFusedOutput(FusedCausalLMOutput):
    """TRL's fused output with the latent loss.

    Args:
        latent_loss: 0-dim, unweighted; `None` when the latent loss is switched off.
        latent_sums: `(metrics, 2)` numerators and denominators, in the order of the objective's `sums`, or `None`.
        latent_count: 0-dim, the number of terms that `latent_loss` is the mean of, or `None`.
        auxiliary_losses, auxiliary_counts: `(number of auxiliary losses,)`, or `None`.
    """

    latent_loss: torch.Tensor | None = None
    latent_sums: torch.Tensor | None = None
    latent_count: torch.Tensor | None = None
    auxiliary_losses: torch.Tensor | None = None
    auxiliary_counts: torch.Tensor | None = None


def check_trl_fused_head() -> None:
    """Check what this file relies on in the installed TRL.

    Raises:
        RuntimeError: names the TRL version whose fused LM head has another form.
    """
    source = inspect.getsource(add_fused_lm_head)
    missing = [name for name in sorted(_TRL_PARAMETERS) if name not in source]
    if missing or "backbone_attr" not in source or "last_hidden_state" not in source:
        raise RuntimeError(
            f"trl {trl.__version__} changed its fused LM head (missing: {missing or 'backbone call'}); "
            "install a version in the range of pyproject.toml"
        )


def trl_forward(model: PreTrainedModel) -> Callable:
    """The forward of a model that TRL wrapped with its fused LM head, which then finds all that it reads.

    Raises:
        RuntimeError: TRL's fused head is absent or has another form.
    """
    check_trl_fused_head()
    if "forward" not in vars(model):
        raise RuntimeError("model.forward was not wrapped by TRL's add_fused_lm_head; build the trainer first")
    fused_forward = model.forward
    if hasattr(model.get_output_embeddings(), "bias"):
        return fused_forward
    _show_bias(model)

    @functools.wraps(fused_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        _show_bias(model)
        return fused_forward(*args, **kwargs)

    return forward


def _show_bias(model: PreTrainedModel) -> None:
    """PEFT's trainable tokens wrap the head: it has the merged weight but no bias, and TRL reads both. A head may make
    its bias anew from its weight (Chameleon), on the device where that is now, so it is asked each time."""
    head = model.get_output_embeddings()
    head.bias = getattr(head.original_module, "bias", None)


def check_plain_logits(config: PreTrainedConfig) -> None:
    """Refuse a model that scales or caps its logits, for losses that multiply the LM head themselves.

    Raises:
        ValueError: names the entry of the configuration and its value.
    """
    text = config.get_text_config()
    for name, plain in _LOGIT_TRANSFORMS.items():
        value = getattr(text, name, None)
        if value is not None and value != plain:
            raise ValueError(
                f"{name}={value!r} in the configuration of {config.model_type}: the latent loss reads plain logits "
                "(hidden states times the LM head) and would train other ones; use a model without it, or set "
                "latent_loss_weight: 0"
            )


def add_latent_loss(
    model: PreTrainedModel,
    objective: LatentObjective,
    exposure: LatentExposure | None = None,
    with_loss: bool = True,
) -> None:
    """Wrap the instance's forward (already wrapped by TRL) so that it also returns the objective's loss.

    Args:
        model: the unwrapped head class whose `forward` TRL replaced; with PEFT the base model inside.
        objective: the method's loss.
        exposure: what is fed at latent positions; default: the tokens.
        with_loss: `False` computes no latent loss at all (`latent_loss_weight: 0`); the labels of the cross entropy
            and the exposure stay those of the method.

    Raises:
        RuntimeError: TRL's fused head is absent or has another form.
    """
    fused_forward, exposure = trl_forward(model), exposure or LatentExposure()

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return fused_forward(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        kept: dict[str, torch.Tensor] = {}
        index, targets = _supervised(objective.ce_labels(kwargs["input_ids"], labels))
        prepared = objective.prepare(self, kwargs)
        own = {name: kwargs.pop(name) for name in objective.batch_inputs if name in kwargs}
        kwargs.update(prepared)
        kwargs.update(exposure.inputs(self, objective.fed_positions(kwargs["input_ids"]), kwargs))
        hook = self.base_model.register_forward_hook(_keep_supervised(kept, index), with_kwargs=False)
        try:
            with objective.during_forward(self, kwargs) as found:
                output = fused_forward(*args, fused_lm_head=True, shift_labels=targets, **kwargs)
        finally:
            hook.remove()
        fields = {name: output[name] for name in output.keys()}
        if not with_loss:
            return LatentFusedOutput(**fields)
        latent = objective.loss(self, kept["hidden_states"], {**kwargs, **own, **found, "labels": labels})
        if latent.auxiliary:
            losses, counts = zip(*latent.auxiliary, strict=True)
            fields.update(auxiliary_losses=torch.stack(losses), auxiliary_counts=torch.stack(counts))
        sums = [torch.stack([value.detach().float() for value in pair]) for pair in latent.sums.values()]
        return LatentFusedOutput(
            **fields,
            latent_loss=latent.loss,
            latent_sums=torch.stack(sums) if sums else torch.zeros(0, 2, device=latent.loss.device),
            latent_count=latent.count,
        )

    model.forward = types.MethodType(forward, model)


@contextmanager
def gathered_lm_head(model: PreTrainedModel) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight `(vocabulary, hidden)` and bias of the LM head as plain tensors, gathered under ZeRO-3 and FSDP2."""
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    with maybe_gather_lm_head_ctx(weight, bias):
        yield weight, bias


def _supervised(labels: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Places in `(batch * length)` that predict a label, `(N,)`, and those labels `(1, N)`; one ignored place when
    there is none keeps the graph connected. The one wait for the device here."""
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    index = (targets != -100).nonzero()[:, 0]
    index = index if index.numel() else index.new_zeros(1)
    return index, targets[index].unsqueeze(0)


def _keep_supervised(kept: dict[str, torch.Tensor], index: torch.LongTensor) -> Callable:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        kept["hidden_states"] = hidden
        output.last_hidden_state = hidden.flatten(0, 1).index_select(0, index.to(hidden.device)).unsqueeze(0)
        return output

    return hook
