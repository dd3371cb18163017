"""`LatentGRPOConfig`: options of GRPO_latent, the second stage of "Latent Visual Reasoning" (LVR, arXiv 2509.24251).

Paper, published code and the choice here, option by option: `hub_configs/methods/lvr.md`.
"""

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from modeling_latent.latent_strategies import LATENT_OPTIONS

from .config_parts import LatentRunOptions, is_number
from .data.boxes import checked_option
from .data.dynamic_batching import is_count
from .losses.grpo_latent import GAUSSIAN_REDUCTIONS
from .rewards import system_prompt

LATENT_POLICIES = ("none", "gaussian")
LOSS_TYPES = ("bnpo", "grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")

_PAGED = "continuous batching keeps logits alone and cannot feed a hidden state back; leave it out"
# Options that cannot work with latents: what they would need, and the way out.
_REFUSED = {
    "use_vllm": "vLLM returns ids alone and cannot feed a hidden state back; leave it out, the model's generate() "
    "makes the rollouts",
    "use_transformers_paged": _PAGED,
    "use_transformers_continuous_batching": _PAGED,
    "use_liger_kernel": "replaces the forward that the replay wraps, and layers that the latent classes build "
    "themselves; leave it out",
}
# Entries of `generation_kwargs` that would make other rows or other probabilities than those that are trained.
_REFUSED_GENERATION = {
    "temperature": "the log-probabilities are divided by the trainer's; set temperature",
    "num_beams": "GRPO samples; leave it out",
    "num_return_sequences": "a group is num_generations completions; set num_generations",
    "do_sample": "GRPO samples; leave it out",
    "return_dict_in_generate": "the trainer sets it; leave it out",
    "num_assistant_tokens": "assisted decoding takes one row at a time; leave it out",
    "prompt_lookup_num_tokens": "assisted decoding takes one row at a time; leave it out",
}


