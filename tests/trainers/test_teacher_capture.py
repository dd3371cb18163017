"""Signals of a teacher: batches against single runs, eager attention and autograd; the model is left alone."""

import copy
import json
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ChameleonProcessor, PreTrainedModel, ProcessorMixin

from tests import tiny
from tests.latent import liven, tiny_latent_model
from tests.tiny import CHAMELEON, FAMILIES, tiny_images, tiny_stock_model
from trainers import teacher_capture
from trainers.teacher_capture import (
    AGGREGATIONS,
    CapturedSignals,
    GradientOptions,
    aggregate_tokens,
    capture_attention,
    capture_gradient,
    generate_answers,
    gradient_prompts,
    split_steps,
    teacher_prompt,
    topk_indices,
)
from trainers.tiny import DEFAULT_FAMILY, build_tiny_image_processor
from trainers.tiny_chameleon import IMAGE_TOKENS

ALL = (*FAMILIES, CHAMELEON)
KINDS = ("stock", "latent")
QUESTIONS = ["What is it?", "Is the path safe? Answer with the option's letter.", "Where?"]
ANSWERS = ["A small dog.", "B", "Left of the house, behind the two trees and the gate."]
PIECES = ["<step>look at the dog</step>", "<step>it is small</step>"]


def build(family: str, kind: str = "stock", implementation: str = "sdpa") -> PreTrainedModel:
    """A tiny teacher with large weights: its attention is far from uniform."""
    made = tiny_stock_model if kind == "stock" else tiny_latent_model
    model = liven(made(0, family=family), 4.0)
    model.set_attn_implementation(implementation)
    return model


def tiny_processor(family: str = DEFAULT_FAMILY) -> ProcessorMixin:
    """As that of the other tests, with images of up to 64 tokens."""
    processor = tiny.tiny_processor(family)
    if family != CHAMELEON:
        processor.image_processor = build_tiny_image_processor(max_pixels=64 * 28 * 28, family=family)
    return processor


def images() -> list[Image.Image]:
    """Three of different size, each of several rows and columns of tokens."""
    return [image.resize((3 * image.width, 3 * image.height)) for image in tiny_images(3)]


