"""The flags of the script for DMLR: those of the published code by their names, with their defaults, and ours.

Source: DMLR ("Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623), card 5.
`--mode paper` has the settings of the paper, `--mode reference` the defaults of the published code. A flag that has no
effect there is refused with what to write instead; its default is accepted.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeling_latent.search_options import MODES, SEARCH_OPTIONS
from trainers.data.answers import STRICT
from trainers.data.answers_dmlr import MODES as JUDGES
from trainers.data.answers_staged import REFERENCE
from trainers.data.dmlr import ANSWER_POLICIES

from .search_answers import NOISE_STREAMS, STRATEGIES, SearchPlan
from .search_questions import Question
from .search_verdicts import SearchJudge
from .verifier import LLMVerifier

MOST_IMAGE_TOKENS = 16384  # of an image: what Qwen2.5-VL takes at most by itself


@dataclass(frozen=True)
class Flag:
    """A published flag: type (None for a switch), default in the two modes, help; `dead`: what to write instead."""

    name: str
    kind: Callable[[str], Any] | None
    paper: Any
    reference: Any
    help: str
    dead: str | None = None


def switch_value(text: str) -> bool:
    """True or false, for a switch that is on by default."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return words[text.lower()]


def _flag(name: str, kind: Any, default: Any, help: str, dead: str | None = None) -> Flag:
    return Flag(name, kind, default, default, help, dead)


def _search(name: str, kind: Any, option: str | None = None) -> Flag:
    found = SEARCH_OPTIONS[option or name]
    return Flag(name, kind, found.paper, found.reference, found.help)


