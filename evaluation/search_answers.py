"""Answers to questions by the search over thought tokens, or by plain decoding of the same prompt, in batches.

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623 (card 4.2, 6).
Randomness belongs to a question: its noise comes from a generator made of the seed and its index in the file, so that
an answer depends neither on its batch nor on the process that gives it. `noise_stream="run"` is the published way,
one generator for all questions in turn.
"""

import base64
import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from modeling_latent.search_messages import SYSTEM_PROMPT
from modeling_latent.search_options import SEARCH_OPTIONS, search_settings
from modeling_latent.search_prompts import SearchPrompt, published_prompt_field, search_prompts
from modeling_latent.search_strategy import generate_with_search
from trainers.data.answers import STRICT
from trainers.data.answers_dmlr import stop_reason
from trainers.data.answers_staged import REFERENCE
from trainers.data.boxes import checked_option
from trainers.data.records import RecordError, open_image

from .search_questions import Question
from .search_store import DONE, FAILED, SKIPPED, STEP_FIELDS

logger = logging.getLogger(__name__)

STRATEGIES = ("search", "greedy", "sample")
NOISE_STREAMS = ("item", "run")
GIVE_UP = 8  # questions in a row that fail before a run stops
BAD_WORDS = "addCriterion"  # what the published decode never writes, but for Qwen3
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}Answer:"
    "{% endif %}"
)


class SearchRunError(RuntimeError):
    """A run that cannot go on; what is finished is kept."""


@dataclass(frozen=True)
class SearchPlan:
    """How questions are answered.

    Args:
        strategy: `"search"`; `"greedy"` or `"sample"`: the same prompt, its thought tokens as they are, decoded by the
            model's own `generate` (with its own positions), with the same budget. The search without steps is
            `max_num_steps=0`.
        options: of the search, see `SEARCH_OPTIONS`; `mode` and `num_thought_tokens` are read for every strategy.
        max_new_tokens: budget of an answer.
        prompt_index, min_tokens, max_tokens, placeholder, chat_template: see `search_prompts`.
        seed: of the noise, and of sampling.
        noise_stream: `"item"`, or `"run"`: as published, one generator for all questions in turn (one process, batches
            of one).
        temperature, top_p: of the strategy `"sample"`.

    Raises:
        ValueError: an option that is unknown or out of range.
    """

    strategy: str = "search"
    options: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 2048
    prompt_index: int = 0
    min_tokens: int | None = None
    max_tokens: int | None = None
    placeholder: str | None = None
    chat_template: str | None = None
    seed: int = 42
    noise_stream: str = "item"
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        checked_option("strategy", self.strategy, STRATEGIES)
        checked_option("noise_stream", self.noise_stream, NOISE_STREAMS)
        for name, value in (("max_new_tokens", self.max_new_tokens), ("seed", self.seed)):
            least = 1 if name == "max_new_tokens" else 0
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature={self.temperature!r}, top_p={self.top_p!r}: above 0, and above 0 up to 1; for no "
                "randomness choose strategy='greedy'"
            )
        if {"seed", "thought_mask"} & set(self.options):
            raise ValueError("seed is an option of the plan, and thought_mask is that of the prompts; leave them out")
        if self.strategy != "search" and self.noise_stream == "run":
            raise ValueError(f"noise_stream='run' is of the search, and strategy={self.strategy!r}; leave it out")
        _ = self.settings

    @cached_property
    def settings(self) -> SimpleNamespace:
        """The options of the search with their defaults, checked."""
        return search_settings(**self.options)

    @property
    def mode(self) -> str:
        """`"paper"` or `"reference"`."""
        return self.settings.mode

    @property
    def first_injecting_step(self) -> int | None:
        """The first step that interleaves image tokens; None without one."""
        steps = self.settings.max_num_steps if self.strategy == "search" else 0
        return next((step for step in range(steps) if self.settings.schedule.injects(step)), None)

    def description(self) -> dict[str, Any]:
        """Everything that answers depend on, name to a value that JSON can hold."""
        names = ("strategy", "max_new_tokens", "prompt_index", "min_tokens", "max_tokens", "placeholder")
        found = {name: getattr(self, name) for name in (*names, "chat_template", "seed", "noise_stream")}
        if self.strategy == "sample":
            found |= {"temperature": self.temperature, "top_p": self.top_p}
        read = SEARCH_OPTIONS if self.strategy == "search" else ("mode", "num_thought_tokens")
        options = {name: getattr(self.settings, name) for name in read if name not in ("seed", "thought_mask")}
        if "reward" in options:
            given = self.options.get("reward") or getattr(SEARCH_OPTIONS["reward"], self.mode)
            options["reward"] = given if isinstance(given, str) else getattr(given, "__qualname__", repr(given))
        return {**found, **options}


