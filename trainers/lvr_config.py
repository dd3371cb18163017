"""`LVRSFTConfig`: options of LVR's supervised stage ("Latent Visual Reasoning", arXiv 2509.24251).

Paper, published code and the choice here, option by option: `hub_configs/methods/lvr.md`.
"""

from dataclasses import dataclass, field
from typing import Any

from .config_parts import is_number
from .configs import LatentSFTConfig
from .data.boxes import EMPTY_REGION, checked_option
from .data.lvr_text import REFERENCE_LAYOUT, RegionLayout
from .losses.roi_regression import REGRESSION_LOSSES, RoiRegressionOptions

REGION_LAYOUTS = ("recommended", "reference")
MODE_SWITCH_TARGETS = ("paper", "reference")


@dataclass
class LVRSFTConfig(LatentSFTConfig):
    """Options of [`LatentSFTTrainer`] for LVR, on top of [`LatentSFTConfig`].

    The defaults are the published ones where the method page gives no reason for others.
    """

    latent_method: str | None = field(default="lvr", metadata={"help": "Training objective."})
    latent_form: str = field(
        default="regions", metadata={"help": "'regions': slots for the image tokens of boxes; 'none': no span."}
    )
    latent_loss_weight: float = field(
        default=0.1, metadata={"help": "Weight (lambda) of the ROI regression. 0 trains the cross entropy alone."}
    )
    latent_exposure: str = field(
        default="oracle",
        metadata={
            "help": "What is fed at latent positions: 'oracle' image embeddings of the region (published), 'own' "
            "hidden states of passes without gradient, 'free': own ones step by step, with gradient (BPTT)."
        },
    )
    roi_loss_type: str = field(default="mse", metadata={"help": "'mse', 'mae' or 'cosine'."})
    roi_row_average: str = field(
        default="flat", metadata={"help": "'flat': mean over all latents of the batch; 'example': per example first."}
    )
    roi_detach_targets: bool = field(
        default=True,
        metadata={"help": "No gradient from the regression into the image embeddings; matters for a trained merger."},
    )
    region_layout: str = field(
        default="recommended",
        metadata={"help": "'recommended', or 'reference': text before a region is lost, regions restart every turn."},
    )
    latent_end_in_text: bool = field(
        default=True,
        metadata={"help": "Write the latent-end token behind the slots, as in the data of published checkpoints."},
    )
    empty_region: str = field(
        default="one_token", metadata={"help": "A box that covers no token: 'one_token', 'drop' or 'refuse'."}
    )
    join_regions: bool = field(
        default=False, metadata={"help": "All boxes of a record are one region, its tokens in the order of the boxes."}
    )
    mode_switch_loss: bool = field(
        default=False,
        metadata={
            "help": "Train when to leave a region: the distance to the learned end vector of a model that has one, "
            "else cross entropy on the end token's logit."
        },
    )
    mode_switch_weight: float = field(default=0.1, metadata={"help": "Weight of the mode-switch loss."})
    mode_switch_loss_type: str = field(
        default="mse", metadata={"help": "Distance to the learned end vector: 'mse', 'mae' or 'cosine'."}
    )
    mode_switch_targets: str = field(
        default="paper",
        metadata={"help": "'paper': 1 at the last latent; 'reference': as published, 0 everywhere."},
    )
    eval_free_running: bool = field(
        default=True,
        metadata={"help": "In evaluation also feed the model its own latents; logs how near they are to the region."},
    )

    def _check_latent_fields(self) -> None:
        super()._check_latent_fields()
        checked_option("region_layout", self.region_layout, REGION_LAYOUTS)
        checked_option("empty_region", self.empty_region, EMPTY_REGION)
        checked_option("mode_switch_loss_type", self.mode_switch_loss_type, REGRESSION_LOSSES)
        checked_option("mode_switch_targets", self.mode_switch_targets, MODE_SWITCH_TARGETS)
        if not is_number(self.mode_switch_weight, 0, float("inf")):
            raise ValueError(f"mode_switch_weight={self.mode_switch_weight!r} must be a finite number, 0 or more")
        self.roi_options()
        checked_option("latent_form", self.latent_form, ("regions", "none"))

    def roi_options(self) -> RoiRegressionOptions:
        """The `roi_*` fields as options of the loss."""
        try:
            return RoiRegressionOptions(self.roi_loss_type, self.roi_row_average)
        except ValueError as error:
            raise ValueError(f"roi_{error}") from error

    def collator_options(self) -> dict[str, Any]:
        """Arguments of [`LatentSFTCollator`] beside the processor."""
        regions = {"empty_region": self.empty_region, "join_regions": self.join_regions}
        return {**super().collator_options(), "region_layout": self.layout(), **regions}

    def layout(self) -> RegionLayout:
        """How regions are written."""
        reference = self.region_layout == "reference"
        values = vars(REFERENCE_LAYOUT) if reference else vars(RegionLayout())
        return RegionLayout(**{**values, "latent_end_in_text": self.latent_end_in_text})
