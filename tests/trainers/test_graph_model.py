"""The tiny base of graph questions: a tokenizer of whole words, and a folder that becomes a latent model."""

from pathlib import Path

import pytest

from modeling_latent import load_latent_model
from trainers.data.graphs import SMALL_GRAPHS, GraphGenerator, graph_record
from trainers.data.staged_text import encode_staged
from trainers.graph_model import build_graph_tokenizer, save_graph_base


@pytest.mark.parametrize("number", range(5))
def test_every_text_of_a_question_is_made_of_words(number: int) -> None:
    tokenizer = build_graph_tokenizer()
    record = graph_record(GraphGenerator(**SMALL_GRAPHS).question(number), notation="pairs")
    example = encode_staged(record, tokenizer, "coconut")
    ids = [*example.question, *sum(example.steps, []), *example.answer]
    assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
    text = " \n ".join([record["question"], *record["steps"], f"### {record['answer']}"])
    assert tokenizer.decode(ids[:-1]) == text
    assert all(len(step) == 3 for step in example.steps)


def test_the_base_becomes_a_latent_model(tmp_path: Path) -> None:
    model, processor = load_latent_model(save_graph_base(tmp_path / "base"), method="coconut")
    assert model.config.get_text_config().num_hidden_layers == 4
    assert model.get_input_embeddings().weight.shape[0] >= len(processor.tokenizer)
    assert model.generation_config.latent_strategy == "staged"
    marks = processor.tokenizer.convert_tokens_to_ids("<<")
    rows = model.get_input_embeddings().weight
    assert rows[processor.latent_token_id].equal(rows[marks])  # as published
