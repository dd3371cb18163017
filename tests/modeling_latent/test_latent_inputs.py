"""Where latents enter a backbone, and the loss of the head class: vectors, masks, gradients, errors, stock numbers."""

from typing import Any

import pytest
import torch

from modeling_latent import latent_positions, replace_latents
from tests.latent import latent_token_ids, tiny_latent_model
from tests.tiny import tiny_stock_model

SLOT, START, END = latent_token_ids().values()
HIDDEN = 64


@pytest.fixture
def latents(inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Inputs with three slots, the mask of them, and dense vectors that are not a number anywhere else."""
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, -5:-3], mask[1, -9] = True, True
    embeds = torch.full((*mask.shape, HIDDEN), float("nan"))
    embeds[mask] = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(mask, SLOT)}, mask, embeds


def with_stock_embeds(stock: torch.nn.Module, inputs: dict, mask: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Logits of the stock class for embeddings in which the slots are replaced."""
    tokens = stock.get_input_embeddings()(inputs["input_ids"])
    stock.model.rope_deltas = None
    with torch.no_grad():
        return stock(**inputs, inputs_embeds=torch.where(mask.unsqueeze(-1), embeds, tokens)).logits


# The functions


def test_latent_positions() -> None:
    ids = torch.tensor([[1, 7, 8, 7], [9, 1, 8, 2]])
    assert latent_positions(ids, (7, None)).tolist() == [[False, True, False, True], [False] * 4]
    assert latent_positions(ids, (7, 8)).tolist() == [[False, True, True, True], [False, False, True, False]]
    assert not latent_positions(ids, (None, None)).any()


def test_replace_latents() -> None:
    tokens, vectors = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, False, False], [False, True, True]])
    mixed = replace_latents(tokens, vectors, mask)
    assert torch.equal(mixed[mask], vectors[mask]) and torch.equal(mixed[~mask], tokens[~mask])
    half = replace_latents(tokens.bfloat16(), vectors, mask)
    assert half.dtype == torch.bfloat16 and torch.equal(half[mask], vectors[mask].bfloat16())


def test_gradients_of_replace_latents() -> None:
    """Each side gets gradients exactly where it was taken."""
    tokens, vectors = torch.randn(1, 3, 2, requires_grad=True), torch.randn(1, 3, 2, requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    (replace_latents(tokens, vectors, mask) * 3.0).sum().backward()
    assert vectors.grad[0, :, 0].tolist() == [3.0, 0.0, 3.0] and tokens.grad[0, :, 0].tolist() == [0.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("vectors", "mask"), [((2, 3, 5), (2, 3)), ((2, 2, 4), (2, 3)), ((1, 3, 4), (2, 3)), ((2, 3, 4), (2, 2))]
)
def test_shapes_are_refused(vectors: tuple[int, ...], mask: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latent_embeds \(.*\) and latent_mask \(.*\) must match .* \(2, 3, 4\)"):
        replace_latents(torch.zeros(2, 3, 4), torch.zeros(vectors), torch.zeros(mask, dtype=torch.bool))


# The backbone


def test_vectors_take_the_place_of_embeddings(model: torch.nn.Module, stock: torch.nn.Module, latents: Any) -> None:
    """The mask defaults to the slot ids, and what stands elsewhere in `latent_embeds` is not read."""
    inputs, mask, embeds = latents
    expected = with_stock_embeds(stock, inputs, mask, embeds)
    with torch.no_grad():
        for given in ({}, {"latent_mask": mask}):
            logits = model(**inputs, latent_embeds=embeds, **given).logits
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_mask_wins_over_the_ids(model: torch.nn.Module, stock: torch.nn.Module, latents: Any) -> None:
    """A mask may mark positions of other ids (readable slots) and leave out slot ids (fed by their own embedding)."""
    inputs, _, _ = latents
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[1, -3:] = True
    embeds = torch.randn(*mask.shape, HIDDEN)
    expected = with_stock_embeds(stock, inputs, mask, embeds)
    with torch.no_grad():
        logits = model(**inputs, latent_embeds=embeds, latent_mask=mask).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_an_empty_mask_feeds_the_tokens(model: torch.nn.Module, stock: torch.nn.Module, latents: Any) -> None:
    inputs, mask, _ = latents
    with torch.no_grad():
        expected = stock(**inputs).logits
        none = torch.zeros_like(mask)
        assert torch.equal(model(**inputs, latent_mask=none).logits, expected)
        nothing = torch.full((*mask.shape, HIDDEN), float("nan"))
        torch.testing.assert_close(
            model(**inputs, latent_embeds=nothing, latent_mask=none).logits, expected, atol=1e-5, rtol=0
        )


def test_without_latents_it_is_the_stock_forward(
    model: torch.nn.Module, stock: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        ours, theirs = model(**inputs), stock(**inputs)
    assert torch.equal(ours.logits, theirs.logits)
    torch.testing.assert_close(model.lm_head(ours.last_hidden_state), ours.logits)
    assert torch.equal(ours.latent_states, ours.last_hidden_state), "without a head the state is fed as it is"


def test_inserted_patches_are_latents_too(stock: torch.nn.Module, latents: Any) -> None:
    inputs, mask, embeds = latents
    inputs = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == SLOT, 500)}
    model = tiny_latent_model(0, latent_patch_token_id=500)
    with torch.no_grad():
        expected = with_stock_embeds(tiny_stock_model(0), inputs, mask, embeds)
        torch.testing.assert_close(model(**inputs, latent_embeds=embeds).logits, expected, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="is a latent"):
            model(**inputs)


@pytest.mark.parametrize("given", [{}, {"latent_mask": "mask"}])
def test_a_missing_vector_is_named(model: torch.nn.Module, latents: Any, given: dict[str, str]) -> None:
    inputs, mask, _ = latents
    first = mask.shape[1] - 5
    message = rf"position {first} of row 0 is a latent \(token id {SLOT}\) but no vector was given; pass latent_embeds"
    with pytest.raises(ValueError, match=message):
        model(**inputs, **({"latent_mask": mask} if given else {}))


def test_the_wrong_shape_is_refused(model: torch.nn.Module, latents: Any) -> None:
    inputs, mask, embeds = latents
    for wrong in ({"latent_embeds": embeds[:, :-1]}, {"latent_embeds": embeds, "latent_mask": mask[:, 1:]}):
        with pytest.raises(ValueError, match="must match the input embeddings"):
            model(**inputs, **wrong)


def test_embeddings_and_latents(model: torch.nn.Module, stock: torch.nn.Module, latents: Any) -> None:
    """With embeddings given the vectors are put into them; without ids the mask must be given."""
    inputs, mask, embeds = latents
    tokens = 2.0 * stock.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        expected = stock(**inputs, inputs_embeds=torch.where(mask.unsqueeze(-1), embeds, tokens)).logits
        ours = model(**inputs, inputs_embeds=tokens, latent_embeds=embeds).logits
        ready = model(**inputs, inputs_embeds=torch.where(mask.unsqueeze(-1), embeds, tokens)).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ready, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="latent_embeds without input_ids needs an explicit latent_mask"):
        model(inputs_embeds=tokens, latent_embeds=embeds)


