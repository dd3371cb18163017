"""Teachers whose signals are distilled: what an extraction asks of one, and a model as one.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 5.2 and 5.3).
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from .data.lengths import tokenizer_hash
from .teacher_capture import CapturedSignals, capture_attention, capture_gradient, generate_answers
from .teacher_config import TeacherConfig


class Teacher(Protocol):
    """What an extraction asks of a teacher; each list has one entry a sample."""

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], with_image: bool = True) -> list[str]:
        """Replies."""

    def capture(
        self, images: Sequence[Image.Image], questions: Sequence[str], pieces: Sequence[Sequence[str]]
    ) -> list[list[CapturedSignals]]:
        """Signals of each piece of a reply."""

    def facts(self) -> dict[str, Any]:
        """What identifies the teacher, as JSON."""


class ModelTeacher:
    """A model of this library or a stock one as teacher.

    Args:
        model: any backbone with images, on its device.
        processor: its processor.
        config: options.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, config: TeacherConfig) -> None:
        self.model, self.processor, self.config = model, processor, config

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], with_image: bool = True) -> list[str]:
        return generate_answers(
            self.model,
            self.processor,
            images,
            questions,
            max_new_tokens=self.config.max_new_tokens,
            repetition_penalty=self.config.repetition_penalty,
            system_message=self.config.system_text(),
            with_image=with_image,
        )

    def capture(
        self, images: Sequence[Image.Image], questions: Sequence[str], pieces: Sequence[Sequence[str]]
    ) -> list[list[CapturedSignals]]:
        if self.config.method == "gradient":
            options = self.config.gradient_options()
            samples = zip(images, questions, pieces, strict=True)
            return [capture_gradient(self.model, self.processor, *sample, options) for sample in samples]
        by_step = [
            capture_attention(
                self.model,
                self.processor,
                images,
                questions,
                [sample[: step + 1] for sample in pieces],
                num_layers=self.config.num_layers,
                rows=self.config.attention_rows,
                system_message=self.config.system_text(),
            )
            for step in range(self.config.steps)
        ]
        return [list(steps) for steps in zip(*by_step, strict=True)]

    def facts(self) -> dict[str, Any]:
        """Class and weights of the model, tokenizer, chat template and size limits of images."""
        template = json.dumps(getattr(self.processor, "chat_template", None), sort_keys=True)
        size = dict(getattr(self.processor.image_processor, "size", None) or {})
        return {
            "teacher": model_fingerprint(self.model),
            "teacher_tokenizer": tokenizer_hash(self.processor.tokenizer),
            "teacher_template": hashlib.sha256(template.encode()).hexdigest()[:16],
            "teacher_image_size": {name: int(value) for name, value in sorted(size.items()) if value is not None},
        }


def model_fingerprint(model: torch.nn.Module) -> str:
    """Class of a model and a hash of its parameters: names, shapes, types and a few values of each."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        few = parameter.detach().reshape(-1)[:8].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode() + few)
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"


__all__ = ["ModelTeacher", "Teacher", "model_fingerprint"]