def encode(
    processor: ProcessorMixin, text: str, image: Image.Image, model: PreTrainedModel
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One prompt as the processor gives it, and where its image tokens are, `(L,)`."""
    inputs = dict(processor(text=[text], images=[image], return_tensors="pt"))
    return inputs, inputs["input_ids"][0] == model.config.image_token_id


def assert_same(ours: CapturedSignals, theirs: CapturedSignals) -> None:
    assert ours.grid == theirs.grid
    for name in ("concept", "attention", "scores"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=2e-5, rtol=1e-4)


# Attention


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ALL)
def test_a_batch_equals_single_runs(family: str, kind: str) -> None:
    """Rows of different length, with images of different size, in one padded batch."""
    model, processor, pictures = build(family, kind), tiny_processor(family), images()
    together = capture_attention(model, processor, pictures, QUESTIONS, ANSWERS)
    for sample, signals in enumerate(together):
        one = slice(sample, sample + 1)
        (alone,) = capture_attention(model, processor, pictures[one], QUESTIONS[one], ANSWERS[one])
        assert_same(signals, alone)
        tokens = signals.grid[0] * signals.grid[1]
        assert signals.concept.shape == (tokens, 64) and signals.attention.shape == signals.scores.shape == (tokens,)
        assert signals.concept.dtype == signals.attention.dtype == signals.scores.dtype == torch.float32
        assert float(signals.attention.min()) == 0 and float(signals.attention.max()) > 0.99
    grids = {signals.grid for signals in together}
    assert grids == {(4, 4)} if family == CHAMELEON else len(grids) > 1
    assert not torch.allclose(together[0].concept.mean(0), together[1].concept.mean(0), atol=1e-2)


def expected_scores(
    model: PreTrainedModel, processor: ProcessorMixin, sample: int, layers: int, rows: slice | None = None
) -> torch.Tensor:
    """From the weights that eager attention returns, `(N,)`; rows default to all behind the image."""
    text = teacher_prompt(processor, QUESTIONS[sample], ANSWERS[sample])
    inputs, is_image = encode(processor, text, images()[sample], model)
    last = int(is_image.nonzero().max())
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    used = torch.stack(attentions[-layers:])[:, 0, :, rows or slice(last + 1, None)]
    return used.mean(dim=(0, 1, 2))[is_image]


@pytest.mark.parametrize("num_layers", [1, 8, None])
@pytest.mark.parametrize("family", ALL)
def test_needed_rows_equal_full_eager_attention(family: str, num_layers: int | None) -> None:
    """Beside fused attention, for a batch; 8 layers are more than there are."""
    model, processor = build(family), tiny_processor(family)
    found = capture_attention(model, processor, images(), QUESTIONS, ANSWERS, num_layers=num_layers)
    eager = build(family, implementation="eager")
    for sample, signals in enumerate(found):
        expected = expected_scores(eager, processor, sample, num_layers or 2)
        torch.testing.assert_close(signals.scores, expected, atol=1e-5, rtol=1e-4)
        scaled = (expected - expected.min()) / (expected.max() - expected.min() + 1e-10)
        torch.testing.assert_close(signals.attention, scaled, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ALL)
def test_rows_of_the_answer_alone(family: str) -> None:
    """Neither the question nor the marker behind the answer; without an answer the last row of the prompt."""
    model, processor = build(family), tiny_processor(family)
    eager = build(family, implementation="eager")
    found = capture_attention(model, processor, images(), QUESTIONS, ANSWERS, rows="answer")
    for sample, signals in enumerate(found):
        count = len(processor.tokenizer(ANSWERS[sample], add_special_tokens=False).input_ids)
        behind = 1 if family == CHAMELEON else 2
        rows = slice(-behind - count, -behind)
        torch.testing.assert_close(
            signals.scores, expected_scores(eager, processor, sample, 2, rows), atol=1e-5, rtol=1e-4
        )
    both = {
        rows: capture_attention(model, processor, images()[:1], QUESTIONS[:1], [""], rows=rows)[0].scores
        for rows in ("answer", "after_image")
    }
    inputs, is_image = encode(processor, teacher_prompt(processor, QUESTIONS[0], ""), images()[0], eager)
    with torch.no_grad():
        last = torch.stack(eager(**inputs, output_attentions=True).attentions)[:, 0, :, -1].mean((0, 1))[is_image]
    torch.testing.assert_close(both["answer"], last, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both["after_image"], last, atol=1e-4)


def test_rows_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build("qwen2_5_vl"), tiny_processor()
    given = (model, processor, images(), QUESTIONS, ANSWERS)
    whole = capture_attention(*given)
    monkeypatch.setattr(teacher_capture, "_ROWS_AT_ONCE", 5)
    for ours, theirs in zip(capture_attention(*given), whole, strict=True):
        assert_same(ours, theirs)


class _Squares(TorchDispatchMode):
    """Shapes of the tensors made inside, whose last two sizes are equal and at least `length`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.found = length, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if torch.is_tensor(each) and each.dim() > 1 and each.shape[-1] == each.shape[-2] >= self.length:
                self.found.add(tuple(each.shape))
        return made


@pytest.mark.parametrize("family", ALL)
def test_nothing_of_size_length_times_length(family: str) -> None:
    """Neither weights nor a mask: the same call with eager attention, and that alone, makes some."""
    processor, answers = tiny_processor(family), ["It is a dog. " * 30, "No. " * 5, "B"]
    found = {}
    for implementation in ("sdpa", "eager"):
        model = build(family, implementation=implementation)
        with _Squares(200) as squares:
            capture_attention(model, processor, images(), QUESTIONS, answers)
        found[implementation] = squares.found
    assert not found["sdpa"] and found["eager"], found


@pytest.mark.parametrize("family", ALL)
def test_concept_is_the_residual_stream_before_the_final_norm(family: str) -> None:
    """The output of the last decoder layer, which the final norm turns into the last hidden state."""
    model, processor = build(family), tiny_processor(family)
    (signals,) = capture_attention(model, processor, images()[:1], QUESTIONS[:1], ANSWERS[:1])
    text = teacher_prompt(processor, QUESTIONS[0], ANSWERS[0])
    inputs, is_image = encode(processor, text, images()[0], model)
    decoder, seen = model.get_decoder(), []
    handle = decoder.layers[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        final = model(**inputs, output_hidden_states=True).hidden_states[-1][0, is_image]
        handle.remove()
        torch.testing.assert_close(decoder.norm(signals.concept), final, atol=1e-4, rtol=1e-4)
    state = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(signals.concept, state[0, is_image], atol=1e-4, rtol=1e-4)


def test_two_questions_on_one_image_have_one_concept() -> None:
    """A teacher cannot see the question from its image tokens; attention differs."""
    model, processor, picture = build("qwen3_vl"), tiny_processor("qwen3_vl"), images()[2]
    first, second = capture_attention(model, processor, [picture] * 2, QUESTIONS[:2], ANSWERS[:2])
    torch.testing.assert_close(first.concept, second.concept, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first.scores, second.scores, atol=1e-4)


def test_pieces_are_joined_by_newlines_and_a_system_message_is_used() -> None:
    model, processor = build("qwen2_5_vl"), tiny_processor()
    given = (model, processor, images()[:1], QUESTIONS[:1])
    (pieces,) = capture_attention(*given, [PIECES])
    (text,) = capture_attention(*given, ["\n".join(PIECES)])
    assert torch.equal(pieces.scores, text.scores)
    (other,) = capture_attention(*given, [PIECES], system_message="Look.")
    assert not torch.allclose(other.concept, text.concept, atol=1e-3)
    prompt = teacher_prompt(processor, "Why?", "So.", system_message="Look.")
    assert "Look." in prompt and processor.default_system_message not in prompt


@pytest.mark.parametrize("family", ALL)
def test_weights_in_bfloat16(family: str) -> None:
    """Signals are float32 and near those of the same weights in float32."""
    processor, pictures = tiny_processor(family), images()
    exact = capture_attention(build(family).bfloat16().float(), processor, pictures, QUESTIONS, ANSWERS)
    model = build(family).bfloat16()
    if family == CHAMELEON:
        model.model.vqmodel.float()  # its choices of image tokens are not continuous
    for ours, theirs in zip(capture_attention(model, processor, pictures, QUESTIONS, ANSWERS), exact, strict=True):
        for name in ("concept", "attention", "scores"):
            assert getattr(ours, name).dtype == torch.float32
        assert torch.cosine_similarity(ours.concept.mean(0), theirs.concept.mean(0), dim=0) > 0.9
    model.bfloat16()
    (signals, _) = capture_gradient(model, processor, pictures[0], QUESTIONS[0], PIECES)
    assert signals.attention.dtype == signals.token_attention.dtype == torch.float32
    torch.testing.assert_close(signals.attention.sum(), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert len(generate_answers(model, processor, pictures, QUESTIONS, max_new_tokens=3)) == 3


# Gradients


def naive_gradients(
    model: PreTrainedModel, processor: ProcessorMixin, texts: list[str], position: int, deep_stack: bool = False
) -> torch.Tensor:
    """`(N,)` from autograd on the embeddings that the decoder is given, for the token behind `position`."""
    inputs, is_image = encode(processor, texts[-1], images()[0], model)
    ids, decoder, given = inputs["input_ids"], model.get_decoder(), {}
    with torch.no_grad():
        features = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        encoded = model.model.get_image_features(**features, return_dict=True)
        embeds = model.get_input_embeddings()(ids)
        embeds[0, is_image] = torch.cat(list(encoded.pooler_output)).view(-1, embeds.shape[-1])
    if "image_grid_thw" in inputs:
        given["position_ids"] = model.model.get_rope_index(
            ids, image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=inputs["mm_token_type_ids"]
        )[0]
    leaves = [embeds.requires_grad_()]
    if "deepstack_features" in encoded:
        deep = [torch.cat(list(layer)).detach().requires_grad_() for layer in encoded.deepstack_features]
        given |= {"deepstack_visual_embeds": deep, "visual_pos_masks": is_image[None]}
        leaves += deep if deep_stack else []
    states = decoder(inputs_embeds=embeds, **given).last_hidden_state
    logits = model.lm_head(states)[0, position].float()
    if hasattr(model.model, "vocabulary_mapping"):
        logits[model.model.vocabulary_mapping.image_tokens] = -float("inf")
    found = torch.autograd.grad(-logits.log_softmax(-1)[ids[0, position + 1]], leaves)
    return torch.cat([found[0][0, is_image], *found[1:]], dim=-1).abs().mean(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ALL)
def test_gradients_equal_autograd(family: str, kind: str) -> None:
    """Of the second piece: facts and distribution of each token, by one plain backward a token."""
    model, stock, processor = build(family, kind), build(family), tiny_processor(family)
    options = GradientOptions(tau=0.05, max_grad_calls_per_step=3, aggregation="simple_avg")
    texts = gradient_prompts(processor, QUESTIONS[0], PIECES, options)
    for deep_stack in (False, True) if family == "qwen3_vl" else (False,):
        options = GradientOptions(**{**vars(options), "deep_stack": deep_stack})
        signals = capture_gradient(model, processor, images()[0], QUESTIONS[0], PIECES, options)[1]
        assert len(signals.steps) == 3 and signals.scores is None
        for step, p in zip(signals.steps, signals.token_attention, strict=True):
            g = naive_gradients(stock, processor, texts, step["position"], deep_stack)
            torch.testing.assert_close(p, (g / 0.05).softmax(-1), atol=1e-4, rtol=1e-3)
            facts = {"max": g.max(), "mean": g.mean(), "sum": g.sum(), "strength": g.max() / (g.sum() + 1e-10)}
            for name, value in facts.items():
                assert step[name] == pytest.approx(float(value), rel=1e-3, abs=1e-6), name
            assert step["entropy"] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)
            assert float(g.max()) > 1e-4
        torch.testing.assert_close(signals.attention, signals.token_attention.mean(0))
        json.dumps(signals.steps)


@pytest.mark.parametrize("family", ALL)
def test_gradient_concept_and_grid_are_those_of_the_attention_method(family: str) -> None:
    model, processor, picture = build(family), tiny_processor(family), images()[0]
    (attention,) = capture_attention(model, processor, [picture], QUESTIONS[:1], ANSWERS[:1])
    for signals in capture_gradient(model, processor, picture, QUESTIONS[0], PIECES):
        torch.testing.assert_close(signals.concept, attention.concept, atol=1e-4, rtol=1e-4)
        assert signals.grid == attention.grid and signals.attention.shape == attention.attention.shape


def test_which_tokens_are_differentiated() -> None:
    """The walk through a piece: limits, stride, markup, and the last token where nothing is left."""
    model, processor = build("qwen2_5_vl"), tiny_processor()
    texts = gradient_prompts(processor, QUESTIONS[0], PIECES)
    lengths = [encode(processor, text, images()[0], model)[0]["input_ids"].shape[1] for text in texts]
    ids = encode(processor, texts[1], images()[0], model)[0]["input_ids"][0]
    words = [processor.tokenizer.decode([each]) for each in ids]

    def walked(**options: Any) -> list[int]:
        first, second = capture_gradient(
            model, processor, images()[0], QUESTIONS[0], PIECES, GradientOptions(**options)
        )
        assert all(step["position"] + 1 >= lengths[1] for step in second.steps)
        assert [step["token_id"] for step in first.steps] == [int(ids[s["position"] + 1]) for s in first.steps]
        return [step["position"] + 1 for step in first.steps]

    span = list(range(lengths[0], lengths[1]))
    text_alone = [i for i in span if "<" not in words[i] and ">" not in words[i]]
    assert 0 < len(text_alone) < len(span) and words[span[0]] == "<|im_start|>"
    assert walked(max_grad_calls_per_step=99) == text_alone
    assert walked(skip_markup=False, max_grad_calls_per_step=99) == span
    assert walked(max_grad_calls_per_step=2) == text_alone[:2]
    assert walked(max_tokens_per_step=4) == [i for i in text_alone if i < span[0] + 4]
    assert walked(downsample=3, max_grad_calls_per_step=99) == [i for i in span[::3] if i in text_alone]
    assert walked(max_tokens_per_step=0) == walked(max_grad_calls_per_step=0) == span[-1:]


def test_the_image_is_encoded_once_and_a_piece_run_once() -> None:
    model, processor = build("qwen2_5_vl"), tiny_processor()
    runs = {"vision": 0, "head": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    model.model.visual.register_forward_hook(count("vision"))
    model.lm_head.register_forward_hook(count("head"))
    with torch.no_grad():
        found = capture_gradient(model, processor, images()[0], QUESTIONS[0], PIECES)
    assert len(found) == 2 and runs == {"vision": 1, "head": 2}


def test_prompts_of_the_steps() -> None:
    """The number of steps in the system message; a prompt with pieces has no end of turn."""
    processor = tiny_processor()
    options = GradientOptions(system_message="{num_steps} steps {x}", user_text="Q: {question} {y}")
    none, one, two = gradient_prompts(processor, "Why?", PIECES, options)
    assert none.startswith("<|im_start|>system\n2 steps {x}<|im_end|>\n") and none.endswith("Q: Why? {y}<|im_end|>\n")
    assert one == f"{none}<|im_start|>assistant\n{PIECES[0]}\n" and two == f"{one}{PIECES[1]}\n"
    assert "exactly 2 reasoning steps" in gradient_prompts(processor, "Why?", PIECES)[0]
    plain = gradient_prompts(processor, "Why?", PIECES, GradientOptions(system_message=None))[0]
    assert processor.default_system_message in plain


# Answers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ALL)
def test_answers_of_a_batch_equal_single_ones(family: str, kind: str) -> None:
    """Greedy, also where the model would think in latents by itself."""
    model, processor = build(family, kind), tiny_processor(family)
    model.generation_config.do_sample = True
    together = generate_answers(model, processor, images(), QUESTIONS, max_new_tokens=6)
    for sample in range(3):
        inputs, _ = encode(processor, teacher_prompt(processor, QUESTIONS[sample]), images()[sample], model)
        options = {"latent_strategy": "off"} if kind == "latent" else {}
        sequences = model.generate(**inputs, max_new_tokens=6, repetition_penalty=1.05, do_sample=False, **options)
        written = sequences[:, inputs["input_ids"].shape[1] :]
        assert [together[sample]] == processor.batch_decode(written, skip_special_tokens=True)
    blind = generate_answers(model, processor, images(), QUESTIONS, max_new_tokens=6, with_image=False)
    assert len(blind) == 3 and blind != together


def test_no_sample_gives_nothing() -> None:
    model, processor = build("qwen2_5_vl"), tiny_processor()
    assert generate_answers(model, processor, [], []) == capture_attention(model, processor, [], [], []) == []


# The model and other processors


def state(model: PreTrainedModel) -> list[Any]:
    """What a call might change."""
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [parameter.grad is None for parameter in model.parameters()],
        model.get_decoder().config._attn_implementation,
        getattr(model.model, "rope_deltas", None),
    ]


@pytest.mark.parametrize("family", ["qwen3_vl", CHAMELEON])
def test_the_model_is_left_as_it_was(family: str) -> None:
    """Also after an error: modes module by module, frozen parameters, hooks, and the positions it remembers."""
    model, processor = build(family).train(), tiny_processor(family)
    model.lm_head.eval()
    model.lm_head.requires_grad_(False)
    marker = torch.tensor([[3]])
    if family != CHAMELEON:
        model.model.rope_deltas = marker
    before = state(model)
    capture_attention(model, processor, images(), QUESTIONS, ANSWERS)
    capture_gradient(model, processor, images()[0], QUESTIONS[0], PIECES)
    generate_answers(model, processor, images(), QUESTIONS, max_new_tokens=2)
    assert state(model) == before
    handle = model.get_decoder().norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture_attention(model, processor, images(), QUESTIONS, ANSWERS)
    with pytest.raises(ZeroDivisionError):
        capture_gradient(model, processor, images()[0], QUESTIONS[0], PIECES)
    handle.remove()
    assert state(model) == before


def test_the_stock_processor_of_chameleon() -> None:
    """It has no template and writes a separator behind every text."""
    ours, model = tiny_processor(CHAMELEON), build(CHAMELEON)
    stock = ChameleonProcessor(ours.image_processor, ours.tokenizer, image_seq_length=IMAGE_TOKENS)
    given = images(), QUESTIONS, ANSWERS
    assert stock.chat_template is None
    for theirs, expected in zip(
        capture_attention(model, stock, *given), capture_attention(model, ours, *given), strict=True
    ):
        assert_same(theirs, expected)


def test_a_model_with_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    model, processor = build("qwen2_5_vl"), tiny_processor()
    given = images(), QUESTIONS, ANSWERS
    expected = capture_attention(model, processor, *given)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=r".*language_model.*\.q_proj"))
    for ours, theirs in zip(capture_attention(adapted, processor, *given), expected, strict=True):
        assert_same(ours, theirs)
    assert generate_answers(adapted, processor, *given[:2], max_new_tokens=3) == generate_answers(
        model, processor, *given[:2], max_new_tokens=3
    )
    assert len(capture_gradient(adapted, processor, images()[0], QUESTIONS[0], PIECES)) == 2


