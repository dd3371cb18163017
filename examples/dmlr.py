"""Search over thought tokens at test time (DMLR) on a data set, with its baselines, in one process or several.

    python examples/dmlr.py --dataset mmvp --output_dir runs/dmlr-mmvp                     # the paper's settings
    python examples/dmlr.py --dataset mmvp --output_dir runs/greedy-mmvp --strategy greedy
    torchrun --nproc_per_node 8 examples/dmlr.py --dataset data/mmstar.json --output_dir runs/mmstar --use_llm_verify
    python examples/dmlr.py --dataset data/mmstar.json --output_dir runs/mmstar --resume   # goes on after a kill
    python examples/dmlr.py --dataset data/mmstar.json --output_dir runs/mmstar --verify_only --use_llm_verify

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623. The flags of
the published `main.py` are taken under their names. `--mode paper` (default) has the paper's settings, `--mode
reference` does what the published code does, with its defaults; where they differ, the help says "paper | reference".
Results: see `evaluation/search_store.py`. The LLM verifier reads OPENAI_API_KEY, OPENAI_API_BASE_URL and MODEL_TYPE
from the environment or a .env file; HUGGING_FACE_TOKEN is taken for the token of the Hub.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from evaluation.search_arguments import image_tokens, judge_of, notices, parse_args, plan_of, published_args
from evaluation.search_questions import Question, read_questions
from evaluation.search_runner import Workers, run_search
from evaluation.search_verdicts import SearchJudge, Truth, verify_results
from modeling_latent import LATENT_CLASSES, latent_processor_class, load_latent_model
from modeling_latent.configuration_latent import published_method
from modeling_latent.loading_latent import adapter_settings
from modeling_latent.search_prompts import pixel_limits
from trainers.data.answers_staged import REFERENCE
from trainers.teachers import teacher_processes

HUB_TOKEN, PUBLISHED_HUB_TOKEN = "HF_TOKEN", "HUGGING_FACE_TOKEN"


def start_workers(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Start this script in several processes.

    Returns:
        The exit status.

    Raises:
        ValueError: more processes than GPUs.
    """
    devices = torch.cuda.device_count() if args.device.startswith("cuda") else args.num_workers
    if devices < args.num_workers:
        raise ValueError(
            f"--num_workers {args.num_workers} on {devices} GPUs: each process has a device of its own here; take "
            f"--num_workers {devices}, and a larger --batch_size"
        )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.num_workers)]
    return subprocess.run([sys.executable, *launcher, os.path.abspath(__file__), *arguments], check=False).returncode


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse_args(__doc__, arguments)
    if os.environ.get(PUBLISHED_HUB_TOKEN):
        os.environ.setdefault(HUB_TOKEN, os.environ[PUBLISHED_HUB_TOKEN])
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if args.num_workers > 1 and launched not in (1, args.num_workers):
        raise ValueError(
            f"--num_workers {args.num_workers}, and the launcher started {launched} processes; leave --num_workers out"
        )
    if args.verify_only:
        verify(args)
    elif args.num_workers > 1 and launched == 1:
        plan_of(args, None, None, args.num_workers)  # refuses wrong options before processes are started
        if status := start_workers(args, arguments):
            sys.exit(status)
    elif args.disable_save_logistics:
        with tempfile.TemporaryDirectory() as folder:
            run(args, folder)
    else:
        run(args, args.output_dir)