def item_seed(seed: int, data_idx: int) -> int:
    """The seed of a question: 63 bits of a hash of the run's seed and the question's index."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{data_idx}".encode()).digest()[:8], "big") >> 1


class ItemSampling(LogitsProcessor):
    """Sampling by the arg max of scores and Gumbel noise, each row with a generator of its own: decoded greedily it
    is a draw from the softmax of the scores, whatever the other rows are.

    Args:
        seeds: one a row.
        temperature, top_p: as in `generate`.
    """

    def __init__(self, seeds: Sequence[int], temperature: float = 1.0, top_p: float = 1.0) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.warpers = LogitsProcessorList()
        if temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = self.warpers(input_ids, scores.float())
        noise = [-torch.empty(scores.shape[1]).exponential_(generator=each).log() for each in self.generators]
        return scores + torch.stack(noise).to(scores.device)


class _FirstStep(LogitsProcessor):
    """When the first token is chosen, and behind how many positions."""

    def __init__(self) -> None:
        self.prompt_length: int | None = None
        self.time = 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.prompt_length is None:
            self.prompt_length, self.time = input_ids.shape[1], _now(scores.device)
        return scores


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class SearchAnswers:
    """Answers questions with a model.

    Args:
        model: stock or latent, on its device; it is set to evaluation mode.
        processor: a processor, or a tokenizer for questions of text. A tokenizer without a chat template gets
            `PLAIN_TEMPLATE`, one without a padding token that of the end.
        plan: how.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, plan: SearchPlan) -> None:
        self.model, self.processor, self.plan = model.eval(), processor, plan
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        self.chat_template = plan.chat_template
        text_alone = getattr(processor, "image_processor", None) is None
        if self.chat_template is None and not getattr(processor, "chat_template", None) and text_alone:
            self.chat_template = PLAIN_TEMPLATE
            logger.warning("%s has no chat template; its prompts are plain text", type(processor).__name__)
        self.is_latent = hasattr(model.config, "latent_token_id")
        ends = model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends} - {None}
        self.generator = torch.Generator().manual_seed(plan.seed)

    # --- the published stream of noise ---

    @property
    def stream(self) -> str | None:
        """The state of the noise behind the last question, as text; None where each question has its own."""
        if self.plan.noise_stream != "run":
            return None
        return base64.b64encode(self.generator.get_state().numpy().tobytes()).decode()

    @stream.setter
    def stream(self, state: str) -> None:
        self.generator.set_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))

    # --- lines ---

    def __call__(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """A line for each question, see [`evaluation.search_store.RunFolder`]: answered, failed, or to be skipped.

        A batch that fails is answered question by question, so that one bad question costs no other. With the
        published stream of noise a failure is raised, as there: what comes behind it would depend on it.
        """
        lines: dict[int, dict[str, Any]] = {}
        asked = []
        for question in questions:
            if question.solution is None and question.problem is None:
                lines[question.data_idx] = {**self._head(question), "status": SKIPPED, "stream": self.stream}
            elif question.record is None:
                lines[question.data_idx] = self._failed(question, question.problem, True)
            else:
                asked.append(question)
        if asked:
            for question, line in zip(asked, self._answer_all(asked), strict=True):
                lines[question.data_idx] = line
        return [lines[question.data_idx] for question in questions]

    def _answer_all(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        try:
            return self._answer(questions)
        except Exception as error:  # whatever a processor or a model raises for one question
            if self.plan.noise_stream == "run":
                raise SearchRunError(
                    f"question {questions[0].data_idx} failed ({error!r:.500}), and with noise_stream='run' the noise "
                    "of all behind it depends on it; repair or leave out the question, or take noise_stream='item'"
                ) from error
            if len(questions) == 1:
                logger.warning("question %d failed: %r", questions[0].data_idx, error)
                return [self._failed(questions[0], repr(error), isinstance(error, RecordError))]
        return [line for question in questions for line in self._answer_all([question])]

    def _head(self, question: Question) -> dict[str, Any]:
        return {"data_idx": question.data_idx, "digest": question.digest}

    def _failed(self, question: Question, reason: str | None, its_own: bool) -> dict[str, Any]:
        """`its_own`: the data of the question are what is wrong, which says nothing about others."""
        line = {**self._head(question), "status": FAILED, "error": reason, "its_own": its_own}
        return {**line, "prompt": self._published_prompt(question), "stream": self.stream}

    def _published_prompt(self, question: Question) -> str:
        """What result files call `prompt` in reference mode; empty where there is no such text."""
        if self.plan.mode != REFERENCE:
            return ""
        text, has_image = question.question, question.has_image
        try:
            return published_prompt_field(self.processor, text, has_image, self.plan.prompt_index, self.chat_template)
        except ValueError:  # a tokenizer whose placeholder must be named, or a question that cannot be asked
            return ""

    def _answer(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        plan, start = self.plan, _now(self.model.device)
        records = [question.record for question in questions]
        images = [open_image(record["images"][0], record) if record["images"] else None for record in records]
        prompt = search_prompts(
            self.processor,
            [question.question for question in questions],
            images if any(image is not None for image in images) else None,
            num_thought_tokens=plan.settings.num_thought_tokens,
            mode=plan.mode,
            prompt_index=plan.prompt_index,
            placeholder=plan.placeholder,
            chat_template=self.chat_template,
            min_tokens=plan.min_tokens,
            max_tokens=plan.max_tokens,
        )
        first = _FirstStep()
        output = self._generate(prompt, [item_seed(plan.seed, each.data_idx) for each in questions], first)
        end = _now(self.model.device)
        written = output.sequences[:, first.prompt_length :].tolist()
        seconds = {"search": first.time - start, "decode": end - first.time, "batch": len(questions)}
        return [
            {
                **self._head(question),
                "status": DONE,
                "prompt": self._published_prompt(question) or prompt.text[row],
                "sys_prompt": "" if plan.mode == REFERENCE else SYSTEM_PROMPT,
                **self._written(written[row], prompt, row),
                **self._found(output.get("search"), prompt, row),
                "seconds": seconds,
                "stream": self.stream,
            }
            for row, question in enumerate(questions)
        ]

    def _generate(self, prompt: SearchPrompt, seeds: list[int], first: _FirstStep) -> Any:
        plan, inputs = self.plan, prompt.inputs.to(self.model.device)
        processors = LogitsProcessorList([first])
        options: dict[str, Any] = {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": plan.max_new_tokens,
            "return_dict_in_generate": True,
            "logits_processor": processors,
        }
        if plan.mode == REFERENCE and "qwen3" not in self.model.config.model_type:
            options["bad_words_ids"] = [self.tokenizer(BAD_WORDS, add_special_tokens=False)["input_ids"]]
        if plan.strategy != "search":
            if plan.strategy == "sample":
                processors.append(ItemSampling(seeds, plan.temperature, plan.top_p))
            return self.model.generate(**inputs, **options, **({"latent_strategy": "off"} if self.is_latent else {}))
        options |= {**plan.options, "mode": plan.mode, "thought_mask": prompt.thought_mask.to(self.model.device)}
        options["seed"] = seeds if plan.noise_stream == "item" else self.generator
        if self.is_latent:
            return self.model.generate(**inputs, latent_strategy="search", **options)
        return generate_with_search(self.model, **inputs, **options)

    def _written(self, ids: list[int], prompt: SearchPrompt, row: int) -> dict[str, Any]:
        """What was written up to the first end; padding of the batch is behind it."""
        ends = [place for place, token in enumerate(ids) if token in self.ends]
        ids = ids[: ends[0] + 1] if ends else ids
        budget, pad = self.plan.max_new_tokens, self.tokenizer.pad_token_id
        length = int(prompt.inputs["attention_mask"][row].sum())
        published = stop_reason(ids, budget, self.tokenizer.eos_token_id, pad, input_length=length, mode=REFERENCE)
        return {
            "output": self.tokenizer.decode(ids, skip_special_tokens=True),
            "num_tokens": len(ids),
            "stop": {STRICT: stop_reason(ids, budget, self.ends, pad), REFERENCE: published},
        }

    def _found(self, search: Any, prompt: SearchPrompt, row: int) -> dict[str, Any]:
        """What the search found; positions as in the prompt without its padding."""
        image_id = getattr(self.model.config, "image_token_id", None)
        images = 0 if image_id is None else int((prompt.inputs["input_ids"][row] == image_id).sum())
        if search is None:
            none = {"best_reward": None, "best_reward_step": None, "stopped": None, "steps": [], "patches": {}}
            return {"num_image_tokens": images, **none}
        padding = int((prompt.inputs["attention_mask"][row] == 0).sum())
        best = search.best_reward[row]
        return {
            "num_image_tokens": images,
            "best_reward": best if math.isfinite(best) else None,
            "best_reward_step": search.best_step[row],
            "stopped": search.stopped[row],
            "steps": [{name: getattr(step, name) for name in STEP_FIELDS} for step in search.steps[row]],
            "patches": {
                str(offset): [place - padding for place in places] for offset, places in search.patches[row].items()
            },
        }


__all__ = [
    "GIVE_UP",
    "NOISE_STREAMS",
    "PLAIN_TEMPLATE",
    "STRATEGIES",
    "ItemSampling",
    "SearchAnswers",
    "SearchPlan",
    "SearchRunError",
    "item_seed",
]