def test_gradients_reach_the_vectors_and_the_table(latents: Any) -> None:
    inputs, mask, embeds = latents
    model = tiny_latent_model(0).train()
    vectors = embeds.nan_to_num().requires_grad_()
    model(**inputs, latent_embeds=vectors).logits[:, -1].logsumexp(-1).sum().backward()
    assert (vectors.grad[mask].abs().sum(-1) > 0).all() and not vectors.grad[~mask].any()
    table = model.get_input_embeddings().weight.grad
    assert not table[SLOT].any(), "the slot's own embedding was not read"
    assert table[inputs["input_ids"][1, -1]].any()


# The loss


def labels_of(inputs: dict[str, torch.Tensor], columns: slice) -> torch.Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, columns] = inputs["input_ids"][:, columns]
    return labels.masked_fill(inputs["attention_mask"] == 0, -100)


@pytest.mark.parametrize("columns", [slice(-4, None), slice(0, None), slice(0, 1), slice(-1, None)])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(11)])
def test_loss_on_labelled_rows_is_the_stock_loss(inputs: dict[str, torch.Tensor], columns: slice, items: Any) -> None:
    """Value and gradients; a label in the first column predicts nothing."""
    labels = labels_of(inputs, columns)
    models = tiny_latent_model(0).train(), tiny_stock_model(0).train()
    losses = [model(**inputs, labels=labels, num_items_in_batch=items).loss for model in models]
    if not (labels[:, 1:] != -100).any() and items is None:
        assert losses[0].item() == 0.0 and losses[1].isnan()  # the stock mean of nothing
        losses[0].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in models[0].parameters())
        return
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)
    for loss in losses:
        loss.backward()
    theirs = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4, msg=name)


def test_only_labelled_rows_meet_the_head(inputs: dict[str, torch.Tensor]) -> None:
    """In train mode no logits are built for the others, and none are returned; in evaluation mode all are."""
    model = tiny_latent_model(0)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    labels = labels_of(inputs, slice(-3, None))
    assert model.train()(**inputs, labels=labels).logits is None
    assert seen == [(6, 512)]
    output = model.eval()(**inputs, labels=labels)
    assert output.logits.shape == (*labels.shape, 512) and seen[1:] == [(6, 512), (*labels.shape, 512)]
    shifted = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, shifted)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 7, 20])])
def test_logits_to_keep(model: torch.nn.Module, inputs: dict[str, torch.Tensor], keep: Any) -> None:
    index = slice(-keep, None) if isinstance(keep, int) else keep
    with torch.no_grad():
        whole, kept = model(**inputs), model(**inputs, logits_to_keep=keep)
    for name in ("logits", "last_hidden_state", "latent_states"):
        torch.testing.assert_close(kept[name], whole[name][:, index])


def test_tuples(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        named = model(**inputs, labels=labels_of(inputs, slice(-4, None)))
        plain = model(**inputs, labels=labels_of(inputs, slice(-4, None)), return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], named.loss) and torch.equal(plain[1], named.logits)


def test_tied_embeddings(latents: Any) -> None:
    inputs, mask, embeds = latents
    model, stock = tiny_latent_model(0, tie_word_embeddings=True), tiny_stock_model(0, tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        ours = model(**inputs, latent_embeds=embeds).logits
    torch.testing.assert_close(ours, with_stock_embeds(stock, inputs, mask, embeds), atol=1e-5, rtol=0)
