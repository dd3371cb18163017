"""Load a latent model and reason in latents over one picture.

    python examples/generate.py --model runs/quickstart/laser-maze --image maze.png --question "Find a path ..."

Without --image a maze is generated. The model may be a folder or a Hub id, also of an adapter, which is merged into
its base.
"""

import argparse

from PIL import Image

from modeling_latent import load_latent_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a latent model or of an adapter of one")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a Hub id")
    parser.add_argument("--image", default=None, help="picture; default: a generated maze")
    parser.add_argument("--question", default=None, help="default: the question of the maze task")
    parser.add_argument("--latent_strategy", default="dynamic", help="off, fixed or dynamic")
    parser.add_argument("--max_latent_steps", type=int, default=None, help="cap on the slots of a span (dynamic)")
    parser.add_argument("--num_latent_steps", type=int, default=None, help="slots of a span (fixed)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="budget of the reply, slots included")
    parser.add_argument("--save_trace", default=None, help="write the latent trace to this safetensors file")
    args = parser.parse_args()

    model, processor = load_latent_model(args.model, adapter="merge", revision=args.revision, trust_remote_code=True)
    image, question = load_image(args.image), args.question or default_question()
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    options = {"max_latent_steps": args.max_latent_steps, "num_latent_steps": args.num_latent_steps}
    output = model.generate(
        **inputs, max_new_tokens=args.max_new_tokens, latent_strategy=args.latent_strategy,
        return_dict_in_generate=True,
        **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    trace, start = output.latent_trace, inputs["input_ids"].shape[1]
    print("answer:      ", processor.decode(output.sequences[0, start:], skip_special_tokens=True))
    print("latent path: ", processor.decode_latent(output.sequences[0, start:], trace.readable_sequences[0, start:],
                                                   trace.latent_mask[0, start:]))  # fmt: skip
    for span in trace.spans:
        print(f"span:         {span.length} slots at {span.first}, closed by {span.reason}")
    if args.save_trace:
        trace.save(args.save_trace)


def load_image(path: str | None) -> Image.Image:
    if path is not None:
        return Image.open(path).convert("RGB")
    from trainers.data.mazes import MazeGenerator, render_maze

    return render_maze(MazeGenerator(seed=7, split="test", sizes=(4,)).maze(0), 28)


def default_question() -> str:
    from trainers.data.mazes import QUESTION

    return QUESTION


if __name__ == "__main__":
    main()
