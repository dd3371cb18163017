"""Options of the extraction of teacher signals; a YAML key and a flag each.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 5.2 and 5.3). The
defaults are those of the published builder, and of the paper where the two differ.
"""

from dataclasses import asdict, dataclass, field
from string import ascii_uppercase
from typing import Any

from .data.boxes import checked_option
from .data.records import DEFAULT_MAX_BAD_SHARE
from .judges import FAILURES, FINAL_ANSWERS, JUDGES, MATCHES, PARSES, Judge, build_judge
from .teacher_acceptance import ACCEPTANCE, NO_BOXES, AcceptanceRules, acceptance_rules
from .teacher_capture import AGGREGATIONS, ROWS, STEP_SYSTEM_MESSAGE, GradientOptions

METHODS = ("attention", "gradient")
STEP_SPLITS = ("auto", "whole", "lines", "tags")
CONCEPT_DTYPES = ("bfloat16", "float32")
# What the content of a shard does not depend on, and what is said there in another way.
_UNCOMPARED = (
    "output_dir", "shard_size", "max_bad_share", "retry_bad", "judge_key_env", "judge_url",
    "judge_failure", "judge_retries", "judge_timeout", "judge_workers", "acceptance", "require_correct",
    "reject_text_only", "min_box_mass", "no_boxes",
)  # fmt: skip


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TeacherConfig:
    """What is asked of the teacher, what of it is kept, and which samples."""

    output_dir: str = _option(
        "teacher_signals", "Folder of the shards; started again with the same options it goes on."
    )
    # Signals
    method: str = _option("attention", "'attention' of the last layers, or 'gradient' of the words.")
    num_layers: int | None = _option(8, "Last layers whose attention counts; null: all.")
    attention_rows: str = _option("after_image", "Rows that count: 'after_image' (published) or 'answer'.")
    steps: int = _option(1, "Steps that the teacher answers in, each with its own attention.")
    step_split: str = _option(
        "auto", "Where the steps of a reply are: 'tags' (<step>), 'lines', 'whole'; 'auto': whole, tags for gradients."
    )
    topk: int = _option(8, "How many of the largest weights a published trajectory file lists.")
    tau_grad: float = _option(0.01, "Gradient: temperature over the image tokens.")
    skip_markup: bool = _option(True, "Gradient: leave out tokens with < or >.")
    downsample: int = _option(1, "Gradient: look at every so many-th token.")
    max_tokens_per_step: int = _option(50, "Gradient: tokens of a step that are looked at.")
    max_grad_calls_per_step: int = _option(10, "Gradient: tokens of a step that are differentiated.")
    aggregation: str = _option("weighted_by_strength", f"Gradient: how tokens are put together: {AGGREGATIONS}.")
    attribution_threshold: float = _option(0.1, "Gradient: of 'filter_by_threshold'.")
    min_entropy: float = _option(0.5, "Gradient: of 'entropy_weighted', in nats.")
    # Answers
    max_new_tokens: int = _option(1024, "Budget of a reply.")
    repetition_penalty: float = _option(1.05, "Of a reply; 1.0 for none.")
    system_message: str | None = _option(
        None, "System message, {num_steps} becomes steps; null: the template's, or for tagged steps one that asks so."
    )
    answer_prompt: str | None = _option(
        None, "What the user says: {question}, and {choices} as lettered lines; null: the question, as published."
    )
    final_answer: str = _option(
        "auto", f"Where a reply has its final answer: {', '.join(FINAL_ANSWERS)}; see trainers.judges.final_answer."
    )
    batch_size: int = _option(8, "Samples in a forward of the teacher.")
    # Acceptance
    acceptance: str = _option("paper", f"Which samples are kept: {', '.join(ACCEPTANCE)}.")
    require_correct: bool | None = _option(None, "Keep right answers only; null: as acceptance says.")
    reject_text_only: bool | None = _option(
        None, "Leave out what the teacher answers without the image; null: as acceptance says."
    )
    min_box_mass: float | None = _option(
        None, "Least share of the attention inside the boxes; 0: no such filter; null: as acceptance says."
    )
    no_boxes: str = _option("reject", "A sample without boxes under that filter: 'reject' or 'accept'.")
    judge: str = _option("match", "Who judges: 'match' with the record's answer, or 'chat', a model.")
    judge_match: str = _option("exact", "Of short answers: 'exact', or 'contained' in the reply.")
    judge_model: str | None = _option(None, "Chat: name of the model, as the server knows it.")
    judge_url: str | None = _option(
        None, "Chat: the server, e.g. http://127.0.0.1:8000/v1; null: providers of the Hub."
    )
    judge_key_env: str | None = _option(None, "Chat: environment variable that holds the key.")
    judge_parse: str = _option("strict", "Chat: 'strict' (YES or NO, else asked again) or 'reference'.")
    judge_failure: str = _option("error", "Chat: what follows when all retries fail: 'error' or 'reject'.")
    judge_retries: int = _option(3, "Chat: how often a question is asked again.")
    judge_timeout: float = _option(60.0, "Chat: seconds of a request.")
    judge_workers: int = _option(4, "Chat: requests at a time.")
    judge_max_tokens: int = _option(16, "Chat: budget of a verdict.")
    # What is kept
    shard_size: int = _option(64, "Records in a shard: what a kill may cost.")
    save_full_concept: bool = _option(False, "Keep the concept of every image token, not only their mean.")
    save_scores: bool = _option(True, "Keep the mean attention before its scaling, too.")
    concept_dtype: str = _option("bfloat16", "Of the concepts on disk: 'bfloat16' or 'float32'.")
    max_bad_share: float = _option(DEFAULT_MAX_BAD_SHARE, "Stop when more of the rows than this are bad.")
    retry_bad: bool = _option(False, "Make those finished shards again that have bad rows.")
    # The published layout
    write_json: bool = _option(False, "Write the published layout, too: feature files, images, training JSON.")
    output_lavit15k_root: str | None = _option(None, "Where to; null: output_dir. Sets write_json.")
    copy_images: bool = _option(
        True, "Published layout: copy the images; without, the JSON names them where they are."
    )

    def __post_init__(self) -> None:
        choices = {
            "method": METHODS, "attention_rows": ROWS, "step_split": STEP_SPLITS, "final_answer": FINAL_ANSWERS,
            "no_boxes": NO_BOXES, "judge": JUDGES, "judge_match": MATCHES, "judge_parse": PARSES,
            "judge_failure": FAILURES, "concept_dtype": CONCEPT_DTYPES,
        }  # fmt: skip
        for name, allowed in choices.items():
            checked_option(name, getattr(self, name), allowed)
        for name in ("steps", "topk", "max_new_tokens", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers!r} must be at least 1, or null for all layers")
        if self.answer_prompt is not None and "{question}" not in self.answer_prompt:
            raise ValueError(
                f"answer_prompt={self.answer_prompt!r} has no {{question}}; say where the question stands"
            )
        if self.steps > 1 and self.split == "whole":
            raise ValueError(
                f"steps={self.steps} with step_split={self.step_split!r}: a whole reply is one step; choose 'tags' or "
                "'lines'"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share!r} must be between 0 and 1")
        self.write_json = self.write_json or self.output_lavit15k_root is not None
        self.gradient_options()
        self.rules()

    @property
    def split(self) -> str:
        """`step_split` with `"auto"` decided."""
        return self.step_split if self.step_split != "auto" else "tags" if self.method == "gradient" else "whole"

    def user_text(self, question: str, choices: list[str] | None) -> str:
        """What the user says for a question."""
        default = "Question: {question}" if self.method == "gradient" else "{question}"
        lines = "\n".join(
            f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices or (), strict=False)
        )
        text = default if self.answer_prompt is None else self.answer_prompt
        return text.replace("{choices}", lines).replace("{question}", question)

    def system_text(self) -> str | None:
        """The system message; None for what the template says by itself."""
        text = self.system_message
        if text is None and self.split == "tags":
            text = STEP_SYSTEM_MESSAGE
        return None if text is None else text.replace("{num_steps}", str(self.steps))

    def gradient_options(self) -> GradientOptions:
        """Options of the gradient method; the user's words are those of [`user_text`]."""
        return GradientOptions(
            tau=self.tau_grad,
            skip_markup=self.skip_markup,
            downsample=self.downsample,
            max_tokens_per_step=self.max_tokens_per_step,
            max_grad_calls_per_step=self.max_grad_calls_per_step,
            aggregation=self.aggregation,
            attribution_threshold=self.attribution_threshold,
            min_entropy=self.min_entropy,
            system_message=self.system_text(),
            user_text="{question}",
        )

    def rules(self) -> AcceptanceRules:
        """The filters."""
        return acceptance_rules(
            self.acceptance,
            require_correct=self.require_correct,
            reject_text_only=self.reject_text_only,
            min_box_mass=self.min_box_mass,
            no_boxes=self.no_boxes,
        )

    def build_judge(self) -> Judge | None:
        """The judge; None where answers are not judged.

        Raises:
            ValueError: see [`trainers.judges.build_judge`].
        """
        if not self.rules().require_correct:
            return None
        chat = {name: getattr(self, f"judge_{name}") for name in ("parse", "failure", "retries", "timeout", "workers")}
        return build_judge(
            self.judge,
            match=self.judge_match,
            model=self.judge_model,
            url=self.judge_url,
            key_env=self.judge_key_env,
            max_tokens=self.judge_max_tokens,
            **chat,
        )

    def settings(self) -> dict[str, Any]:
        """What the content of a shard depends on."""
        found = {name: value for name, value in asdict(self).items() if name not in _UNCOMPARED}
        return {**found, **{f"accept_{name}": value for name, value in asdict(self.rules()).items()}}


__all__ = ["TeacherConfig"]
