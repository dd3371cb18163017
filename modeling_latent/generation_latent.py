"""`LatentGenerationMixin`: latents inside the stock decoding loops of transformers, by overriding hooks only
(contract C3).

Every row is a small state machine: outside a span it is stock text decoding; inside, the last logits processor forces
the latent token (or the end marker) and the next input is a vector instead of an embedding. The state of a call lives
in tensors keyed by position, so mixed batches, beams, caches, streamers and assisted decoding keep working.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    _prepare_attention_mask,
    _prepare_position_ids,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria
from transformers.utils import logging

from .latent_learned import edit_latents  # noqa: F401  (registers the strategy)
from .latent_masks import visible_attention
from .latent_staged import lay_out  # noqa: F401  (registers the strategy)
from .latent_state import LatentState
from .latent_strategies import (
    LATENT_OPTIONS,
    LATENT_STRATEGIES,
    LatentOptions,
    get_latent_strategy,
    resolve_latent_options,
    take_latent_options,
)
from .latent_trace import LatentTrace
from .search_strategy import expand_cache

logger = logging.get_logger(__name__)


@dataclass
class _LatentCall:
    """What one `generate` call shares between the hooks."""

    options: LatentOptions | None = None
    state: LatentState | None = None
    prompt_latents: tuple[torch.Tensor, torch.Tensor | None] | None = None
    prompt_ids: torch.LongTensor | None = None
    hidden_slots: torch.BoolTensor | None = None  # positions of the prompt that count as padding
    keep_trace: bool = False
    contexts: ExitStack = field(default_factory=ExitStack)  # open during the call


_CALL: ContextVar[_LatentCall | None] = ContextVar("latent_call", default=None)


def _state() -> LatentState | None:
    call = _CALL.get()
    return None if call is None else call.state


@contextmanager
def _latent_call() -> Iterator[_LatentCall]:
    call = _LatentCall()
    token = _CALL.set(call)
    try:
        with call.contexts:
            yield call
    finally:
        _CALL.reset(token)


class LatentLogitsProcessor(LogitsProcessor):
    """Appended last: forces slots, end markers and answer ids row by row, and leaves text rows to the sampler."""

    def __init__(self, state: LatentState) -> None:
        self.state = state

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.state.decide(input_ids, scores)


class LatentBanProcessor(LogitsProcessor):
    """Put before top-k, top-p and their like, which else might keep nothing but an id that text may not write."""

    def __init__(self, state: LatentState) -> None:
        self.state = state

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.state.suppress(scores)


class LatentLogitsProcessorList(LogitsProcessorList):
    """Stock list that looks once, not at every step, for processors that take more than ids and scores."""

    def __init__(self, processors: LogitsProcessorList) -> None:
        super().__init__(processors)
        self._plain: list[tuple[Callable, bool]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if [processor for processor, _ in self._plain] != self:
            self._plain = [(each, len(inspect.signature(each.__call__).parameters) <= 2) for each in self]
        if not all(plain for _, plain in self._plain):
            return super().__call__(input_ids, scores, **kwargs)
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class LatentStoppingCriteriaList(StoppingCriteriaList):
    """Stock criteria that tell the state which rows ended; an id written by a slot need not stop a row.

    With `latent_ids="readable"` a slot may write an end-of-turn id, so criteria that read ids are deaf to slots. With
    `latent_budget="reference"` an open span overrides every criterion (published LASER loop).
    """

    def __init__(self, criteria: StoppingCriteriaList, state: LatentState) -> None:
        super().__init__(criteria)
        self.state = state
        values = state.options.values
        self.overrun, self.readable = values.latent_budget == "reference", values.latent_ids == "readable"
        self.deaf_once = not values.stop_on_first_token  # to the ids of the first step

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        special = self.overrun or self.readable or self.deaf_once
        stopped = (self._stopped if special else super().__call__)(input_ids, scores, **kwargs)
        self.state.advance(input_ids, stopped)
        return stopped

    def _stopped(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        slots = self.state.is_slot(input_ids.shape[1] - 1)
        if self.deaf_once and input_ids.shape[1] == self.state.prompt_length + 1:
            slots = torch.ones_like(slots)
        stopped = torch.zeros_like(slots)
        for criterion in self:
            reads_ids = not isinstance(criterion, (MaxLengthCriteria, MaxTimeCriteria))
            stops = torch.as_tensor(criterion(input_ids, scores, **kwargs), device=slots.device).expand_as(slots)
            stopped = stopped | (stops & ~slots if self.overrun or reads_ids else stops)
        return stopped


class LatentCandidateGenerator(CandidateGenerator):
    """Wraps the candidate generator of assisted decoding: no candidate may lie inside a span.

    Inside a span, and where an id is forced, no candidate is proposed; elsewhere candidates are cut after the first
    start marker and before the first latent id. The wrapped generator reads a slot by the id that it would have said.
    """

    def __init__(self, inner: CandidateGenerator, state: LatentState) -> None:
        self.inner = inner
        self.state = state
        self.drafted: torch.LongTensor | None = None  # what the wrapped generator has seen and proposed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def requires_model_outputs(self) -> bool:
        return self.inner.requires_model_outputs

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> tuple:
        self.state.forget(input_ids.shape[1])
        if self.state.is_forced(input_ids):
            return input_ids, None
        readable = self.state.readable(input_ids)
        self._catch_up(readable)
        candidates, logits = self.inner.get_candidates(readable, **kwargs)
        self.drafted = candidates
        new = candidates[:, input_ids.shape[1] :]
        keep = self.state.free_prefix(new[0])
        candidates = torch.cat([input_ids, new[:, :keep].to(input_ids)], dim=1)
        return candidates, None if logits is None else logits[:, :keep]

    def _catch_up(self, readable: torch.LongTensor) -> None:
        """Bring an assistant model to the present text: it was not asked while a span was written.

        The stock generator expects to be called at every step. So on its first call the mask and the positions of the
        prompt are extended here, and later its cache is cut where its drafts and the text part.
        """
        kwargs = getattr(self.inner, "assistant_kwargs", None)
        if kwargs is None:
            return
        cache, length = kwargs.get("past_key_values"), readable.shape[1]
        if cache is None:
            kwargs = _prepare_attention_mask(kwargs, length, is_encoder_decoder=False)
            self.inner.assistant_kwargs = _prepare_position_ids(kwargs, length, is_encoder_decoder=False)
        elif self.drafted is not None:
            shared = min(length, self.drafted.shape[1])
            same = (self.drafted[0, :shared].to(readable) == readable[0, :shared]).cumprod(0).sum()
            surplus = cache.get_seq_length() - int(same)
            if surplus > 0:
                cache.crop(-surplus)

    def update_candidate_strategy(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, num_matches: int
    ) -> None:
        self.inner.update_candidate_strategy(input_ids, scores, num_matches)


class LatentGenerationMixin(GenerationMixin):
    """Adds `latent_strategy` and its options to `generate` (see `latent_strategies.py` for the table).

    With `return_dict_in_generate=True` the output has `latent_trace`, a [`LatentTrace`].

    Raises (from `generate`):
        ValueError: unknown strategy or value, an option that the strategy does not read, a model without latent
            tokens, or a combination that cannot work; the message names option, value and remedy.
    """

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, plus the latent options."""
        if inputs is not None and inputs.dim() == 2 and not inputs.is_floating_point() and "input_ids" not in kwargs:
            inputs, kwargs["input_ids"] = None, inputs
        with _latent_call() as call:
            output = super().generate(inputs, *args, **kwargs)
            if call.keep_trace and call.state is not None and not torch.is_tensor(output):
                output["latent_trace"] = call.state.build_trace(output)
            if call.options is not None and not torch.is_tensor(output):
                for name, value in call.options.outputs.items():
                    output[name] = value
        return output

    @classmethod
    def is_remote_code(cls) -> bool:
        """As the stock method, but false during `generate`: the stock loop would read the signature of `forward` at
        every step, looking for an argument (`cache_position`) that no latent model has."""
        return _CALL.get() is None and super().is_remote_code()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the runner of continuous batching keeps only logits and cannot feed a vector back."""
        raise ValueError(
            "continuous batching (generate_batch, cache_implementation='paged') cannot feed latents: its runner "
            "builds ids only. Call generate() with a padded batch, or load the stock class to decode without latents"
        )

    def replay(self, trace: LatentTrace, **inputs: Any) -> Any:
        """One teacher-forced forward over the sequences of a trace; its logits equal those of decoding.

        Args:
            trace: from `generate`, from [`LatentTrace.load`], or edited with `replace_slots`.
            inputs: image inputs of the same prompts (`pixel_values`, `image_grid_thw`, ...), one row per trace row.

        Returns:
            Output of `forward` with logits `(B, T, V)`; `logits[:, p - 1]` chose position `p`.

        Raises:
            ValueError: when the inputs have another number of rows than the trace.
        """
        batch, length = trace.sequences.shape
        inputs = {"attention_mask": trace.attention_mask, **inputs}
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            value = inputs.get(name)
            if value is not None:
                if value.shape[0] != batch:
                    raise ValueError(f"{name} has {value.shape[0]} rows, the trace {batch}; repeat the inputs per row")
                inputs[name] = torch.nn.functional.pad(value, (0, length - value.shape[1]), value=fill)
        strategy, rules = LATENT_STRATEGIES.get(trace.info.get("strategy")), []
        if strategy is not None and strategy.visibility is not None:
            rules = strategy.visibility(trace.info["options"], trace.latent_mask)
        with visible_attention(self, rules):
            return self(
                input_ids=trace.sequences,
                position_ids=trace.position_ids,
                latent_embeds=trace.latent_embeds,
                latent_mask=trace.latent_mask,
                use_cache=False,
                **inputs,
            )

    # --- hooks of the stock loops, in the order in which `generate` calls them ---

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any) -> tuple:
        given, notes = take_latent_options(kwargs)
        for note in notes:
            logger.info(note)
        name = kwargs.pop("latent_strategy", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        saved, method = vars(generation_config), self.config.latent_generation or {}
        name = name or saved.get("latent_strategy") or method.get("latent_strategy") or "off"
        options = resolve_latent_options(self.config.strategy_of_method(name), given, [saved, method])
        if name != options.strategy.name:
            logger.info(f"latent_strategy={name!r} is called {options.strategy.name!r} here")
        if options.strategy.uses_latents:
            if options.strategy.tokens is not None:
                self.config.require_latent_tokens(options.strategy.tokens)
            self._refuse_latent_combinations(options, generation_config)
        if options.strategy.layout is not None:
            own_cache = model_kwargs.get("past_key_values")
            model_kwargs = options.strategy.layout(self, model_kwargs, options)
            cache = model_kwargs.get("past_key_values")
            if cache is not None and cache is not own_cache:  # `generate` repeats the ids, not a cache
                repeat = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
                expand_cache(cache, repeat)
        call = _CALL.get()
        if call is not None:
            call.options = options
            call.keep_trace = bool(generation_config.return_dict_in_generate)
            call.prompt_ids = model_kwargs.get("input_ids")
            if model_kwargs.get("latent_embeds") is not None:
                call.prompt_latents = self._take_prompt_latents(model_kwargs)
            if options.strategy.visibility is not None:
                latent_mask = None if call.prompt_latents is None else call.prompt_latents[1]
                rules = options.strategy.visibility(vars(options.values), latent_mask)
                call.contexts.enter_context(visible_attention(self, rules))
                if latent_mask is not None and options.values.mask_latents == "padding":
                    call.hidden_slots = latent_mask
        return generation_config, model_kwargs

    def _take_prompt_latents(self, model_kwargs: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`latent_embeds` and `latent_mask` of the prompt, out of the arguments of the forward."""
        embeds, mask, ids = (
            model_kwargs.pop("latent_embeds"),
            model_kwargs.pop("latent_mask", None),
            model_kwargs.get("input_ids"),
        )
        if mask is None:
            self.config.require_latent_tokens("slots")
        for name, value in (("latent_embeds", embeds), ("latent_mask", mask)):
            if value is not None and ids is not None and value.shape[:2] != ids.shape:
                raise ValueError(
                    f"{name} {tuple(value.shape)} must have the rows and the length of input_ids {tuple(ids.shape)}; "
                    "pad them alike"
                )
        return embeds, mask

    def _refuse_latent_combinations(self, options: LatentOptions, config: GenerationConfig) -> None:
        values, beams = options.values, (config.num_beams or 1) > 1
        if options.strategy.refuse is not None:
            options.strategy.refuse(config)
        if self.training and self.is_activation_checkpointing:
            raise ValueError(
                "the model is in train mode with activation checkpointing, which drops the cache in every layer and "
                "would decode another text; call model.eval() first"
            )
        if beams and config.use_cache is False:
            raise ValueError("beam search over latents needs the cache; drop use_cache=False or use num_beams=1")
        if beams:
            self._refuse_special_options(options, "num_beams")
        unlimited = config.cache_implementation in (None, "dynamic", "offloaded", "quantized")
        if values.latent_budget == "reference" and not unlimited:
            raise ValueError(
                f"latent_budget='reference' may run past max_new_tokens, which cache_implementation="
                f"{config.cache_implementation!r} has no room for; use the default cache or latent_budget='strict'"
            )
        if config.use_mtp or config.assistant_early_exit is not None:
            raise ValueError(
                "use_mtp and assistant_early_exit cannot draft over latents; use prompt lookup or an assistant"
            )

    @staticmethod
    def _refuse_special_options(options: LatentOptions, mode: str) -> None:
        special = (("latent_ids", "readable"), ("latent_budget", "reference"), ("stop_on_first_token", False))
        for name, value in special:
            if getattr(options.values, name) == value:
                raise ValueError(
                    f"{name}={value!r} works with greedy decoding and sampling only; drop {mode}, or {name}={value!r}"
                )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, mode: Any, batch_size: int, max_length: int
    ) -> Any:
        call = _CALL.get()
        has_tokens = self.config.latent_token_id is not None or self.config.latent_learned_token_ids
        known = has_tokens or (call is not None and call.prompt_latents is not None)
        if call is not None and call.options is not None and known:
            if mode == GenerationMode.ASSISTED_GENERATION:
                self._refuse_special_options(call.options, "assistant_model and prompt_lookup_num_tokens")
                if call.options.strategy.prefill is not None:
                    raise ValueError(
                        f"latent_strategy={call.options.strategy.name!r} has a prefill of its own, which assisted "
                        "decoding skips; drop assistant_model and prompt_lookup_num_tokens"
                    )
            call.state = LatentState(
                call.options,
                self.config,
                num_prompts=batch_size,
                dtype=self.dtype,
                use_cache=generation_config.use_cache is not False,
                chunked=generation_config.prefill_chunk_size is not None,
                sample=bool(generation_config.do_sample) and (generation_config.num_beams or 1) == 1,
                keep_trace=call.keep_trace,
                prompt_latents=call.prompt_latents,
                attention_mask=model_kwargs.get("attention_mask"),
            )
            if call.options.strategy.begin is not None:
                call.options.strategy.begin(self, call.state, call.prompt_ids)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_length)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        positions, call = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs), _CALL.get()
        if call is None or call.hidden_slots is None:
            return positions
        return positions.masked_fill(call.hidden_slots.to(positions.device), 1)  # as the published code's masked slots

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        state = _state()
        if state is None:
            return super()._get_logits_processor(*args, **kwargs)
        state.prompt_length = kwargs["input_ids_seq_length"]
        if state.prompt_length == 0 and state.strategy.uses_latents:
            raise ValueError(
                f"latent_strategy={state.strategy.name!r} needs input_ids, in which the latents are recorded; pass "
                "the ids too (vectors of your own go into latent_embeds), or latent_strategy='off'"
            )
        custom = [*(kwargs.get("logits_processor") or []), LatentBanProcessor(state)]  # these run before the warpers
        kwargs["logits_processor"] = LogitsProcessorList(custom)
        processors = super()._get_logits_processor(*args, **kwargs)
        if state.strategy.processors is not None:
            state.strategy.processors(processors, state.options, state.prompt_length)
        return LatentLogitsProcessorList([*processors, LatentLogitsProcessor(state)])

    def _get_stopping_criteria(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        criteria, state = super()._get_stopping_criteria(generation_config, *args, **kwargs), _state()
        if state is None or not state.strategy.uses_latents or (generation_config.num_beams or 1) > 1:
            return criteria  # beams: the criteria see candidates, not the running rows
        return LatentStoppingCriteriaList(criteria, state)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        state = _state()
        if state is None:
            return super()._get_candidate_generator(*args, **kwargs)
        # Ours decide on the logits of this model: a generator that called them on drafts would change the state.
        ours = (LatentBanProcessor, LatentLogitsProcessor)
        others = [processor for processor in kwargs["logits_processor"] if not isinstance(processor, ours)]
        inner = super()._get_candidate_generator(*args, **{**kwargs, "logits_processor": LogitsProcessorList(others)})
        assistant_config = getattr(inner, "generation_config", None)
        if assistant_config is not None:
            assistant_config.latent_strategy = "off"
        return LatentCandidateGenerator(inner, state)

    def _prefill(
        self, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict, **kw: Any
    ) -> Any:
        call = _CALL.get()
        stock: Callable = super()._prefill
        if call is not None and call.options is not None and call.options.strategy.prefill is not None:
            return call.options.strategy.prefill(
                self, stock, input_ids, generation_config, model_kwargs, call.state, **kw
            )
        return stock(input_ids, generation_config, model_kwargs, **kw)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        first, call = bool(kwargs.get("is_first_iteration")), _CALL.get()
        positions = kwargs.get("position_ids")
        if call is not None and call.hidden_slots is not None and positions is not None:
            if positions.shape[-1] > call.hidden_slots.shape[1]:  # drafts of assisted decoding stand behind the prompt
                kwargs["position_ids"] = positions_behind(positions, call.hidden_slots)
        if first and call is not None and call.state is not None and call.state.cached:
            kwargs["next_sequence_length"] = input_ids.shape[1] - call.state.cached
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if kwargs.get("latent_plan") is not None:  # it makes the masks of its segments itself
            model_inputs["attention_mask"] = kwargs.get("attention_mask")
        state = _state()
        if state is not None:
            if first and state.kept_of_prompt:
                model_inputs["logits_to_keep"] = state.kept_of_prompt
            embeds = model_inputs.get("inputs_embeds")
            new = (model_inputs["input_ids"] if embeds is None else embeds).shape[1]
            model_inputs.update(state.next_inputs(input_ids, new, first))
        return model_inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        call, state = _CALL.get(), _state()
        if call is not None and call.hidden_slots is not None and model_kwargs.get("position_ids") is not None:
            model_kwargs["position_ids"] = positions_behind(model_kwargs["position_ids"], call.hidden_slots)
        if state is not None:
            state.observe(outputs)
            state.position_ids = model_kwargs.get("position_ids")
        return model_kwargs

    @wraps(GenerationMixin._assisted_decoding)
    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Stock assisted decoding; its processors run before the update hook, so `forward` is observed instead."""
        state = _state()
        if state is None:
            return super()._assisted_decoding(*args, **kwargs)
        cache = kwargs.get("past_key_values")
        state.cached = 0 if cache is None else cache.get_seq_length()
        handle = self.register_forward_hook(lambda module, inputs, output: state.observe(output))
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            handle.remove()

    def _reorder_cache(self, past_key_values: Any, beam_idx: torch.LongTensor) -> Any:
        past_key_values.reorder_cache(beam_idx)
        state = _state()
        if state is not None:
            state.reorder(beam_idx)
        return past_key_values


def positions_behind(position_ids: torch.LongTensor, hidden: torch.BoolTensor) -> torch.LongTensor:
    """Positions in which those behind a prompt follow its largest one; the stock loop goes on from the last slot of
    the prompt, which has a placeholder where it counts as padding.

    Args:
        position_ids: `(rows, length)` or `(channels, rows, length)`, of the prompt and of what was decoded so far.
        hidden: `(prompts, prompt length)` the slots that count as padding.
    """
    prompt = hidden.shape[1]
    hidden = hidden.repeat_interleave(position_ids.shape[-2] // hidden.shape[0], dim=0).to(position_ids.device)
    largest = position_ids[..., :prompt].masked_fill(hidden, -1).amax(dim=-1, keepdim=True)
    if position_ids.dim() == 3:  # rotary channels share the position of text; a fourth one counts the tokens
        rotary = largest[-3:].amax(dim=0, keepdim=True).expand_as(largest[-3:])
        largest = torch.cat([largest[:-3], rotary])
    new = torch.arange(1, position_ids.shape[-1] - prompt + 1, device=position_ids.device)
    return torch.cat([position_ids[..., :prompt], largest + new], dim=-1)


def saved_generation_config(config: GenerationConfig, **latent_options: Any) -> GenerationConfig:
    """Generation config that keeps its latent options in `generation_config.json` (custom entries of a config derived
    from a model config are dropped on load, so that mark is cleared).

    Raises:
        ValueError: an unknown strategy or option, or a value out of range.
    """
    name = latent_options.get("latent_strategy")
    if name is not None:
        latent_options["latent_strategy"] = get_latent_strategy(name).name
    for key, value in latent_options.items():
        if key != "latent_strategy":
            if key not in LATENT_OPTIONS or not LATENT_OPTIONS[key].saved:
                raise ValueError(f"{key!r} is no option that can be saved; known: {sorted(LATENT_OPTIONS)}")
            LATENT_OPTIONS[key].check(key, value)
    return GenerationConfig(**{**config.to_dict(), "_from_model_config": False, **latent_options})


__all__ = ["LatentGenerationMixin", "LatentTrace", "saved_generation_config"]
