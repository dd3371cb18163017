"""`LavitSFTConfig`: options of LaViT, which distils what and where a larger model looks at into learned tokens.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129. Paper, published code and
the choice here, option by option: `hub_configs/methods/lavit.md`.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from .config_parts import is_number
from .configs import LatentSFTConfig
from .data.boxes import checked_option
from .data.dynamic_batching import is_count
from .lavit_collator import TEACHER_GRIDS, LavitCollator
from .losses.attention_alignment import AttentionAlignmentOptions
from .sensory_gate import gate_gamma

VISIBILITIES = ("gate", "bottleneck", "none", "reference")
VISIBILITY_OF_STAGE = {0: "gate", 1: "bottleneck", 2: "none"}
ATTENTION_PREDICTORS = ("head", "attention")
ATTENTION_LATENTS = ("last", "all")
ATTENTION_KEYS = ("image", "reference")
ATTENTION_TARGETS = ("normalised", "reference")


@dataclass
class LavitSFTConfig(LatentSFTConfig):
    """Options of [`LatentSFTTrainer`] for LaViT, on top of [`LatentSFTConfig`].

    The defaults are those of the paper where the published code does something else.
    """

    latent_method: str | None = field(default="lavit", metadata={"help": "Training objective."})
    latent_form: str = field(
        default="learned",
        metadata={"help": "'learned': learned tokens before the answer; 'none': the answer alone (baseline)."},
    )
    num_latent_tokens: int | None = field(
        default=None,
        metadata={"help": "Learned tokens (K); a stock checkpoint is given so many. Default: all that there are, 4."},
    )
    latent_loss_weight: float = field(
        default=0.3,
        metadata={"help": "Weight of the concept alignment: the state at the last token, and what the teacher sees."},
    )
    attention_loss_weight: float = field(
        default=0.3, metadata={"help": "Weight of the attention alignment: where the teacher looks."}
    )
    training_stage: int = field(
        default=0,
        metadata={"help": "Names the default of latent_visibility: 0 'gate' (one run), 1 'bottleneck', 2 'none'."},
    )
    latent_visibility: str | None = field(
        default=None,
        metadata={
            "help": "Image, seen from the answer, in training: 'gate' opens slowly (paper), 'bottleneck' hides it, "
            "'none' is plain; 'reference' is the published stage 1, which hides nothing and leaks labels."
        },
    )
    gate_steps: int = field(default=400, metadata={"help": "Optimizer steps after which the gate is open (T_w)."})
    gate_floor: float = field(default=1e-6, metadata={"help": "The gate at the first step (epsilon)."})
    block_prompt: bool | None = field(
        default=None,
        metadata={
            "help": "The rule also holds for prompt rows behind the image. Default: false for the gate (paper), else "
            "true (published)."
        },
    )
    attention_predictor: str = field(
        default="head",
        metadata={
            "help": "What predicts the teacher's attention: a 'head' on final states (published), or the model's own "
            "'attention' from the last learned token, mean over layers and heads (needs no activation checkpointing)."
        },
    )
    attention_latents: str = field(
        default="last",
        metadata={
            "help": "Which learned tokens predict it: the 'last' (published), or 'all', their losses summed (the "
            "formula of the paper)."
        },
    )
    attention_keys: str = field(
        default="image",
        metadata={"help": "Keys of the head: states of the 'image' tokens, or 'reference': the first positions."},
    )
    attention_target: str = field(
        default="normalised",
        metadata={"help": "'normalised': a distribution; 'reference': values as they are in the file."},
    )
    attention_top_k: int | None = field(
        default=8,
        metadata={"help": "Largest values of a target that are kept; 0: all. Not with attention_target: reference."},
    )
    teacher_grid: str = field(
        default="merged",
        metadata={"help": "Cells of a target: 'merged' image tokens, or 'patch'es (published, four times as many)."},
    )
    concept_size: int | None = field(
        default=None, metadata={"help": "Width that the teacher's states must have; the scripts take the model's."}
    )
    system_message: str | None = field(
        default="processor",
        metadata={"help": "'processor': that of the chat template; another text; empty for no system turn."},
    )

    def __post_init__(self) -> None:
        if self.attention_top_k == 0:
            self.attention_top_k = None
        if self.latent_visibility is None:
            self.latent_visibility = VISIBILITY_OF_STAGE.get(self.training_stage)
        if self.latent_form == "none":
            self.latent_loss_weight = self.attention_loss_weight = 0.0
            self.latent_visibility = "none"
        super().__post_init__()
        if self.attention_predictor == "attention" and self.uses_attention and self.activation_checkpointing:
            raise ValueError(
                "attention_predictor='attention' reads the layers while they run, which activation checkpointing runs "
                "twice; set activation_checkpointing: false, or attention_predictor: head"
            )

    @property
    def uses_attention(self) -> bool:
        """Whether the attention alignment is trained."""
        return self.attention_loss_weight > 0

    @property
    def uses_concept(self) -> bool:
        """Whether the concept alignment is trained."""
        return self.latent_loss_weight > 0

    @property
    def blocks_prompt(self) -> bool:
        """Whether prompt rows behind the image are under the rule as well."""
        return self.latent_visibility != "gate" if self.block_prompt is None else self.block_prompt

    def _check_latent_fields(self) -> None:
        super()._check_latent_fields()
        if self.training_stage not in VISIBILITY_OF_STAGE or isinstance(self.training_stage, bool):
            raise ValueError(f"training_stage={self.training_stage!r} is unknown; choose 0, 1 or 2")
        for name, allowed in (
            ("latent_form", ("learned", "none")),
            ("latent_visibility", VISIBILITIES),
            ("attention_predictor", ATTENTION_PREDICTORS),
            ("attention_latents", ATTENTION_LATENTS),
            ("attention_keys", ATTENTION_KEYS),
            ("attention_target", ATTENTION_TARGETS),
            ("teacher_grid", TEACHER_GRIDS),
        ):
            checked_option(name, getattr(self, name), allowed)
        if not is_number(self.attention_loss_weight, 0, math.inf):
            raise ValueError(f"attention_loss_weight={self.attention_loss_weight!r} must be a number, 0 or more")
        if self.num_latent_tokens is not None and not is_count(self.num_latent_tokens):
            raise ValueError(f"num_latent_tokens={self.num_latent_tokens!r} must be an integer of at least 1")
        if self.gate_steps != 0 and not is_count(self.gate_steps):
            raise ValueError(f"gate_steps={self.gate_steps!r} must be an integer, 0 or more")
        gate_gamma(0, self.gate_steps, self.gate_floor)
        self._check_attention()
        for name in ("latent_packing", "enable_dynamic_batch"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not for LaViT: visibility and targets are by sample; leave it "
                    "out"
                )

    def _check_attention(self) -> None:
        """The parts of the attention alignment that only go together."""
        reference = self.attention_target == "reference"
        if reference and self.attention_top_k is not None and self.attention_top_k != 8:
            raise ValueError(
                f"attention_top_k={self.attention_top_k} with attention_target='reference', which is dense; leave it "
                "out"
            )
        if self.attention_top_k is not None and not is_count(self.attention_top_k):
            raise ValueError(f"attention_top_k={self.attention_top_k!r} must be an integer of at least 1, or 0")
        if (self.attention_keys == "reference") != (self.teacher_grid == "patch"):
            raise ValueError(
                f"attention_keys={self.attention_keys!r} with teacher_grid={self.teacher_grid!r}: image tokens are "
                "the keys of merged cells, the first positions those of patches; set attention_keys: reference and "
                "teacher_grid: patch together, or leave both out"
            )
        if self.attention_predictor == "attention" and self.attention_keys == "reference":
            raise ValueError(
                "attention_keys='reference' with attention_predictor='attention': the model's attention is read at "
                "image tokens; leave attention_keys and teacher_grid out"
            )

    def attention_options(self) -> AttentionAlignmentOptions:
        """What the loss makes of a target."""
        if self.attention_target == "reference":
            return AttentionAlignmentOptions.reference()
        return AttentionAlignmentOptions(top_k=self.attention_top_k)

    def needed_signals(self) -> tuple[str, ...]:
        """The teacher's signals that a record must have."""
        wanted = {"concept": self.uses_concept, "attention": self.uses_attention}
        return tuple(name for name, used in wanted.items() if used)

    def required_columns(self, columns: Collection[str]) -> list[str]:
        needed = ["images"] + ([] if "messages" in columns else ["question", "answer"])
        return needed + (["teacher"] if self.needed_signals() else [])

    def build_collator(self, processor: Any) -> LavitCollator:
        return LavitCollator(
            processor,
            latent_form=self.latent_form,
            pad_to_multiple_of=self.pad_to_multiple_of,
            num_latent_tokens=self.num_latent_tokens if self.latent_form == "learned" else None,
            system_message=self.system_message or None,
            teacher_grid=self.teacher_grid,
            concept_size=self.concept_size,
            needs=self.needed_signals(),
        )

    def decoding(self) -> dict[str, Any]:
        """Options of `generate` that are saved with the model."""
        if self.latent_form == "none":
            return {"latent_strategy": "off"}
        count = {} if self.num_latent_tokens is None else {"num_latent_steps": self.num_latent_tokens}
        return {"latent_strategy": "learned", **count}


__all__ = ["VISIBILITIES", "VISIBILITY_OF_STAGE", "LavitSFTConfig"]