def load_model(args: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """Model and processor: a latent model or an adapter as it is, a stock one as its stock class; of a causal language
    model the tokenizer."""
    name, revision = args.model_name_or_path, args.revision or "main"
    options = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    adapter = adapter_settings(name, args.revision) is not None
    config = None if adapter else AutoConfig.from_pretrained(name, revision=revision)
    if adapter or config.model_type.startswith("latent_") or published_method(config):
        model, processor = load_latent_model(name, adapter="merge", revision=args.revision, **options)
        return model.to(device), processor
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    loader = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return loader.from_pretrained(name, revision=revision, **options).to(device), load_processor(args, config)


def load_processor(args: argparse.Namespace, config: PreTrainedConfig) -> Any:
    """The processor of a model that sees, the tokenizer of a stock one that does not."""
    family = config.model_type.removeprefix("latent_")
    if family in LATENT_CLASSES:  # needs no torchvision
        reader: Any = latent_processor_class(config.model_type)
    else:
        reader = AutoProcessor if family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else AutoTokenizer
    return reader.from_pretrained(args.model_name_or_path, revision=args.revision or "main")


def read(args: argparse.Namespace) -> tuple[list[Question], str]:
    """The questions, and what became of the rows in words."""
    questions, report = read_questions(
        args.dataset,
        args.image_root,
        start_data_idx=args.start_data_idx,
        end_data_idx=args.end_data_idx,
        repair=args.mode != REFERENCE,
        empty_answers=args.empty_answers,
        max_bad_share=args.max_bad_share,
    )
    return questions, report.summary()


def bounds(args: argparse.Namespace, questions: Sequence[Question]) -> tuple[int | None, int | None]:
    """Least and most tokens of an image; defaults are left out for models whose images have one size."""
    low, high = image_tokens(args, questions)
    if low is None or {"min_pixels", "max_pixels"} & args.given:
        return low, high
    config = AutoConfig.from_pretrained(args.model_name_or_path, revision=args.revision or "main")
    try:
        pixel_limits(load_processor(args, config), low, high)
    except ValueError:
        return None, None
    return low, high


def run(args: argparse.Namespace, folder: str) -> None:
    """Answer, judge, write, and say what came out."""
    plan_of(args, None, None, 1)  # refuses wrong options before anything is read or loaded
    state = teacher_processes()
    workers = Workers(state.process_index, state.num_processes, state.wait_for_everyone)
    if args.disable_save_logistics and workers.number > 1:
        raise ValueError(
            f"--disable_save_logistics with {workers.number} processes, which share their answers in files; leave it "
            "out"
        )
    judge = judge_of(args, folder) if workers.index == 0 else SearchJudge(args.judge)
    questions, rows = read(args)
    device = state.device if workers.number > 1 and args.device == "cuda" else torch.device(args.device)
    if workers.index == 0:
        print("\n".join([rows, *notices(args)]))
    results = run_search(
        folder,
        questions,
        plan_of(args, *bounds(args, questions), workers.number),
        judge,
        lambda: load_model(args, device),
        model=args.model_name_or_path,
        dataset=args.dataset,
        config={
            "max_new_tokens": args.max_new_tokens,
            "solver_prompt_idx": args.solver_prompt_idx,
            "min_pixels": args.min_pixels,
            "max_pixels": args.max_pixels,
        },
        args=published_args(args, workers.number),
        settings={name: getattr(args, name) for name in ("revision", "dtype", "attn_implementation")},
        resume=args.resume,
        batch_size=args.batch_size,
        save_reward_csv=args.save_reward_csv,
        csv_folder=args.output_dir,
        workers=workers,
        progress=args.verbose > 0,
    )
    if results is not None:
        where = "" if args.disable_save_logistics else f"\nsaved to {folder}"
        print(f"{report_text(results, args)}{where}")


def verify(args: argparse.Namespace) -> None:
    """Judge the results of a folder anew."""
    questions, _ = read(args)
    shift = args.start_data_idx if args.published_index else 0
    truths = {each.data_idx - shift: Truth(each.solution, _text(each, args)) for each in questions}
    _, found = verify_results(args.output_dir, truths, judge_of(args, args.output_dir))
    print(report_text(found, args))


def _text(question: Question, args: argparse.Namespace) -> str | None:
    return None if args.mode == REFERENCE else question.solution_text


def report_text(results: dict[str, Any], args: argparse.Namespace) -> str:
    """What came out, in words: accuracy, and everything that is no verdict, with what to do."""
    counts, share = results["counts"], results["accuracy"]
    judge = "LLM verifier" if args.use_llm_verify else f"{args.judge} rule"
    decided = counts["correct"] + counts["wrong"]
    lines = [f"{counts['questions']} questions, no verdict on any"]
    if share is not None:
        low, high = results["interval"]
        lines = [f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {decided} right by the {judge}"]
    if counts["failed"]:
        lines.append(
            f"{counts['failed']} failed: see the entries with stop_reason exception; --resume asks them again"
        )
    if counts["skipped"]:
        lines.append(f"{counts['skipped']} without ground truth were skipped")
    if counts["unverified"]:
        lines.append(f"{counts['unverified']} unverified; --verify_only --use_llm_verify asks again")
        lines += [f"  {number} x {reason}" for reason, number in list(results["unverified"].items())[:3]]
    if counts["cut_off"]:
        lines.append(
            f"{counts['cut_off']} answers were cut off at --max_new_tokens {args.max_new_tokens}; raise it if the "
            "answer stands at their end"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
