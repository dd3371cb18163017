"""Do the latents of a model matter? Interventions, statistics, and the causal card as JSON, Markdown and HTML.

    python examples/diagnose.py --model runs/quickstart/laser-maze --benchmark mazes --protocol laser --output card
    python examples/diagnose.py --model runs/ivtlr-maze --benchmark mazes --protocol ivtlr --suite full --num_items 200
    python examples/diagnose.py --model org/laser-7b --benchmark blink --data_root data/blink --suite trt
    python examples/diagnose.py --model runs/lvr-maze --benchmark mazes --interventions gauss_norm all⇸L
    python examples/diagnose.py --list

The card says "inert", "presence", "content", "harmful" or "undecided" by the rule of
`hub_configs/methods/diagnostics.md`; its page lists every intervention. Open `report.html` in a browser.
"""

import argparse
from pathlib import Path

import torch

from evaluation.benchmarks.registry import BENCHMARKS, benchmark
from evaluation.causal.card_report import write_card
from evaluation.causal.causal_card import COUNTS, REGIMES, causal_card
from evaluation.causal.interventions import describe_interventions
from evaluation.causal.suites import SUITES
from evaluation.conditions import parse_strategy
from modeling_latent import load_latent_model


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", "--checkpoint", default=None, help="folder or Hub id of a latent model, or of an adapter")
    add("--revision", default=None, help="branch, tag or commit of a Hub id")
    add("--benchmark", default="mazes", choices=tuple(BENCHMARKS), help="what is asked")
    add("--data_root", "--data", default=None, help="folder or file of the benchmark; none for generated mazes")
    add("--task_name", nargs="+", default=None, help="tasks of a benchmark that has some")
    add("--protocol", default="default", help="how it is asked and scored, e.g. laser, lvr, ivtlr, lavit")
    add("--num_items", type=int, default=500, help="so many items; a verdict needs hundreds")
    add("--suite", default="slots", choices=tuple(SUITES), help="which interventions")
    add("--interventions", nargs="+", default=None, help="interventions in place of a suite")
    add("--strategy", default=None, help="latent_strategy, with options as name:option=value; default: of the model")
    add("--regime", default="live", choices=REGIMES, help="slots behind an edit are worked out again, or replayed")
    add("--count", default="clean", choices=COUNTS, help="as many slots as in the clean run, or the stop rule acts")
    add("--margin", type=float, default=2.0, help="points within which accuracies count as equal")
    add("--seed", type=int, default=0, help="of noise, donors and bootstrap")
    add("--batch_size", type=int, default=16, help="items run together")
    add("--max_new_tokens", type=int, default=None, help="of a reply; default: of the protocol")
    add("--num_pictures", type=int, default=8, help="items that get a picture")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs")
    add("--output", type=Path, default=Path("card"), help="folder of the card")
    add("--list", action="store_true", help="print every intervention and stop")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.list:
        print(describe_interventions())
        return
    if args.model is None:
        parser.error("--model is missing; give a folder or a Hub id")
    bench = benchmark(args.benchmark)
    bench.protocol(args.protocol)
    size = {"num": args.num_items} if not bench.sources else {"max_samples": args.num_items}
    records = bench.read(args.data_root, tasks=args.task_name, **size)
    model, processor = load_latent_model(args.model, adapter="merge", revision=args.revision, trust_remote_code=True)
    model.to(args.device)
    name, options = (None, {}) if args.strategy is None else parse_strategy(args.strategy)
    card = causal_card(
        model,
        processor,
        records,
        bench,
        protocol=args.protocol,
        suite=args.interventions or args.suite,
        regime=args.regime,
        count=args.count,
        seed=args.seed,
        margin=args.margin,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        num_views=args.num_pictures,
        progress=True,
        name=str(args.model),
        **options,
        **({} if name is None else {"latent_strategy": name}),
    )
    images = {view.index: records[view.index]["images"] for view in card.items}
    written = write_card(card, args.output, images)
    print(card.verdict.sentence)
    for effect in card.effects.values():
        print(f"  {effect.name:<22} {effect.delta:+6.1f} [{effect.low:+.1f}, {effect.high:+.1f}]  n={effect.n}")
    print(f"card: {written['card.md']}\nreport: {written['report.html']}")


if __name__ == "__main__":
    main()