# In the order in which the published result file has them.
PUBLISHED_FLAGS = (
    _flag("dataset", str, "data/mathverse.json", "path of a data JSON, or a data set by name (e.g. mmvp, math_vista)"),
    _flag("model_name_or_path", str, "Qwen/Qwen2.5-VL-7B-Instruct", "folder or Hub id: stock, latent, or an adapter"),
    _flag("output_dir", str, None, "folder of the results; needed"),
    _flag("start_data_idx", int, 0, "first position in the file"),
    Flag("end_data_idx", int, 1000, 100, "position behind the last one; the file may end before it"),
    _flag("max_new_tokens", int, 2048, "budget of an answer"),
    _flag("device", str, "cuda", "where the model runs; by default cpu where there is no GPU"),
    _flag("solver_prompt_idx", int, 0, "0 step by step, 1 numbered instructions, 2 the answer alone"),
    _flag("seed", int, 42, "of the noise; 0 is one like any other (published: not seeded)"),
    _search("num_thought_tokens", int),
    _search("sigma", float),
    _search("sigma_decay", float),
    _search("lr", float),
    _search("max_num_steps", int),
    _flag("reward_threshold", float, -1, SEARCH_OPTIONS["reward_threshold"].help),
    _search("top_k", int, "reward_top_k"),
    _flag(
        "disable_conf_reward", None, False, "dead: always fails in the published code",
        "the score that the model would write as text never worked; leave it out, or choose a reward by --reward",
    ),
    _flag(
        "disable_best_reward", None, False, "dead: never read",
        "the answer is always that of the best step; leave it out",
    ),
    _flag("resume", None, False, "go on with output_dir: finished questions are kept"),
    _flag("ckpt_suffix", str, "", "dead: never read", "name the folder by --output_dir"),
    _search("use_auto_grad", None),
    _flag("verbose", int, 1, "0: no progress bar"),
    _flag("disable_save_logistics", None, False, "no results, only their summary, and the reward logs (one process)"),
    _flag("use_llm_verify", None, False, "the LLM verifier judges instead of the rule"),
    _flag("verify_only", None, False, "judge the results of output_dir anew; no model is loaded"),
    Flag("min_pixels", int, 128, 200704, "least image tokens (merged: 28 x 28 pixels, in Qwen3-VL 32 x 32)"),
    Flag("max_pixels", int, 256, 1003520, "most image tokens; the reference defaults fit no model, give both"),
    _flag("num_workers", int, 1, "processes; more than one are started by torchrun, unless it runs already"),
    _flag("worker_device_round_robin", None, False, "a device for each process, which is always so here"),
    _search("num_selected_patches", int),
    _flag(
        "visual_token_viz", None, False, "dead: never read",
        "the image tokens of the best step are in results_v1.json (patches); leave it out",
    ),
    _flag(
        "visual_token_viz_dir", str, "visual_token_viz", "dead: never read",
        "the image tokens of the best step are in results_v1.json (patches); leave it out",
    ),
    _search("visual_only", None),
    _search("visual_insert_stride", int),
    _search("visual_injection_start_step", int),
    _search("visual_injection_interval", int),
    _search("initial_patch_count", int),
    _search("patch_increment", int),
    _flag("save_reward_csv", switch_value, True, "write reward_logs/; false: do not"),
)  # fmt: skip
_BY_NAME = {flag.name: flag for flag in PUBLISHED_FLAGS}
# Flags that are options of the search; `top_k` is its `reward_top_k`.
_SEARCH = [flag.name for flag in PUBLISHED_FLAGS if flag.name in SEARCH_OPTIONS and flag.name != "seed"] + ["top_k"]
_OWN_SEARCH = ("reward", "reward_rows", "num_noise_samples", "baseline", "relative_sigma", "inject_in_decode")


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    published = parser.add_argument_group("published flags")
    for flag in PUBLISHED_FLAGS:
        default = f"{flag.paper} | {flag.reference}" if flag.paper != flag.reference else f"{flag.paper}"
        options: dict[str, Any] = {"default": None, "help": f"{flag.help} (default: {default})".replace("%", "%%")}
        if flag.kind is None:
            options["action"] = "store_true"
        else:
            options["type"] = flag.kind
            options |= {"nargs": "?", "const": True} if flag.kind is switch_value else {}
        published.add_argument(f"--{flag.name}", **options)
    add = parser.add_argument_group("flags of this library").add_argument
    switch = argparse.BooleanOptionalAction
    add("--mode", choices=MODES, default="paper", help="the paper's settings, or what the published code does")
    add("--strategy", choices=STRATEGIES, default="search", help="or decode the same prompt greedily, or sample")
    add("--image_root", default=None, help="where image paths begin (default: beside the file, or here); of a name: "
        "the folder of its files (default: fetched from the Hub)")  # fmt: skip
    add("--batch_size", type=int, default=None, help="questions at a time (default: 4 | 1)")
    add("--noise_stream", choices=NOISE_STREAMS, default=None, help="of each question by its index, or one for all in "
        "turn, as published (default: item | run; in batches or several processes item)")  # fmt: skip
    add("--empty_answers", choices=ANSWER_POLICIES, default="refuse", help="rows whose solution is empty")
    add("--max_bad_share", type=float, default=0.01, help="share of bad rows above which the script stops")
    add("--judge", choices=JUDGES, default=None, help="rules of the judge and of counting: corrected, or published "
        "(default: strict | reference)")  # fmt: skip
    for name in ("reward", "reward_rows", "baseline"):
        add(f"--{name}", default=None, help=SEARCH_OPTIONS[name].help)
    add("--num_noise_samples", type=int, default=None, help=SEARCH_OPTIONS["num_noise_samples"].help)
    for name in ("relative_sigma", "inject_in_decode"):
        add(f"--{name}", action=switch, default=None, help=SEARCH_OPTIONS[name].help)
    add("--temperature", type=float, default=None, help="of --strategy sample (default: 1)")
    add("--top_p", type=float, default=None, help="of --strategy sample (default: 1)")
    add("--revision", default=None, help="branch, tag or commit of a Hub id")
    add("--dtype", default=None, help="precision of the weights (default: auto | float32)")
    add("--attn_implementation", default="sdpa", help="eager is not needed")
    add("--placeholder", default=None, help="the token that stands for a thought (default: <|endoftext|> or padding)")
    add("--chat_template", default=None, help="another chat template (Jinja)")
    add("--published_index", action="store_true", help="verify_only: data_idx counts from start_data_idx, as in files "
        "that the published code wrote in one process")  # fmt: skip
    add("--verifier_cache", default=None, help="file of verdicts (default: verdicts.jsonl in output_dir)")
    add("--verifier_timeout", type=float, default=60.0, help="seconds of one request")
    add("--verifier_retries", type=int, default=None, help="how often a pair is asked again (default: 4 | 2)")
    add("--verifier_workers", type=int, default=4, help="requests at a time")
    return parser


