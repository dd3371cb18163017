"""How a record becomes the texts of a stage curriculum: the formats of IVT-LR and Coconut, and their prompts.

Papers: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603 (IVT-LR; card 2.2,
2.3, 2.5 and 6.3), and "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769
(Coconut; card 11.2).

| format | question | before the answer | length limit |
|---|---|---|---|
| `ivtlr-qwen` | chat template; images, then `[Question]:{..}`, `[Options]:`, `(A).{..}` .., `Answer:`, NL | \
`Therefore, the answer is ` | 3400 |
| `ivtlr-chameleon` | `[Question]:{images..}`, `[Options]:`, `(A).{..}` .. | the same | 1400 |
| `coconut` | the text, NL; with the special tokens that the tokenizer adds | `### ` | none |
| `plain` | chat template; images, then the text | as `ivtlr-qwen` | none |

Both IVT-LR formats serve M3CoT (the answer is a letter) and ScienceQA (the answer is the index as a digit). Behind
every step stands NL, behind every answer the end token.
"""

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .records import Record, RecordError, record_origin

PROMPTS = ("training", "published_inference")


@dataclass(frozen=True)
class PromptStyle:
    """How the text of a question is written.

    Args:
        option: line of one option, from `letter` and `text`; None writes the bare question, without options.
        ending: what follows the last line.
        opening: what stands before everything.
        image: what stands for one image, from `image` (the image token), outside a chat template.
        images_in_braces: images stand inside the braces of the question, before its text, instead of before all.
        after_latents: text behind the latents.
    """

    option: str | None = None
    ending: str = ""
    opening: str = ""
    image: str = "{image}"
    images_in_braces: bool = False
    after_latents: str = ""


@dataclass(frozen=True)
class StagedFormat:
    """How a record is written.

    Args:
        name: of the format.
        training: style of the question.
        published_inference: style of the question in the published evaluation scripts, where it is another.
        chat: the question is the user turn of the chat template (images first, generation prompt on).
        image_token: of an image embedding, None for the processor's.
        special_tokens: the question is encoded with the special tokens that the tokenizer adds by itself.
        step_end: text behind each step.
        answer_prefix: text before the answer.
        max_length: limit of question, steps and answer in tokens, None for none.
    """

    name: str
    training: PromptStyle
    published_inference: PromptStyle | None = None
    chat: bool = False
    image_token: str | None = None
    special_tokens: bool = False
    step_end: str = "\n"
    answer_prefix: str = "Therefore, the answer is "
    max_length: int | None = None

    def style(self, prompt: str) -> PromptStyle:
        """The style for a kind of prompt.

        Raises:
            ValueError: for an unknown kind.
        """
        if prompt not in PROMPTS:
            raise ValueError(f"prompt={prompt!r} is unknown; choose 'training' or 'published_inference'")
        return self.training if prompt == "training" else self.published_inference or self.training


STAGED_FORMATS: dict[str, StagedFormat] = {
    made.name: made
    for made in (
        StagedFormat(
            name="ivtlr-qwen",
            training=PromptStyle("({letter}).{{{text}}}", ending="\nAnswer:\n"),
            published_inference=PromptStyle("{letter}.{{{text}}}", ending="\nAnswer:"),
            chat=True,
            max_length=3400,
        ),
        StagedFormat(
            name="ivtlr-chameleon",
            training=PromptStyle("({letter}).{{{text}}}", images_in_braces=True),
            published_inference=PromptStyle(
                "({letter}).{{{text}}}",
                ending="\nAnswer:",
                opening="<s>",
                image="<racm3:break>{image}<eoss>",
                after_latents="<reserved08706>",
            ),
            image_token="<image>",
            max_length=1400,
        ),
        StagedFormat(name="coconut", training=PromptStyle(ending="\n"), special_tokens=True, answer_prefix="### "),
        StagedFormat(name="plain", training=PromptStyle(), chat=True),
    )
}


