r"""A published `.pth` checkpoint of IVT-LR or Coconut becomes a folder that `AutoModel.from_pretrained` loads.

    python examples/convert_checkpoint.py FYYDCC/IVTLR --filename qwen_vl/model.pth \
        --base Qwen/Qwen2-VL-7B-Instruct --output runs/ivtlr-qwen2-vl
    python examples/convert_checkpoint.py FYYDCC/IVTLR --filename chameleon/model.pth \
        --base facebook/chameleon-7b --output runs/ivtlr-chameleon
    python examples/convert_checkpoint.py checkpoint_50 --method coconut \
        --base openai-community/gpt2 --output runs/coconut

The adapters of the file are merged. What a file lacks (configuration, tokenizer, image processor) comes from the base;
if the file was trained with the tokenizer of another model, `--tokenizer` names that one.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig

from modeling_latent import LATENT_METHODS
from modeling_latent.conversion_latent import latent_processor_class
from modeling_latent.conversion_published import PUBLISHED_METHODS, convert_published_checkpoint


def main(arguments: list[str] | None = None) -> Path:
    """Convert, save, and say what the folder holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file, folder, or Hub repository")
    parser.add_argument("--filename", default="model.pth", help="file in the folder or repository")
    parser.add_argument("--base", required=True, help="folder or Hub repository of the stock model")
    parser.add_argument("--tokenizer", default=None, help="take the processor from this folder or repository")
    parser.add_argument("--method", default="ivtlr", choices=PUBLISHED_METHODS)
    parser.add_argument("--lora_alpha", type=float, default=None, help="where it is not the published 16 with r = 64")
    parser.add_argument("--dtype", default="auto", help="of the weights, e.g. bfloat16; default: as in the file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args(arguments)

    processor = None
    if args.tokenizer is not None:
        family = AutoConfig.from_pretrained(args.base).model_type
        tokens = LATENT_METHODS[args.method].tokens
        processor = latent_processor_class(family).from_pretrained(args.tokenizer, latent_tokens=tokens)
    model, processor = convert_published_checkpoint(
        args.checkpoint,
        args.base,
        args.method,
        filename=args.filename,
        lora_alpha=args.lora_alpha,
        processor=processor,
        dtype=args.dtype if args.dtype == "auto" else getattr(torch, args.dtype),
    )
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    options = model.generation_config
    print(
        f"{args.output}: {type(model).__name__}, {model.dtype}, {len(processor.tokenizer)} tokens, slot token "
        f"{model.config.latent_token_id}, {options.num_latent_steps} slots of {options.num_latent_patches} patches"
    )
    return args.output


if __name__ == "__main__":
    main()
