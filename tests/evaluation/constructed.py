"""Models with weights set by hand whose use of their slots is known: the verdict on them is not a matter of opinion.

One decoder layer of the real class, attention uniform over everything visible (queries and keys are zero), no MLP. The
question is one symbol; its right answer is the letter of the symbol. Directions of the hidden space:

    symbol i   only the question's token has it        answer i   written by attention from a symbol
    copied i   written by attention from answer i      text       every token has it, no slot does
    mean text  written by attention from text          here       every token has it, attention does not write it
    end        the answer letters and the wrong letter have it: the end of the turn follows

* "content" answers by `copied`, which only reaches the reply from what is in a slot: a slot is fed the state before
  it, which has `answer`; without slots, or with others in them, the letter is wrong.
* "inert" answers by `answer`: the question alone.
* "presence" answers by `answer` too, but says the wrong letter when the mean of `text` is high: slots of whatever
  content lower it.
"""

from functools import lru_cache
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from evaluation.benchmarks.benchmark import AskProtocol, Benchmark, Scored
from evaluation.runner import Prediction
from modeling_latent import LATENT_CLASSES
from tests.tiny import tiny_processor
from trainers.data.records import Record, make_record
from trainers.tiny import tiny_config

SYMBOLS, LETTERS, WRONG = "1234", "ABCD", "E"
SLOTS, HIDDEN = 2, 256
OPTIONS = {"latent_strategy": "fixed", "num_latent_steps": SLOTS, "force_span": True, "force_end": True}
TEXT, MEAN_TEXT, HERE, END, PLAIN = 0, 1, 2, 3, 4
SYMBOL, ANSWER, COPIED = 8, 16, 24  # first of four dimensions each
KINDS = ("content", "inert", "presence")


def constructed_model(kind: str) -> PreTrainedModel:
    """A model of a kind, in float32."""
    processor = tiny_processor()
    config = tiny_config(
        "qwen2_5_vl",
        None,
        processor.tokenizer,
        hidden_size=HIDDEN,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        vision_depth=1,
    )
    ids = {f"latent_{role}token_id": getattr(processor, f"latent_{role}token_id") for role in ("", "start_", "end_")}
    config_class, model_class = LATENT_CLASSES["qwen2_5_vl"]
    model = model_class(config_class.from_stock(config, latent_method="laser", **ids))
    model.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    _set_weights(model, kind)
    return model.eval()


def token(text: str) -> int:
    """Id of a text of one token."""
    (found,) = tiny_processor().tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@torch.no_grad()
def _set_weights(model: PreTrainedModel, kind: str) -> None:
    text, head = model.model.language_model, model.lm_head.weight
    layer = text.layers[0]
    for parameter in (*layer.self_attn.parameters(), *layer.mlp.parameters(), head):
        parameter.zero_()
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, text.norm):
        norm.weight.fill_(1.0)
    text.norm.weight[TEXT] = 0.0  # so that a slot, which is fed a final state, has no `text`
    layer.self_attn.o_proj.weight.copy_(torch.eye(head.shape[1]))
    value = layer.self_attn.v_proj.weight
    value[MEAN_TEXT, TEXT] = 1.0
    embedding = text.embed_tokens.weight
    embedding.zero_()
    embedding[:, TEXT], embedding[:, HERE], embedding[:, PLAIN] = 1.0, 1.0, 1.0
    for place, (symbol, letter) in enumerate(zip(SYMBOLS, LETTERS, strict=True)):
        value[ANSWER + place, SYMBOL + place], value[COPIED + place, ANSWER + place] = 1.0, 1.0
        _replace(embedding, token(symbol), SYMBOL + place)
        _replace(embedding, token(letter), END)
        head[token(letter), (COPIED if kind == "content" else ANSWER) + place] = 10.0
    _replace(embedding, token(WRONG), END)
    head[tiny_processor().tokenizer.eos_token_id, END] = 1_000.0
    if kind == "presence":
        head[token(WRONG), MEAN_TEXT], head[token(WRONG), HERE] = 100.0, -PRESENCE_THRESHOLD
    else:
        head[token(WRONG), HERE] = 0.01  # said when nothing else speaks


# The mean of `text` over text alone is sqrt(HIDDEN / 3) behind the norm; two slots among nine positions take 2/9 away.
PRESENCE_THRESHOLD = 100.0 * (HIDDEN / 3) ** 0.5 * 0.9


def _replace(embedding: torch.Tensor, row: int, dimension: int) -> None:
    """A token with another direction in place of `plain`: all tokens have the same norm."""
    embedding[row, PLAIN], embedding[row, dimension] = 0.0, 1.0


def records(count: int) -> list[Record]:
    """Questions of one symbol each, in turn."""
    return [make_record(f"item-{n}", SYMBOLS[n % 4], LETTERS[n % 4], choices=list("wxyz")) for n in range(count)]


def _score(record: Record, prediction: Prediction) -> Scored:
    letter = prediction.text.strip()[:1]
    return Scored(letter == record["answer"], letter or None)


def _prompt(processor: Any, record: Record) -> str:
    return f"x {record['question']} x"


@lru_cache
def benchmark() -> Benchmark:
    """The benchmark of the constructed models."""
    protocol = AskProtocol("default", "constructed", _prompt, _score, SLOTS + 8)
    return Benchmark(
        "constructed", "constructed", (), list, {"default": protocol}, lambda record: record["question"], None,
        lambda record: tuple(LETTERS), lambda record: record["answer"],
    )  # fmt: skip