# Functions


def test_split_steps() -> None:
    text = "x <step> a </step>\n<STEP>b\nc</Step> y <step>d</step>"
    assert split_steps(text, 2) == ["<step>a</step>", "<step>b\nc</step>"]
    with pytest.raises(ValueError, match="the answer has 3 <step> tags and 4 steps are asked for"):
        split_steps(text, 4)


def test_aggregation_is_a_distribution() -> None:
    """Whatever the method, also where nothing passes; one token alone is what it was."""
    p = torch.rand(4, 6).softmax(-1)
    strength, entropy = torch.tensor([0.05, 0.2, 0.3, 0.01]), torch.tensor([0.1, 1.2, 0.7, 0.4])
    for method in AGGREGATIONS:
        for threshold in (0.1, 9.0):
            limits = {"attribution_threshold": threshold, "min_entropy": 5 * threshold}
            found = aggregate_tokens(p, strength, entropy, method, **limits)
            torch.testing.assert_close(found.sum(), torch.tensor(1.0))
            torch.testing.assert_close(aggregate_tokens(p[1:2], strength[1:2], entropy[1:2], method, **limits), p[1])
    torch.testing.assert_close(aggregate_tokens(p, strength, entropy, "filter_by_threshold"), (p[1] + p[2]) / 2)
    weights = torch.tensor([1.2, 0.7]).softmax(0)
    torch.testing.assert_close(
        aggregate_tokens(p, strength, entropy, "entropy_weighted"), weights[0] * p[1] + weights[1] * p[2]
    )


