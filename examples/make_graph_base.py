"""Write the tiny causal language model that Coconut is trained on here: random weights, words of graph questions.

python examples/make_graph_base.py    # runs/graph-base, of the size that hub_configs/coconut-graphs/ expects
"""

import argparse

from trainers.graph_model import save_graph_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/graph-base", help="folder to write")
    parser.add_argument("--hidden_size", type=int, default=64, help="width of the model")
    parser.add_argument("--num_layers", type=int, default=4, help="its layers")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    print(save_graph_base(args.output, args.hidden_size, args.num_layers, args.seed))


if __name__ == "__main__":
    main()
