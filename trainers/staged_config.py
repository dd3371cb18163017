"""`StagedSFTConfig`: options of IVT-LR and Coconut, which replace explicit steps by latents, stage by stage.

Papers: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603; "Training Large
Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769.

Paper, published code and the choice here, option by option: `hub_configs/methods/ivtlr.md`.
"""

import dataclasses
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from modeling_latent.configuration_latent import get_latent_method

from .config_parts import is_number
from .configs import LatentSFTConfig
from .curriculum import Curriculum, check_curriculum_loader
from .data.boxes import checked_option
from .data.dynamic_batching import is_count
from .data.staged_text import StagedFormat, staged_format
from .data.stages import StageLayout
from .dynamic_loader import data_seed
from .staged_collator import StagedCollator

logger = logging.getLogger(__name__)

STAGED_MODES = ("latent", "pause", "no_thoughts", "cot", "no_cot")
ONE_STAGE_MODES = ("cot", "no_cot")  # explicit steps, or none, from the first step to the last
LATENT_GRADIENTS = ("detach", "bptt")
_PATCH_OPTIONS = {
    "latent_patch_order": ("score", "index_then_kth"),
    "latent_patch_images": ("all", "last"),
}


@dataclass
class StagedSFTConfig(LatentSFTConfig):
    """Options of [`LatentSFTTrainer`] for IVT-LR and Coconut, on top of [`LatentSFTConfig`].

    The defaults are those of IVT-LR, the published ones where the method page gives no reason for others; with
    `latent_method="coconut"` `num_latent_patches`, `latent_gradient` and `latent_markers` are those of Coconut.
    """

    latent_method: str | None = field(default="ivtlr", metadata={"help": "'ivtlr', or 'coconut' (text only)."})
    latent_form: str = field(default="none", metadata={"help": "Not read here: staged_mode says what is laid out."})
    latent_loss_weight: float = field(default=0.0, metadata={"help": "Refused unless 0: there is no latent loss."})
    latent_exposure: str = field(
        default="staged", metadata={"help": "'staged': every slot is fed the model's own state, as at inference."}
    )
    staged_mode: str = field(
        default="latent",
        metadata={
            "help": "'latent', or a control: 'pause' (slots fed by their own embedding), 'no_thoughts' (steps left "
            "out, nothing in their place), 'cot' (all steps), 'no_cot' (direct answers)."
        },
    )
    staged_format: str = field(
        default="plain",
        metadata={"help": "How a record is written: 'plain', 'ivtlr-qwen', 'ivtlr-chameleon' or 'coconut'."},
    )
    answer_prefix: str | None = field(
        default=None, metadata={"help": "Text before every answer; default: that of the format."}
    )
    max_staged_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of question, steps and answer; last steps that do not fit are left out. Default: the "
            "limit of the format; 0: none."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the square that every image is resized to first, on white (published for Qwen2-VL: 280); "
            "default: images keep their shape."
        },
    )
    num_latent_patches: int | None = field(
        default=None,
        metadata={"help": "Image embeddings inserted at each latent (K). Default: 32; Coconut 0."},
    )
    latent_patch_order: str = field(
        default="score",
        metadata={
            "help": "Order of the inserted: 'score', or 'index_then_kth' (published: what a GPU's top-k writes)."
        },
    )
    latent_patch_images: str = field(
        default="all", metadata={"help": "Images looked at: 'all', or the 'last' (published for Qwen2-VL)."}
    )
    latent_vision_first: bool = field(
        default=True, metadata={"help": "Inserted embeddings stand before their slot (published); false: behind it."}
    )
    latent_gradient: str | None = field(
        default=None,
        metadata={
            "help": "'detach': no gradient through the latents (published IVT-LR, its default); 'bptt': through all "
            "of them (Coconut, its default); needs activation_checkpointing: false."
        },
    )
    latent_markers: bool | None = field(
        default=None, metadata={"help": "Write markers around the latents. Default: false; Coconut true."}
    )
    latents_per_step: int = field(default=1, metadata={"help": "Latents in place of a step (c_thought)."})
    max_latent_stage: int = field(
        default=5, metadata={"help": "Greatest stage whose steps are counted; above it none is left."}
    )
    pad_latent_to_max: bool = field(
        default=True,
        metadata={"help": "Above max_latent_stage all records have its latents; false: not more than they had steps."},
    )
    max_latent_steps: int = field(default=16, metadata={"help": "Most latents of a record."})
    epochs_per_stage: list[int] | None = field(
        default=None, metadata={"help": "Length of every stage in epochs; several numbers: of each stage in turn."}
    )
    steps_per_stage: list[int] | None = field(
        default=None, metadata={"help": "The same in optimizer steps, for streams."}
    )
    num_stages: int | None = field(
        default=None, metadata={"help": "Stages, stage 0 counted; the last goes on to the end. Default: no last one."}
    )
    start_stage: int = field(
        default=0, metadata={"help": "Stage that the run begins with; alone, the only one (no curriculum)."}
    )
    uniform_prob: float = field(
        default=0.0, metadata={"help": "Share of samples at a stage drawn from 0 to their number of steps."}
    )
    reset_optimizer: str = field(
        default="never",
        metadata={"help": "A new optimizer at each 'stage' or 'epoch' (published Coconut), or 'never' (IVT-LR)."},
    )
    save_stage_ends: bool = field(default=False, metadata={"help": "Also save a checkpoint at the end of each stage."})

    def __post_init__(self) -> None:
        self._fill_defaults()
        super().__post_init__()
        if self.latent_gradient == "bptt" and self.activation_checkpointing:
            raise ValueError(
                "latent_gradient='bptt' needs the cache, which activation checkpointing drops; set "
                "activation_checkpointing: false, or latent_gradient: detach"
            )
        check_curriculum_loader(self)
        self._check_batches()
        self.curriculum()
        self.dataset_kwargs = {"skip_prepare_dataset": True, **(self.dataset_kwargs or {})}
        idle = [name for name in ("epochs_per_stage", "steps_per_stage") if getattr(self, name) is not None]
        if idle and self.staged_mode in ONE_STAGE_MODES:
            logger.warning("staged_mode=%r has one stage: %s has no effect", self.staged_mode, idle[0])

    def _fill_defaults(self) -> None:
        """What depends on the method."""
        generation = get_latent_method(self.latent_method or "ivtlr").generation
        if generation.get("latent_strategy") != "staged":
            raise ValueError(
                f"latent_method={self.latent_method!r} lays out no latents by stage; take its own configuration, or "
                "latent_method: ivtlr or coconut"
            )
        inserts = generation.get("num_latent_patches") or 0
        if self.num_latent_patches is None:
            self.num_latent_patches = inserts
        if self.latent_gradient is None:
            self.latent_gradient = "detach" if inserts else "bptt"
        if self.latent_markers is None:
            self.latent_markers = bool(generation.get("latent_markers", False))
        for name in ("epochs_per_stage", "steps_per_stage"):
            value = getattr(self, name)
            if isinstance(value, int):
                setattr(self, name, [value])

    def _check_latent_fields(self) -> None:
        super()._check_latent_fields()
        checked_option("latent_form", self.latent_form, ("none",))
        checked_option("staged_mode", self.staged_mode, STAGED_MODES)
        checked_option("latent_gradient", self.latent_gradient, LATENT_GRADIENTS)
        for name, allowed in _PATCH_OPTIONS.items():
            checked_option(name, getattr(self, name), allowed)
        if self.latent_loss_weight:
            raise ValueError(
                f"latent_loss_weight={self.latent_loss_weight!r}: latents are trained by the cross entropy behind "
                "them, there is no latent loss; leave it out"
            )
        for name in ("latents_per_step", "max_latent_steps"):
            if not is_count(getattr(self, name)):
                remedy = "; for no latents set staged_mode: no_thoughts" if name == "latents_per_step" else ""
                raise ValueError(f"{name}={getattr(self, name)!r} must be an integer of at least 1{remedy}")
        if not is_number(self.uniform_prob, 0, 1):
            raise ValueError(f"uniform_prob={self.uniform_prob!r} must be between 0 and 1")
        if self.uniform_prob and self.staged_mode in ONE_STAGE_MODES:
            raise ValueError(
                f"uniform_prob={self.uniform_prob!r} with staged_mode={self.staged_mode!r}, which has no other "
                "stages; set it to 0"
            )
        limit = self.max_staged_length
        if limit is not None and limit != 0 and not is_count(limit):
            raise ValueError(f"max_staged_length={limit!r} must be an integer of at least 1, or 0 for no limit")
        if self.image_size is not None and not is_count(self.image_size):
            raise ValueError(f"image_size={self.image_size!r} must be an integer of at least 1, or left out")
        self.format()
        self.layout()

    def _check_batches(self) -> None:
        reasons = {
            "latent_packing": "a plan of segments reads one sample a row",
            "enable_dynamic_batch": "the lengths of samples change from stage to stage",
        }
        for name, why in reasons.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not for a curriculum: {why}; leave it out")

    def format(self) -> StagedFormat:
        """How a record is written."""
        try:
            found = staged_format(self.staged_format)
        except ValueError as error:
            raise ValueError(f"staged_format={self.staged_format!r}: {error}") from error
        return found if self.answer_prefix is None else dataclasses.replace(found, answer_prefix=self.answer_prefix)

    def layout(self) -> StageLayout:
        """How a stage is laid out."""
        laid_out = self.staged_mode in ("latent", "pause")
        return StageLayout(
            max_latent_stage=self.max_latent_stage,
            pad_latent_to_max=self.pad_latent_to_max,
            latents_per_step=self.latents_per_step if laid_out else 0,
            num_patches=self.num_latent_patches if self.staged_mode == "latent" else 0,
            vision_first=self.latent_vision_first,
            markers=bool(self.latent_markers) and laid_out,
            no_cot=self.staged_mode == "no_cot",
            max_latent_steps=self.max_latent_steps,
        )

    def curriculum(self) -> Curriculum:
        """Which stage is trained when."""
        epochs, steps = self.epochs_per_stage, self.steps_per_stage
        if epochs is not None and steps is not None:
            raise ValueError(f"epochs_per_stage={epochs} and steps_per_stage={steps} are both set; give one of them")
        if self.staged_mode in ONE_STAGE_MODES:
            return self._one_stage(0)
        if epochs is None and steps is None:
            if self.start_stage == 0:
                raise ValueError(
                    f"staged_mode={self.staged_mode!r} without a curriculum would train stage 0 alone; set "
                    "epochs_per_stage (for a stream steps_per_stage), start_stage for a run at one stage, or "
                    "staged_mode: cot"
                )
            return self._one_stage(self.start_stage)
        unit, lengths = ("epoch", epochs) if steps is None else ("step", steps)
        return Curriculum(
            tuple(lengths), unit, self.num_stages, self.start_stage, self.reset_optimizer, self.save_stage_ends
        )

    def _one_stage(self, stage: int) -> Curriculum:
        if stage != 0 and not is_count(stage):
            raise ValueError(f"start_stage={stage!r} must be an integer, 0 or more")
        return Curriculum(
            (1,),
            "epoch" if self.reset_optimizer == "epoch" else "step",
            num_stages=stage + 1,
            start_stage=stage,
            reset_optimizer=self.reset_optimizer,
        )

    def required_columns(self, columns: Collection[str]) -> list[str]:
        images = ["images"] if self.needs_images() else []
        return [*images, "question", "answer", *([] if self.staged_mode == "no_cot" else ["steps"])]

    def needs_images(self) -> bool:
        """Whether every record has to have one; that of a control of an image method, too."""
        return "patch" in get_latent_method(self.latent_method or "ivtlr").tokens

    def build_collator(self, processor: Any) -> StagedCollator:
        return StagedCollator(
            processor,
            layout=self.layout(),
            fmt=self.format(),
            max_length="format" if self.max_staged_length is None else self.max_staged_length or None,
            image_size=self.image_size,
            patch_images=self.latent_patch_images,
            needs_images=self.needs_images(),
            needs_steps=self.staged_mode != "no_cot",
            uniform_prob=self.uniform_prob,
            seed=data_seed(self),
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    def decoding(self) -> dict[str, Any]:
        """Options of `generate` that are saved with the model: latents as at the last stage of the curriculum."""
        last, layout = self.curriculum().last_stage, self.layout()
        stage = layout.max_latent_stage if last is None else min(last, layout.max_latent_stage)
        if self.staged_mode not in ("latent", "pause"):
            return {"latent_strategy": "off"}
        return {
            "latent_strategy": "staged",
            "num_latent_steps": stage * layout.latents_per_step,
            "max_latent_steps": self.max_latent_steps,
            "num_latent_patches": layout.num_patches,
            "latent_fed": "token" if self.staged_mode == "pause" else "state",
            "latent_patch_order": self.latent_patch_order,
            "latent_patch_images": self.latent_patch_images,
            "latent_vision_first": self.latent_vision_first,
            "latent_markers": bool(self.latent_markers),
        }


__all__ = ["LATENT_GRADIENTS", "ONE_STAGE_MODES", "STAGED_MODES", "StagedSFTConfig"]
