"""A latent model as a model of lmms-eval (0.7): batched generation, log-likelihoods, several rounds.

Importing this file needs lmms-eval (`lmms_eval_plugin.py`). Options of decoding are model arguments:
`--model_args pretrained=org/lvr-7b,latent_strategy=fixed,num_latent_steps=8,force_span=True`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_latent import LATENT_OPTIONS, load_latent_model
from trainers.data.records import Record, make_record

from .benchmarks.benchmark import AskProtocol, GoldReply, Scored
from .causal.answering import forced_reply
from .causal.cells import LatentIds, clean_row
from .causal.contexts import clean_items
from .causal.shared_prompts import SharedPrompts
from .lmms_eval_plugin import host_module
from .runner import generate_batch

_HOST_ARGUMENTS = ("max_batch_size", "device_map", "use_cache")  # that the host passes to every model
_GENERATION = ("temperature", "top_p", "top_k", "num_beams", "do_sample", "repetition_penalty")


class LatentVLM(host_module("api.model").lmms):
    """See the file.

    Args:
        pretrained: folder or Hub id of a latent model, of an adapter, or of a stock model with `method`.
        method: that a stock model is made latent for.
        revision: branch, tag or commit.
        device: where it runs; default: the process's own GPU, else the CPU.
        dtype: of the weights, e.g. `"bfloat16"`; default: as saved.
        batch_size: prompts per call of `generate`.
        max_new_tokens: budget where a task gives none, latents included.
        trust_remote_code: for folders with code of their own.
        options: `latent_strategy` and its options.

    Raises:
        ValueError: an argument that is none of these; lists the options.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 512,
        trust_remote_code: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = {name: value for name, value in options.items() if name not in _HOST_ARGUMENTS}
        unknown = [name for name in self.options if name not in ("latent_strategy", *LATENT_OPTIONS)]
        if unknown:
            raise ValueError(
                f"model_args {unknown} are unknown; known are pretrained, method, revision, device, dtype, "
                f"batch_size, max_new_tokens, latent_strategy and {sorted(LATENT_OPTIONS)}"
            )
        self._rank, self._world_size, own = _process()
        kwargs = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        self._model, self.processor = load_latent_model(
            pretrained,
            method=method,
            adapter="merge",
            revision=revision,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
        self._device = torch.device(own if self._world_size > 1 or device in (None, "cuda") else device)
        self._model.to(self._device).eval()
        self.batch_size_per_gpu, self.max_new_tokens = int(batch_size), max_new_tokens

    @property
    def model(self) -> Any:
        """The latent model."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.processor.tokenizer

    # What lmms-eval asks for

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Replies, latents hidden, each cut at the first of the task's stop strings; in the order of the requests."""
        asked = [self._asked(*request.args) for request in requests]
        replies: list[str] = [""] * len(asked)
        order = sorted(range(len(asked)), key=lambda place: (asked[place][2], len(asked[place][0])))
        with tqdm(total=len(asked), disable=self._rank != 0, desc="latent") as bar:
            for part in self._batches(order, [settings for _, _, settings in asked]):
                texts = self._generate([asked[place][:2] for place in part], requests[part[0]].args[2])
                for place, text in zip(part, texts, strict=True):
                    replies[place] = _cut(text, requests[place].args[2].get("until"))
                bar.update(len(part))
        return replies

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each request the log-probability in nats of its continuation behind the model's own latents, and whether
        that is the greedy reply."""
        return [self._likelihood(*request.args) for request in requests]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The replies of all rounds of each request; the task's `doc_to_text` says what is asked next and when to
        stop."""
        return [self._rounds(*request.args) for request in requests]

    # One request

    def _asked(
        self, context: str, doc_to_messages: Any, settings: dict, doc_id: int, task: str, split: str
    ) -> tuple[str, list[Any], str]:
        """Prompt, images and settings of a request."""
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        chat = host_module("protocol").ChatMessages(messages=messages)
        images, videos, audios = chat.extract_media()
        if videos or audios:
            raise ValueError(f"item {doc_id} of {task} has a video or audio; latent models read images and text")
        prompt = self.processor.apply_chat_template(chat.to_hf_messages(), tokenize=False, add_generation_prompt=True)
        return prompt, images, repr(sorted(settings.items(), key=str))

    def _batches(self, order: Sequence[int], settings: Sequence[str]) -> list[list[int]]:
        """Places in batches of one setting."""
        batches: list[list[int]] = []
        for place in order:
            last = batches[-1] if batches else None
            if last is None or len(last) == self.batch_size_per_gpu or settings[last[0]] != settings[place]:
                batches.append([])
            batches[-1].append(place)
        return batches

    def _generate(self, asked: Sequence[tuple[str, list[Any]]], settings: dict) -> list[str]:
        records = [make_record(str(place), prompt, "", images) for place, (prompt, images) in enumerate(asked)]
        prompts = [prompt for prompt, _ in asked]
        batch = generate_batch(self._model, self.processor, records, prompts, self._options(settings), {})
        return [prediction.text for prediction in batch.predictions]

    def _options(self, settings: dict) -> dict[str, Any]:
        """Options of `generate`: those of the task that it knows, greedy at temperature 0."""
        known = {name: settings[name] for name in _GENERATION if settings.get(name) is not None}
        if not known.get("temperature"):
            known = {name: value for name, value in known.items() if name not in ("temperature", "top_p", "top_k")}
        sample = bool(known.get("temperature")) and known.pop("do_sample", True)
        known.pop("do_sample", None)
        budget = settings.get("max_new_tokens") or self.max_new_tokens
        return {"max_new_tokens": budget, "do_sample": sample, **known, **self.options}

    @torch.no_grad()
    def _likelihood(
        self, context: str, doc_to_target: Any, doc_to_visual: Any, doc_id: int, task: str, split: str
    ) -> tuple[float, bool]:
        doc = self.task_dict[task][split][doc_id]
        target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(doc)
        record = make_record(str(doc_id), context, target, doc_to_visual(doc) or [])
        reply = forced_reply(self.tokenizer, GoldReply("", target))
        if reply is None:
            raise ValueError(f"item {doc_id} of {task} has an empty continuation; nothing can be scored")
        protocol = AskProtocol("lmms_eval", "", self._prompt, lambda *_: Scored(False, None), self.max_new_tokens)
        (item,) = clean_items(self._model, self.processor, [record], protocol, **self.options)
        pictures = {"images": [item.record["images"]]} if item.record["images"] else {}
        inputs = self.processor(text=[item.prompt], **pictures, return_tensors="pt").to(self._device)
        ids = LatentIds.of(self._model.config)
        shared = SharedPrompts(self._model, inputs, [item.prefix])
        with shared.behind([clean_row(item, ids)]) as fed:
            (total,), _ = shared.log_probs(fed, [reply.ids], [(reply.start, reply.stop)])
            banned = [ids.slot, ids.patch, ids.start, *ids.learned]
            (greedy,) = shared.decode(fed, [len(reply.ids)], set(), banned)
        return total, tuple(greedy) == reply.ids

    def _prompt(self, processor: Any, record: Record) -> str:
        content = [{"type": "image"} for _ in record["images"]] + [{"type": "text", "text": record["question"]}]
        messages = [{"role": "user", "content": content}]
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _rounds(
        self, context: str, settings: dict, doc_to_visual: Any, doc_to_text: Any, doc_id: int, task: str, split: str
    ) -> list[str]:
        doc, replies, info, visuals, number = self.task_dict[task][split][doc_id], [], None, None, 0
        while True:
            if number:
                visuals, context, finished, replies, info = doc_to_text(
                    doc, previous_output=replies, round_idx=number, previous_round_info=info
                )
                if finished:
                    return list(replies)
            images = (doc_to_visual(doc) if number == 0 else visuals) or []
            record = make_record(str(doc_id), context, "", images)
            (text,) = self._generate([(self._prompt(self.processor, record), list(images))], settings)
            replies, number = [*replies, _cut(text, settings.get("until"))], number + 1


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to the first stop string."""
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()


def _process() -> tuple[int, int, str]:
    """Rank, number of processes, device of this one."""
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes, str(state.device)


__all__ = ["LatentVLM"]
