"""From records with teacher signals to model inputs and targets, in the layout of LaViT.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 2.2, 2.3, 2.5, 4.7).

Deviations from the reference, on purpose: targets are on the grid of the student's image tokens (the published one, of
patches, is four times too fine); a learned token in a text is refused, where the reference moves the anchor to it; a
signal that is missing is an error, where the reference trains on zeros.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.data import get_worker_info

from .collators import LatentSFTCollator, completed_row
from .data.boxes import checked_option
from .data.dynamic_batching import is_count
from .data.llava_checks import image_problems, turn_problems
from .data.llava_text import IMAGE_PLACEHOLDER, expand_image_placeholders
from .data.records import Record, RecordError, open_image, record_from_row, record_origin, validate_record
from .data.teacher_signals import TEACHER_SIGNALS, TeacherSignals, find_best_grid, load_teacher_signals, resize_signal

logger = logging.getLogger(__name__)

TEACHER_GRIDS = ("merged", "patch")
PROCESSOR_MESSAGE = "processor"


@dataclass
class LavitCollator(LatentSFTCollator):
    """Collates records (see `trainers/data/records.py`) for LaViT.

    A record needs one image, `question` and `answer` (or `messages` of one prompt and one reply), and `teacher` with
    the needed signals (see `data/teacher_signals.py`). The reply is written as learned tokens, a space and the answer.

    Args:
        processor, num_slots, pad_to_multiple_of, region_layout, empty_region, join_regions: see
            [`LatentSFTCollator`]; slots and regions do not occur here.
        latent_form: `"learned"`, or `"none"`: the answer alone, the published text-only baseline, whose labels begin
            with the newline behind the assistant's header.
        num_latent_tokens: how many of the processor's learned tokens are written, the first ones; default: all.
        system_message: `"processor"`: that of the processor's chat template; another text, or None for no system turn.
        teacher_grid: cells of the attention target: `"merged"`, the image tokens of the student, or `"patch"`, its
            patches, as published.
        concept_size: width that the concepts must have (`concept_head_size` of the model); default: of the first.
        needs: the targets of a batch, `"concept"` and `"attention"`; default: both with learned tokens, none without.

    Returns (call):
        `input_ids`, `attention_mask`, `labels`, `mm_token_type_ids` `(batch, length)` padded on the right,
        `pixel_values`, `image_grid_thw` `(batch, 3)`; and if needed `concept_target` `(batch, D)`, the mean of the
        teacher's rows (with `"patch"` of the resized rows), and `attention_target` `(batch, most cells)`, values as in
        the file, padded with 0, with `attention_length` `(batch,)`.

    Raises:
        ValueError: an option out of its range, or a processor without learned tokens.
        RecordError: names file, row and id: not one image, a learned token in a text, more than one reply, a signal
            that is missing, broken, of another width or of another image (see [`load_teacher_signals`]).
    """

    forms: ClassVar[tuple[str, ...]] = ("learned", "none")

    latent_form: str = "learned"
    num_latent_tokens: int | None = None
    system_message: str | None = PROCESSOR_MESSAGE
    teacher_grid: str = "merged"
    concept_size: int | None = None
    needs: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_option("teacher_grid", self.teacher_grid, TEACHER_GRIDS)
        if self.concept_size is not None and not is_count(self.concept_size):
            raise ValueError(f"concept_size={self.concept_size!r} must be an integer of at least 1, or None")
        if self.needs is None:
            self.needs = TEACHER_SIGNALS if self.latent_form == "learned" else ()
        for name in self.needs:
            checked_option("target in needs", name, TEACHER_SIGNALS)
        if self.system_message != PROCESSOR_MESSAGE:
            self._system_message = self.system_message
        self._latents = self._learned_text() if self.latent_form == "learned" else ""
        self._said = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        records = [self._opened(self.record(row)) for row in rows]
        batch = super().__call__(records)
        return {**batch, **self._targets(records, batch["image_grid_thw"].tolist())}

    def record(self, row: Mapping[str, Any]) -> Any:
        """The record of a row, columns that it lacks filled in."""
        return record_from_row(completed_row(row))

    def encode(self, record: Any, grids_thw: Sequence[Sequence[int]]) -> dict[str, Any]:
        """`input_ids` and `labels` of a record whose image has this grid of patches.

        Raises:
            RecordError: names file, row and id.
        """
        encoded = super().encode(record, grids_thw)
        if self.latent_form == "none":
            start = next(i for i, label in enumerate(encoded["labels"]) if label != -100)
            newline = self.processor.tokenizer.encode("\n", add_special_tokens=False)
            encoded["labels"][start - len(newline) : start] = newline
        return encoded

    # Text

    def _learned_text(self) -> str:
        """The learned tokens and the space behind them."""
        ids, number = self.processor.latent_learned_token_ids, self.num_latent_tokens
        if not ids:
            raise ValueError(
                f"latent_form='learned', but the processor has no learned tokens (roles learned_1, learned_2, ...; it "
                f"has {list(self.processor.latent_tokens)}); make the model with method='lavit', or train the "
                "baseline with latent_form: none"
            )
        if number is not None and not (is_count(number) and number <= len(ids)):
            raise ValueError(
                f"num_latent_tokens={number!r} must be an integer from 1 to {len(ids)}, the learned tokens of the "
                "processor, or None for all; make a model with more of them"
            )
        return "".join(self.processor.tokenizer.convert_ids_to_tokens(ids[:number])) + " "

    def _turns(self, record: Any) -> list[tuple[str, str]]:
        validate_record(record, *record_origin(record))
        _check_one_image(record)
        messages = record["messages"]
        if messages is None:
            messages = [
                {"role": "user", "content": f"{IMAGE_PLACEHOLDER}\n{record['question']}"},
                {"role": "assistant", "content": record["answer"]},
            ]
        problem = next(self._problems(messages, record["images"]), None)
        if problem is not None:
            raise _refusal(record, problem)
        turns = [(turn["role"], expand_image_placeholders(turn["content"])) for turn in messages]
        return [*turns[:-1], ("assistant", self._latents + turns[-1][1])]

    def _problems(self, messages: Sequence[Mapping[str, str]], images: Sequence[Any]) -> Iterator[str]:
        yield from turn_problems(messages)
        yield from image_problems(messages, images)
        roles = [turn["role"] for turn in messages if turn["role"] != "system"]
        if roles != ["user", "assistant"]:
            yield f"LaViT trains one prompt and one reply, got the roles {roles}; make a record of each reply"
        for turn in messages:
            token = next((t for t in self.processor.latent_tokens.values() if t in turn["content"]), None)
            if token is not None:
                yield (
                    f"the {turn['role']} turn contains the latent token {token}, which the collator alone writes (it "
                    f"would be taken for a latent); remove it: {turn['content']!r:.80}"
                )

    def _opened(self, record: Record) -> Record:
        """The record with its image as RGB pixels: what the image processor and the fingerprint see."""
        _check_one_image(record)
        return {**record, "images": [open_image(image, record) for image in record["images"]]}

    # Targets

    def _targets(self, records: Sequence[Record], grids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """The targets that are needed; `grids` are those of the student, in patches."""
        concepts: list[torch.Tensor] = []
        attentions: list[torch.Tensor] = []
        for record, (_, height, width) in zip(records, grids, strict=True):
            size = self.concept_size or (len(concepts[0]) if concepts else None)
            image = record["images"][0]
            signals = load_teacher_signals(record, concept_size=size, image=image, need=self.needs)
            merge = self.processor.image_processor.merge_size
            student = height // merge, width // merge
            target = (height, width) if self.teacher_grid == "patch" else student
            source = self._source(record, signals, student, target)
            if signals.concept is not None:
                concepts.append(self._pooled(signals.concept, target, source))
            if signals.attention is not None:
                attentions.append(resized_attention(record, signals.attention, target, source))
        return stacked_targets(concepts, attentions)

    def _source(
        self, record: Record, signals: TeacherSignals, student: tuple[int, int], target: tuple[int, int]
    ) -> tuple[int, int]:
        """Grid of the teacher's image tokens, guessed where the record does not say it (the target, when that has as
        many cells). A grid other than the student's is logged."""
        grid, tokens = signals.grid, signals.num_tokens
        if tokens is None or (signals.attention is None and self.teacher_grid == "merged"):
            return target
        if grid is None and tokens == math.prod(target):
            return target
        grid = grid or find_best_grid(tokens, *record["images"][0].size)
        if grid not in (student, target):
            self._log_resize(record, grid, student, guessed=signals.grid is None)
        return grid

    def _log_resize(self, record: Record, grid: tuple[int, int], student: tuple[int, int], guessed: bool) -> None:
        """Once as a warning, by one worker of the loader, then for debugging."""
        worker = get_worker_info()
        level = logging.DEBUG if self._said or (worker is not None and worker.id) else logging.WARNING
        self._said = True
        logger.log(
            level,
            "record %r: the teacher's signals lie on %sx%s image tokens%s, the student has %sx%s; they are resized, "
            "bilinear (said once; later records at level DEBUG). The same pixel bounds for both models avoid it",
            record["id"], *grid, " (guessed)" if guessed else "", *student,
        )  # fmt: skip

    def _pooled(self, concept: torch.Tensor, target: tuple[int, int], source: tuple[int, int]) -> torch.Tensor:
        """`(D,)`, the mean over the teacher's image tokens, as published over the resized ones."""
        if concept.ndim == 1:
            return concept
        if self.teacher_grid == "patch":
            concept = resize_signal(concept, target, source=source)
        return concept.mean(0)