def test_topk() -> None:
    values = torch.tensor([0.1, 0.9, 0.5])
    assert topk_indices(values, 2).tolist() == [1, 2] and topk_indices(values, 8).tolist() == [1, 2, 0]


# Errors


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answers": ANSWERS[:2]}, "'answers': 2}; pass lists of the same length"),
        ({"rows": "all"}, r"rows='all' is unknown; choose one of \['after_image', 'answer'\]"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1, or None for all layers"),
    ],
)
def test_what_cannot_be_captured_is_refused(changed: dict[str, Any], message: str) -> None:
    given = {"images": images(), "questions": QUESTIONS, "answers": ANSWERS, **changed}
    with pytest.raises(ValueError, match=message):
        capture_attention(build("qwen2_5_vl"), tiny_processor(), **given)


def test_a_processor_of_another_model_is_refused() -> None:
    model, processor = build("qwen2_5_vl"), tiny_processor()
    model.config.image_token_id += 1
    with pytest.raises(ValueError, match=r"row 0 has 0 image tokens \(id \d+\), and its image is 6 x 9 tokens; pass"):
        capture_attention(model, processor, images(), QUESTIONS, ANSWERS)
    processor.chat_template = None
    with pytest.raises(ValueError, match="LatentProcessor has no chat template; give it one"):
        teacher_prompt(processor, "Why?")