@dataclass
class LatentGRPOConfig(LatentRunOptions, GRPOConfig):
    """Options of [`LatentGRPOTrainer`], on top of `trl.GRPOConfig`.

    The defaults are those of the published code, which differ from TRL's: temperature 0.9, `top_k` 50, 256 tokens,
    `beta` 0.04, `loss_type` `"bnpo"`, learning rate 5e-6, a KL without correction of its bias. Repetition penalty,
    `top_k`, `top_p`, `min_p` and suppressed tokens change what is sampled and not the log-probabilities that are
    trained, as in TRL. `disable_dropout` is on, since a rollout knows no dropout.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "latent_generation_kwargs"]

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    temperature: float = field(default=0.9, metadata={"help": "Temperature of sampling and of the log-probabilities."})
    top_k: int = field(default=50, metadata={"help": "Tokens to sample from; 0 is all."})
    max_completion_length: int | None = field(
        default=256, metadata={"help": "Most positions of a completion, latents included."}
    )
    beta: float = field(default=0.04, metadata={"help": "KL coefficient. 0 needs no reference."})
    loss_type: str = field(default="bnpo", metadata={"help": f"One of {', '.join(LOSS_TYPES)}; see trl.GRPOConfig."})
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Multiply the KL by the ratio (TRL's default); not in the published loss."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "No dropout, so that a replay gives the log-probabilities of the rollout."}
    )
    latent_strategy: str | None = field(
        default=None,
        metadata={"help": "Decoding strategy of the rollouts; default: the model's own (LVR: fixed). off: none."},
    )
    num_latent_steps: int | None = field(
        default=None, metadata={"help": "Latents of every span (strategy fixed); default: the model's own."}
    )
    max_latent_steps: int | None = field(
        default=None, metadata={"help": "Most latents of a span (dynamic, end_vector, mode_switch)."}
    )
    latent_noise: float | None = field(
        default=None, metadata={"help": "Relative noise on every latent of a rollout: r * |h| in a random direction."}
    )
    latent_generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further latent options of generate, e.g. {'force_span': true}."}
    )
    decoding_strategy: str | None = field(
        default=None, metadata={"help": "Published name of latent_strategy: steps (fixed) or latent (end_vector)."}
    )
    lvr_steps: int | None = field(default=None, metadata={"help": "Published name of num_latent_steps."})
    latent_replay: bool = field(
        default=True,
        metadata={
            "help": "Feed the recorded latents when log-probabilities are computed. false, a diagnostic, feeds the "
            "embedding of the placeholder: the ratio to the rollout is then not 1."
        },
    )
    train_start_token: bool = field(
        default=True, metadata={"help": "Train the token that opens a span; the published code leaves it out."}
    )
    latent_policy: str = field(
        default="none",
        metadata={"help": "'none': latents are context; 'gaussian': they get credit as Gaussian actions (VLPO)."},
    )
    latent_policy_sigma: float | None = field(
        default=None,
        metadata={"help": "Deviation of the Gaussian policy in each dimension, in the units of the latents."},
    )
    latent_policy_reduction: str = field(
        default="mean", metadata={"help": "Log-likelihood of a latent: 'mean' or 'sum' over its dimensions."}
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System turn of records: a name of trainers.rewards (default, answer, none) or its text."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions by name, 'module:function', or modules and files for all of theirs."},
    )
    reward_module: str | None = field(
        default=None, metadata={"help": "Module or file, all of whose functions named *_reward are rewards."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "A longer prompt, in tokens with those of its images, is refused; never trimmed."},
    )

    def __post_init__(self) -> None:
        for name, why in _REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: {why}")
        self.check_run_options()
        super().__post_init__()
        self._take_published_names()
        self._check_losses()
        self._check_latent_options()
        self._check_others()

    def _take_published_names(self) -> None:
        for published, name in (("decoding_strategy", "latent_strategy"), ("lvr_steps", "num_latent_steps")):
            theirs, ours = getattr(self, published), getattr(self, name)
            if theirs is not None and ours not in (None, theirs):
                raise ValueError(f"{published}={theirs!r} is the published name of {name}={ours!r}; give one of them")
            if theirs is not None:
                setattr(self, name, theirs)

    def _check_losses(self) -> None:
        checked_option("loss_type", self.loss_type, LOSS_TYPES)
        checked_option("latent_policy", self.latent_policy, LATENT_POLICIES)
        checked_option("latent_policy_reduction", self.latent_policy_reduction, GAUSSIAN_REDUCTIONS)
        needed = {"luspo": "sequence", "vespo": "token"}.get(self.loss_type, self.importance_sampling_level)
        if self.importance_sampling_level != needed:
            raise ValueError(
                f"loss_type={self.loss_type!r} with importance_sampling_level={self.importance_sampling_level!r} is "
                f"not the loss of its paper; set importance_sampling_level: {needed}"
            )
        if self.latent_policy == "none":
            if self.latent_policy_sigma is not None:
                raise ValueError(
                    f"latent_policy_sigma={self.latent_policy_sigma!r} is read with latent_policy: gaussian only; set "
                    "that, or leave it out"
                )
            return
        if not (is_number(self.latent_policy_sigma, 0, float("inf")) and self.latent_policy_sigma > 0):
            raise ValueError(
                f"latent_policy_sigma={self.latent_policy_sigma!r}: latent_policy='gaussian' needs a number above 0, "
                "in the units of the latents (with latent_noise r: r times the root mean square of a latent)"
            )
        if not self.latent_replay:
            raise ValueError("latent_replay=False: latent_policy='gaussian' scores the recorded latents; leave it out")
        if self.top_entropy_quantile < 1 or self.entropy_coef or self.use_adaptive_entropy:
            raise ValueError(
                "top_entropy_quantile, entropy_coef and use_adaptive_entropy read the entropy of tokens, and a latent "
                "of latent_policy='gaussian' has none; leave them out"
            )

    def latent_options(self) -> dict[str, Any]:
        """Latent options of `generate` for the rollouts, without `latent_strategy`."""
        named = {name: getattr(self, name) for name in ("num_latent_steps", "max_latent_steps", "latent_noise")}
        given = {**(self.latent_generation_kwargs or {})}
        return {**given, **{name: value for name, value in named.items() if value is not None}}

    def _check_latent_options(self) -> None:
        further = self.latent_generation_kwargs or {}
        twice = [name for name in further if getattr(self, name, None) is not None]
        if twice:
            raise ValueError(f"{twice[0]} is given twice, by itself and in latent_generation_kwargs; give it once")
        for name, value in self.latent_options().items():
            if name not in LATENT_OPTIONS:
                raise ValueError(f"latent_generation_kwargs[{name!r}] is unknown; known: {sorted(LATENT_OPTIONS)}")
            LATENT_OPTIONS[name].check(name, value)
            if LATENT_OPTIONS[name].per_row and not isinstance(value, int):
                raise ValueError(f"{name}={value!r}: completions of a group are made alike; give one number")
        if further.get("latent_ids") == "readable":
            raise ValueError(
                "latent_ids='readable' writes ids that were never fed, and an EOS among them would end a completion; "
                "leave it out: log_completions shows what the latents would have said"
            )
        for name, value in (self.generation_kwargs or {}).items():
            if name in LATENT_OPTIONS or name == "latent_strategy":
                raise ValueError(f"generation_kwargs[{name!r}]={value!r}: set {name}, or latent_generation_kwargs")
            if name in _REFUSED_GENERATION:
                raise ValueError(f"generation_kwargs[{name!r}]={value!r}: {_REFUSED_GENERATION[name]}")

    def _check_others(self) -> None:
        if self.system_prompt is not None:
            system_prompt(self.system_prompt)
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        for name in ("latent_replay", "train_start_token"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.max_prompt_length is not None and not is_count(self.max_prompt_length):
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length!r} must be an integer of at least 1, or None: no limit"
            )

    def reward_sources(self) -> list[str]:
        """What the user named as rewards: see `reward_loading.load_rewards`."""
        return [*([self.reward_module] if self.reward_module else []), *(self.reward_funcs or [])]


__all__ = ["LATENT_POLICIES", "LOSS_TYPES", "LatentGRPOConfig"]