def parse_args(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options with the defaults of their mode; `given` are the names that were written.

    Raises:
        ValueError: a dead flag; names what to write instead.
    """
    args = build_parser(description).parse_args(arguments)
    args.given = {name for name, value in vars(args).items() if value is not None}
    for flag in PUBLISHED_FLAGS:
        value, default = getattr(args, flag.name), getattr(flag, args.mode)
        if value is None:
            setattr(args, flag.name, default)
        elif flag.dead and value != default:
            raise ValueError(f"--{flag.name} {value} has no effect in the published code: {flag.dead}")
    if args.batch_size is None:
        args.batch_size = 1 if args.mode == REFERENCE else 4
    args.judge = args.judge or (REFERENCE if args.mode == REFERENCE else STRICT)
    args.dtype = args.dtype or ("float32" if args.mode == REFERENCE else "auto")
    if args.device == "cuda" and "device" not in args.given and not torch.cuda.is_available():
        args.device = "cpu"
    _check_args(args)
    return args


def _check_args(args: argparse.Namespace) -> None:
    needed = args.verify_only or not args.disable_save_logistics
    if args.output_dir is None and (needed or args.save_reward_csv):
        raise ValueError("--output_dir is needed: the folder that the results are written to")
    if args.num_workers < 1:
        raise ValueError(f"--num_workers={args.num_workers} must be 1 or more")
    for name in ("temperature", "top_p"):
        if getattr(args, name) is not None and args.strategy != "sample":
            raise ValueError(f"--{name} is of --strategy sample; leave it out with --strategy {args.strategy}")
    if args.published_index and not args.verify_only:
        raise ValueError("--published_index is of --verify_only; leave it out")
    if args.disable_save_logistics and (args.resume or args.verify_only):
        raise ValueError("--disable_save_logistics writes nothing that could be gone on with; leave it out")
    if args.device.startswith("cuda") and not torch.cuda.is_available() and not args.verify_only:
        raise ValueError(f"--device {args.device}: there is no GPU here; leave it out, or give --device cpu")


def notices(args: argparse.Namespace) -> list[str]:
    """What some published options do not do, in words."""
    found = []
    if args.mode == REFERENCE and args.num_selected_patches == 0:
        found.append(
            "--num_selected_patches 0 is no cap in mode reference, as published: all image tokens may be interleaved; "
            f"--visual_injection_start_step {args.max_num_steps} interleaves none"
        )
    if args.mode == REFERENCE and args.use_auto_grad:
        found.append("--use_auto_grad moves nothing in mode reference, as published; in mode paper it does")
    return found


def plan_of(args: argparse.Namespace, min_tokens: int | None, max_tokens: int | None, workers: int) -> SearchPlan:
    """How the options ask questions to be answered.

    Raises:
        ValueError: a value out of range; names the flag.
    """
    options: dict[str, Any] = {"mode": args.mode}
    options |= {("reward_top_k" if name == "top_k" else name): getattr(args, name) for name in _SEARCH}
    options |= {name: getattr(args, name) for name in _OWN_SEARCH if getattr(args, name) is not None}
    stream = args.noise_stream
    if stream is None:
        alone = args.strategy == "search" and workers == 1 and args.batch_size == 1
        stream = "run" if args.mode == REFERENCE and alone else "item"
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p") if getattr(args, name) is not None}
    try:
        return SearchPlan(
            strategy=args.strategy,
            options=options,
            max_new_tokens=args.max_new_tokens,
            prompt_index=args.solver_prompt_idx,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            placeholder=args.placeholder,
            chat_template=args.chat_template,
            seed=args.seed,
            noise_stream=stream,
            **sampling,
        )
    except ValueError as error:
        raise ValueError(str(error).replace("reward_top_k", "top_k")) from error


def image_tokens(args: argparse.Namespace, questions: Sequence[Question]) -> tuple[int | None, int | None]:
    """Bounds of an image in merged tokens; None for questions of text.

    Raises:
        ValueError: a bound that can only be meant in pixels, as the published defaults are.
    """
    if not any(question.has_image for question in questions):
        return None, None
    for name in ("min_pixels", "max_pixels"):
        value = getattr(args, name)
        if value > MOST_IMAGE_TOKENS:
            whose = "" if name in args.given else ", the published default,"
            raise ValueError(
                f"--{name} {value}{whose} is in merged image tokens (28 x 28 pixels each, in Qwen3-VL 32 x 32), and "
                f"no image has more than {MOST_IMAGE_TOKENS}; the published example has --min_pixels 128 --max_pixels "
                "256"
            )
    return args.min_pixels, args.max_pixels


def published_args(args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """The published flags with their values, in the published order, for `results.json`: a resumed run gives the file
    of one that was never interrupted."""
    values = {flag.name: getattr(args, flag.name) for flag in PUBLISHED_FLAGS}
    return {**values, "resume": False, "num_workers": workers}


def judge_of(args: argparse.Namespace, folder: str) -> SearchJudge:
    """Who judges.

    Raises:
        VerifierError: no key for the LLM verifier.
    """
    if not args.use_llm_verify:
        return SearchJudge(args.judge)
    verifier = LLMVerifier(
        mode=args.judge,
        cache=args.verifier_cache or os.path.join(folder, "verdicts.jsonl"),
        retries=args.verifier_retries,
        timeout=args.verifier_timeout,
        workers=args.verifier_workers,
    )
    return SearchJudge(args.judge, verifier)


__all__ = [
    "PUBLISHED_FLAGS",
    "Flag",
    "build_parser",
    "image_tokens",
    "judge_of",
    "notices",
    "parse_args",
    "plan_of",
    "published_args",
]