def test_answers_behind_another_opening_are_refused() -> None:
    """A template that opens a reply with a thought, and writes answers without."""
    model, processor = build("qwen2_5_vl"), tiny_processor()
    processor.chat_template = processor.chat_template.replace(
        "{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>' }}"
    ).replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
    assert teacher_prompt(processor, "Why?").endswith("<think>")
    given = (model, processor, images(), QUESTIONS, ANSWERS)
    with pytest.raises(ValueError, match="row 0: the chat template writes something before an answer"):
        capture_attention(*given, rows="answer")
    assert len(capture_attention(*given)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "max"}, "aggregation='max' is unknown; choose one of"),
        ({"tau": 0.0}, "tau=0.0 must be above 0"),
        ({"downsample": 0}, "downsample=0 must be at least 1"),
        ({"max_tokens_per_step": -1}, "max_tokens_per_step=-1 must be at least 0"),
        ({"user_text": "Question"}, r"user_text='Question' has no \{question\}"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientOptions(**options)


def test_no_pieces_are_refused() -> None:
    with pytest.raises(ValueError, match="no pieces: the gradient method looks at what the teacher said"):
        capture_gradient(build("qwen2_5_vl"), tiny_processor(), images()[0], "Why?", [])
    with pytest.raises(ValueError, match="aggregation='none' is unknown"):
        aggregate_tokens(torch.ones(1, 1), torch.ones(1), torch.ones(1), "none")
