"""Readable decoding where a method has learned tokens in place of slots and markers."""

from modeling_latent.configuration_latent import LATENT_METHODS
from trainers.tiny import build_tiny_processor


def test_learned_tokens_read_as_what_they_would_have_said_or_by_their_names() -> None:
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS["lavit"].tokens)
    assert processor.latent_token_id is None and processor.latent_patch_token_id is None
    encode = processor.tokenizer.encode
    before, after, said = encode("What?"), encode("B<|im_end|>"), encode("Seats", add_special_tokens=False)
    learned = processor.latent_learned_token_ids
    ids = [*before, *learned[:2], *after]
    assert processor.decode_latent(ids) == "What?⟨<lvr1>·<lvr2>⟩B"
    assert processor.batch_decode_latent([ids, [*before, *after]]) == ["What?⟨<lvr1>·<lvr2>⟩B", "What?B"]
    assert processor.decode(ids, skip_special_tokens=True) == "What?B"
    ids = [*before, *[learned[0]] * len(said), *after]
    readable = [*before, *said, *after]
    assert processor.decode_latent(ids, readable) == "What?⟨Seats⟩B"
    assert processor.decode_latent(ids, [-1] * len(ids)) == f"What?⟨{len(said)} latents⟩B"
    assert processor.decode_latent(ids, latent_mask=[False] * len(ids)) == "What?B"
