"""Accuracy of a model, with or without latents, on any benchmark; without --benchmark on held-out mazes.

    accelerate launch examples/evaluate.py --model org/laser-7b --benchmark blink mmvp --data_root data \\
        --protocol laser --strategy dynamic off --max_latent_steps 4 8     # each strategy with each number of steps
    python examples/evaluate.py --checkpoint org/lavit-3b --benchmark mmvp --data_root data/mmvp --protocol lavit \\
        --force_lvr --output_file lines.jsonl                               # published spellings, published file
    python examples/evaluate.py --model runs/ivtlr --benchmark m3cot --data_path LightChen2333/M3CoT --split test
    python examples/evaluate.py --model runs/coconut-graphs --benchmark graphs --small --compare runs/cot-graphs
    python examples/evaluate.py --model runs/quickstart/laser-maze --vsp_dir ../shared/data/vsp_maze
    python examples/evaluate.py --model hub_configs/maze-tiny/base --strategies off search:max_num_steps=5 --vote 32
    python examples/evaluate.py rescore runs/evaluation/laser-7b-1a2b3c4d --protocol lvr
    python examples/evaluate.py merge results/mmstar/decoding_by_dynamic_max8/run_checkpoint-320 --num_ranks 4

A run is a folder: killed, the same command goes on where it was; several processes (`accelerate launch`, `torchrun`)
share the items, and their results are those of one. Every condition is one line: accuracy with its 95 % Wilson
interval, by group, replies that could be read, latent steps and text tokens, seconds an item; differences to the first
condition on the same items with a bootstrap interval, McNemar's test and a test of equivalence.
"""

import sys

from evaluation.harness.command import merge, rescore, run
from evaluation.search_runner import Workers
from trainers.teachers import teacher_processes


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["merge"]:
        merge(words[1:])
    elif words[:1] == ["rescore"]:
        rescore(words[1:])
    else:
        state = teacher_processes()
        workers = Workers(state.process_index, state.num_processes, state.wait_for_everyone)
        run(words, workers, device=str(state.device) if workers.number > 1 else None, about=__doc__)


if __name__ == "__main__":
    main()
