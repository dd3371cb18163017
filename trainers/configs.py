"""Configurations of the trainers: one field per option, for YAML and the command line (`trl.TrlParser`)."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from .collators import LatentSFTCollator, check_layout
from .config_parts import LatentRunOptions, is_number
from .distributed import LOSS_AVERAGES
from .dynamic_loader import check_dynamic_options
from .exposure import LatentExposure
from .losses.dwal import DwalOptions

# Options of trl.SFTConfig that have no meaning here, and why.
_REFUSED = {
    "assistant_only_loss": "says what the collator does anyway: only responses carry labels",
    "label_smoothing_factor": "needs the logits of all positions, which are never built",
    "chat_template_path": "is not read: the collator writes the layout of the published data",
    "save_on_each_node": "leaves the other nodes without weights (transformers writes them on the first process alone)"
    "; use an output_dir that all nodes share",
    "shuffle_dataset": "is not read for data with images; shuffle the data set before, or rely on the sampler",
}


@dataclass
class LatentSFTConfig(LatentRunOptions, SFTConfig):
    """Options of [`LatentSFTTrainer`], on top of `trl.SFTConfig`.

    The `dwal_*` options are those of the LASER paper (arXiv 2601.06803); their defaults are the values of its
    published training script, which agree with the paper.
    """

    latent_method: str | None = field(
        default=None, metadata={"help": "Training objective; default: the method that the model was made for."}
    )
    latent_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight (lambda) of the latent loss. 0 trains the cross entropy alone."}
    )
    ce_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cross entropy. 0 trains the latent losses alone."}
    )
    loss_average: str = field(
        default="batch",
        metadata={
            "help": "'batch': means over each micro-batch, all micro-batches weigh the same (as published); 'token': "
            "sums over the optimizer step, divided by its counts over all micro-batches and processes; 'sample': the "
            "same of means per sample, so that all samples of the step weigh the same."
        },
    )
    latent_form: str = field(
        default="chain",
        metadata={"help": "'chain': concepts between the markers (DWAL); 'slots': k fixed slots; 'none': no span."},
    )
    num_slots: int | None = field(
        default=None, metadata={"help": "Slots per span with latent_form='slots'; default: as many as the record has."}
    )
    latent_exposure: str = field(
        default="text",
        metadata={
            "help": "What is fed at latent positions: 'text' (published LASER), 'oracle' (published LVR), or the "
            "model's own hidden states: 'own' from passes without gradient, 'free' step by step with gradient."
        },
    )
    latent_exposure_prob: float = field(default=1.0, metadata={"help": "Share that is fed the model's own latents."})
    latent_exposure_unit: str = field(
        default="row", metadata={"help": "What the share is of: 'row', or each single 'latent' (mixed spans)."}
    )
    latent_exposure_forced: int = field(
        default=0, metadata={"help": "Latents at the beginning of a span that are never the model's own."}
    )
    latent_exposure_passes: int = field(
        default=1, metadata={"help": "Of 'own': after n passes the first n latents are those of decoding."}
    )
    dwal_window_size: int | None = field(
        default=None, metadata={"help": "Concept tokens in a window at most; default: all that remain."}
    )
    dwal_temperature: float = field(default=1.0, metadata={"help": "Temperature of the self-made target."})
    dwal_entropy_threshold: float = field(
        default=0.6, metadata={"help": "Normalised entropy above which a target is mixed with the next token (eta)."}
    )
    dwal_force_prob: float = field(
        default=0.8, metadata={"help": "Weight of the next token in a mixed target (f; alpha in the paper)."}
    )
    dwal_loss_type: str = field(default="weighted_ce", metadata={"help": "'weighted_ce' or 'mse'."})
    dwal_spatial_decay_gamma: float | None = field(
        default=None, metadata={"help": "Time-aware form: decay of far concepts in the target, e.g. 0.91."}
    )
    dwal_time_weight_init: float | None = field(
        default=None, metadata={"help": "Time-aware form: weight of the first row of a region, e.g. 0.5."}
    )
    dwal_mse_masked: bool = field(
        default=True, metadata={"help": "Mask columns outside the window in 'mse'; false: the reference's value."}
    )
    dwal_deduplicate_window: bool = field(
        default=False, metadata={"help": "Count a concept token once per window (the paper's set)."}
    )
    dwal_row_average: str = field(
        default="flat", metadata={"help": "'flat': mean over all rows of the batch; 'example': per example first."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Refused unless None: cutting a sequence would split image tokens or a span."}
    )
    pad_to_multiple_of: int | None = field(default=8, metadata={"help": "Batches are padded to a multiple of this."})
    enable_dynamic_batch: bool = field(
        default=False,
        metadata={"help": "Batches of a bounded number of tokens, in place of per_device_train_batch_size samples."},
    )
    dynamic_batch_token_cap: int = field(
        default=8192, metadata={"help": "Most tokens of a batch: samples times longest length, padding included."}
    )
    dynamic_batch_max_bs: int = field(default=16, metadata={"help": "Most samples of a batch."})
    dynamic_batch_plan: str = field(
        default="balanced",
        metadata={"help": "'balanced': equal work for every rank; 'reference': as published, needs max_steps."},
    )
    latent_packing: str | None = field(
        default=None,
        metadata={
            "help": "'sequence': short samples joined into rows, trained without padding; 'buckets': LVR's published "
            "choice of the samples of a batch, padded, needs max_steps."
        },
    )
    packing_max_tokens: int = field(
        default=16384, metadata={"help": "Most tokens of a row ('sequence') or of a batch ('buckets')."}
    )
    packing_long_threshold: int = field(
        default=4096, metadata={"help": "Of 'buckets': a sample of so many tokens is a batch of its own."}
    )
    packing_max_instances: int = field(default=4, metadata={"help": "Of 'buckets': most samples of a batch."})
    packing_max_samples: int | None = field(
        default=None, metadata={"help": "Of 'sequence': most samples of a row; default: no limit."}
    )
    packing_over_long: str = field(
        default="keep",
        metadata={
            "help": "A sample above packing_max_tokens: 'keep' it whole and alone, 'refuse' it, or (of 'buckets', as "
            "published) 'cut' its end off."
        },
    )
    lengths_path: str | None = field(
        default=None, metadata={"help": "File of examples/precompute_lengths.py; default: counted before training."}
    )

    def __post_init__(self) -> None:
        self._check_latent_fields()
        self._check_refused()
        self.check_run_options()
        super().__post_init__()
        self.remove_unused_columns = False
        if self.latent_exposure == "free" and self.activation_checkpointing:
            raise ValueError(
                "latent_exposure='free' needs the cache, which activation checkpointing drops; set "
                "activation_checkpointing: false, or latent_exposure: own"
            )
        self._check_processes()
        check_dynamic_options(self)

    def _check_latent_fields(self) -> None:
        check_layout(self.latent_form, self.num_slots, self.pad_to_multiple_of)
        if not is_number(self.latent_loss_weight, 0, math.inf):
            raise ValueError(f"latent_loss_weight={self.latent_loss_weight!r} must be a finite number, 0 or more")
        if not is_number(self.ce_weight, 0, math.inf):
            raise ValueError(f"ce_weight={self.ce_weight!r} must be a finite number, 0 or more")
        if self.loss_average not in LOSS_AVERAGES:
            raise ValueError(f"loss_average={self.loss_average!r} is unknown; choose one of {list(LOSS_AVERAGES)}")
        if self.loss_average == "sample" and self.loss_type != "nll":
            raise ValueError(
                f"loss_type={self.loss_type!r} with loss_average='sample' is not available; set loss_type: nll, or "
                "loss_average: token"
            )
        self.dwal_options()
        self.exposure()

    def _check_processes(self) -> None:
        """Every process reads its own share: sent out by one, batches would be joined first, whatever their shapes."""
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config dispatch_batches=True joins batches of different lengths; leave it out"
            )
        self.accelerator_config.dispatch_batches = False

    def exposure(self) -> LatentExposure:
        """The `latent_exposure*` fields."""
        prefix = "latent_exposure"
        values = {name.removeprefix(prefix + "_"): value for name, value in vars(self).items() if prefix + "_" in name}
        return LatentExposure(self.latent_exposure, **values)

    def plans_batches(self) -> bool:
        """Whether the lengths of all samples must be known before training."""
        return self.enable_dynamic_batch or self.latent_packing is not None

    def curriculum(self) -> Any:
        """The [`Curriculum`] of the run; `None`: all steps are trained alike."""
        return None

    def required_columns(self, columns: Collection[str]) -> list[str]:
        """Columns that a data set must have.

        Args:
            columns: that it has.
        """
        needed = ["images"] + ([] if "messages" in columns else ["question", "answer"])
        return needed + {"chain": ["chain"], "regions": ["boxes"]}.get(self.latent_form, [])

    def build_collator(self, processor: Any) -> Any:
        """The collator of training and evaluation."""
        return LatentSFTCollator(processor, **self.collator_options())

    def collator_options(self) -> dict[str, Any]:
        """Arguments of [`LatentSFTCollator`] beside the processor."""
        return {name: getattr(self, name) for name in ("latent_form", "num_slots", "pad_to_multiple_of")}

    def _check_refused(self) -> None:
        """Options of `trl.SFTConfig` that would be ignored here, or train something else than the method."""
        if self.max_length is not None:
            raise ValueError(
                f"max_length={self.max_length} would cut image tokens or a span; leave it out and bound max_pixels of "
                "the processor instead"
            )
        for name in ("packing", "padding_free", "eval_packing"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True does not work with images and spans; set it to false, and latent_packing: sequence "
                    "for rows of several samples without padding"
                )
        for name, why in _REFUSED.items():
            value = getattr(self, name)
            if value:
                raise ValueError(f"{name}={value!r} {why}; leave it out")
        if self.completion_only_loss is False:
            raise ValueError(
                "completion_only_loss=False is not available: only responses carry labels, as in the published data; "
                "leave it out"
            )

    def dwal_options(self) -> DwalOptions:
        """The `dwal_*` fields as options of the loss."""
        prefix = "dwal_"
        values: dict[str, Any] = {k.removeprefix(prefix): v for k, v in vars(self).items() if k.startswith(prefix)}
        try:
            return DwalOptions(**values)
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from error