def staged_format(fmt: str | StagedFormat) -> StagedFormat:
    """A format, by name or as it is.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(fmt, StagedFormat):
        return fmt
    if fmt not in STAGED_FORMATS:
        raise ValueError(f"unknown staged format {fmt!r}; choose one of {', '.join(STAGED_FORMATS)}")
    return STAGED_FORMATS[fmt]


# Text


def user_text(
    record: Record, fmt: str | StagedFormat, *, prompt: str = "training", image_token: str = "<image>"
) -> str:
    """What the user says, before the chat template; formats without one write the images here.

    Question and options are stripped, each on its own; only for images inside the braces a blank between them and the
    question stays, as published.

    Args:
        record: `question`, and `choices` where the format writes options (None or empty leaves them out).
        fmt: the format or its name.
        prompt: `"training"`, or `"published_inference"` for the prompt of the published evaluation scripts.
        image_token: stands for one image, unexpanded.

    Raises:
        RecordError: more choices than letters.
        ValueError: an unknown format or kind of prompt.

    Example:
        ```python
        user_text(make_record("0", "Which? ", "A", choices=["x", " y"]), "ivtlr-qwen")
        # '[Question]:{Which?}\\n[Options]:\\n(A).{x}\\n(B).{y}\\nAnswer:\\n'
        ```
    """
    fmt = staged_format(fmt)
    style = fmt.style(prompt)
    images = "" if fmt.chat else style.image.format(image=image_token) * len(record["images"] or [])
    if style.option is None:
        return style.opening + images + record["question"] + style.ending
    before, within = ("", images) if style.images_in_braces else (images, "")
    lines = [f"{style.opening}{before}[Question]:{{{(within + record['question']).strip()}}}"]
    if record["choices"]:
        lines += ["[Options]:", *_option_lines(record, style.option)]
    return "\n".join(lines) + style.ending


def _option_lines(record: Record, option: str) -> Iterator[str]:
    if len(record["choices"]) > len(string.ascii_uppercase):
        raise RecordError(
            *record_origin(record), f"{len(record['choices'])} choices, more than letters; remove the row"
        )
    for letter, text in zip(string.ascii_uppercase, record["choices"], strict=False):
        yield option.format(letter=letter, text=text.strip())


def question_text(record: Record, processor: Any, fmt: str | StagedFormat, *, prompt: str = "training") -> str:
    """The whole text before the latents, with one image token for each image.

    Args:
        record: see [`user_text`].
        processor: a processor, or a tokenizer with the chat template.
        fmt: the format or its name.
        prompt: see [`user_text`].

    Raises:
        ValueError: the format needs a chat template and there is none; see also [`user_text`].
    """
    fmt = staged_format(fmt)
    text = user_text(record, fmt, prompt=prompt, image_token=image_token_of(processor, fmt))
    if not fmt.chat:
        return text
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"the format {fmt.name!r} writes the question through the chat template, and {type(processor).__name__} "
            "has none; give it one (chat_template=...) or take the format 'coconut' or 'ivtlr-chameleon'"
        )
    return chat_prompt(processor, text, len(record["images"] or []))


def chat_prompt(processor: Any, text: str, num_images: int = 0, system: str | None = None) -> str:
    """The chat template around one user turn (images, then text) and the opening of the reply.

    Templates of models without images take the text of a turn as a string, not as a list of parts.

    Args:
        processor: a processor, or a tokenizer, with a chat template.
        text: what the user says.
        num_images: images of the turn.
        system: what the system says before it; default: what the template has there.
    """
    has_parts = bool(num_images) or hasattr(processor, "image_processor")

    def content(images: int, words: str) -> Any:
        return [*({"type": "image"} for _ in range(images)), {"type": "text", "text": words}] if has_parts else words

    messages = [] if system is None else [{"role": "system", "content": content(0, system)}]
    messages.append({"role": "user", "content": content(num_images, text)})
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def image_token_of(processor: Any, fmt: StagedFormat) -> str:
    """The token of an image embedding: that of the format, else of the processor or tokenizer, else Qwen-VL's."""
    tokenizer = getattr(processor, "tokenizer", processor)
    found = fmt.image_token or getattr(processor, "image_token", None) or getattr(tokenizer, "image_token", None)
    return found or "<|image_pad|>"