def _check_one_image(record: Record) -> None:
    found = len(record["images"] or [])
    if found != 1:
        raise _refusal(record, f"LaViT needs exactly one image a record, got {found}; split or drop the record")


def _refusal(record: Record, problem: str) -> RecordError:
    return RecordError(*record_origin(record), f"record {record['id']!r}: {problem}")


def resized_attention(
    record: Record, attention: torch.Tensor, target: tuple[int, int], source: tuple[int, int]
) -> torch.Tensor:
    """The attention on the student's grid, flat.

    Raises:
        RecordError: nothing is left of it: a coarser grid takes no sample at its peak.
    """
    resized = resize_signal(attention, target, source=source)
    if not resized.any():
        raise _refusal(
            record,
            f"the teacher's attention, resized from {source[0]}x{source[1]} to {target[0]}x{target[1]}, sums to zero; "
            "give the student's processor the pixel bounds of the teacher's, or leave the record out",
        )
    return resized


def stacked_targets(concepts: Sequence[torch.Tensor], attentions: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """`concept_target` `(batch, D)`; `attention_target` `(batch, longest)` padded with 0, and `attention_length`."""
    targets = {"concept_target": torch.stack(list(concepts))} if concepts else {}
    if attentions:
        targets["attention_target"] = torch.nn.utils.rnn.pad_sequence(list(attentions), batch_first=True)
        targets["attention_length"] = torch.tensor([len(attention) for attention in attentions])
    return targets
