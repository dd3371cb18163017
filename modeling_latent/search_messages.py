"""The messages of a prompt of the search over latents: system instruction, wrapped question, thought block.

Source: DMLR, arXiv 2512.12623 and its published code; see `search_prompts.py`, which renders them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think><answer> answer here </answer>"
)
COT_TEMPLATES = (
    "Please analyze the image carefully and solve this problem step by step.\nShow your reasoning process clearly, "
    "then put your final answer within \\boxed{}.\n\nQuestion: ",
    "Let's solve this visual math problem step by step:\n1. First, carefully observe the image and identify all "
    "relevant information.\n2. Break down the problem into smaller steps.\n3. Show your calculations and reasoning "
    "for each step.\n4. Finally, provide your answer within \\boxed{}.\n\nQuestion: ",
    "Please provide your final answer within \\boxed{}.\n\nQuestion: ",
)
_SEPARATOR = "\n\n"
_STEPS = (
    "The following special tokens represent YOUR INTERNAL THINKING SPACE where your reasoning happens implicitly.\n"
    "You do NOT need to output explicit reasoning steps"
)
_ANSWER = "After these tokens, directly provide your final answer."
_IMAGE_TYPES = ("image", "image_url")
_IMAGE_SOURCES = ("image", "url", "path", "base64", "image_url")


@dataclass(frozen=True)
class ChatStyle:
    """What all rows of a prompt share.

    Args:
        owner: name of the processor's class, for errors.
        has_parts: contents are lists of parts, which may hold images; else strings.
        placeholder: the token that stands for a thought.
        image_token: the placeholder of an image; None without images.
        mode: `"paper"` or `"reference"`.
    """

    owner: str
    has_parts: bool
    placeholder: str
    image_token: str | None
    mode: str


@dataclass(frozen=True)
class SearchChat:
    """The chat of one row.

    Args:
        style: see [`ChatStyle`].
        row: named by errors.
        messages: `{"role", "content"}`; image parts are `{"type": "image"}`.
        images: what stands for the image parts, in order.
    """

    style: ChatStyle
    row: int
    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)

    @property
    def system_texts(self) -> list[str]:
        """What the system messages say."""
        return [text_of(each["content"]) for each in self.messages if each["role"] == "system"]

    def with_thoughts(self, restated: str | None, number: int) -> "SearchChat":
        """The chat with the thought block at its end, behind a blank line where the turn has text, and with the system
        instruction unless it has its own.

        Args:
            restated: question that the block repeats; None for a block without.
            number: thought tokens.
        """
        content = self.messages[-1]["content"]
        block = (_SEPARATOR if text_of(content) else "") + thought_block(restated, number, self.style)
        content = content + block if isinstance(content, str) else [*content, {"type": "text", "text": block}]
        messages = [*self.messages[:-1], {**self.messages[-1], "content": content}]
        if not self.system_texts:
            messages.insert(0, {"role": "system", "content": _content(self.style, [], SYSTEM_PROMPT)})
        return replace(self, messages=messages)

    def folded(self) -> "SearchChat":
        """The chat with the text of the system messages at the beginning of the user's first turn."""
        system = _SEPARATOR.join(self.system_texts) + _SEPARATOR
        rest = [dict(message) for message in self.messages if message["role"] != "system"]
        first = next(message for message in rest if message["role"] == "user")
        content = first["content"]
        text = {"type": "text", "text": system}
        first["content"] = system + content if isinstance(content, str) else [text, *content]
        return replace(self, messages=rest)


def question_chat(
    style: ChatStyle, row: int, question: str | None, image: Any, prompt_index: int | None
) -> SearchChat:
    """The user's turn: the image, and the question in a template; an empty text for `prompt_index=None`.

    Raises:
        ValueError: no question, one that holds a placeholder, an image where none can be.
    """
    if not isinstance(question, str):
        raise ValueError(f"row {row}: question must be a string, got {question!r:.80}")
    _refuse_tokens(style, row, [question])
    if image is not None and not style.has_parts:
        raise ValueError(f"row {row}: {style.owner} takes text alone, and the row has an image; leave it out")
    text = ""
    if prompt_index is not None:
        text = COT_TEMPLATES[prompt_index] + (repr([question]) if style.mode == "reference" else question)
    images = [] if image is None else [image]
    return SearchChat(style, row, [{"role": "user", "content": _content(style, images, text)}], images)


def caller_chat(style: ChatStyle, row: int, messages: Any, question: str | None, image: Any) -> SearchChat:
    """A copy of the caller's chat; `image` stands in for its first image.

    Raises:
        ValueError: no chat that ends with the user's turn, images without a part or a source, a placeholder in the
            last turn.
    """
    if question is not None and not isinstance(question, str):
        raise ValueError(f"row {row}: question must be a string, got {question!r:.80}")
    usable = isinstance(messages, Sequence) and messages and all(isinstance(each, Mapping) for each in messages)
    if not usable or messages[-1].get("role") != "user":
        found = messages[-1].get("role") if usable else messages
        raise ValueError(
            f"row {row}: messages must be a list of {{'role', 'content'}} that ends with the user's turn, which takes "
            f"the thought tokens; it ends with {found!r:.80}"
        )
    images: list[Any] = []
    copied = [{**each, "content": _copied(style, row, each.get("content"), images)} for each in messages]
    _refuse_tokens(style, row, [question or "", text_of(copied[-1]["content"])])
    if image is not None and not images:
        raise ValueError(
            f"row {row}: an image is given, and the messages hold no {{'type': 'image'}} part for it; add one"
        )
    images[:1] = [image] if image is not None else images[:1]
    if any(each is None for each in images):
        raise ValueError(
            f"row {row}: image {[each is None for each in images].index(True)} of the messages has no source; pass "
            "image=..., or {'type': 'image', 'image': ...}"
        )
    return SearchChat(style, row, copied, images)


def thought_block(question: str | None, number: int, style: ChatStyle) -> str:
    """The text that ends with the thought tokens."""
    begin = "" if question is None else f"PROBLEM: {question}\n\n"
    stop, space = ("", "") if style.mode == "reference" else (".", " ")
    here = f"Here are the {number} special tokens: {style.placeholder * number}"
    return f"{begin}{_STEPS}{stop}{space}{_ANSWER}{space}{here}"


def text_of(content: Any) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _content(style: ChatStyle, images: Sequence[Any], text: str) -> Any:
    if not style.has_parts:
        return text
    return [{"type": "image"} for _ in images] + ([{"type": "text", "text": text}] if text else [])


def _copied(style: ChatStyle, row: int, content: Any, images: list[Any]) -> Any:
    """The content of a message, its images taken out into `images`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(
            f"row {row}: the content of a message must be a string or a list of parts, got {content!r:.80}"
        )
    parts = []
    for part in content:
        if part.get("type") in _IMAGE_TYPES or ("type" not in part and "image" in part):
            source = next((part[name] for name in _IMAGE_SOURCES if part.get(name) is not None), None)
            images.append(source.get("url") if isinstance(source, Mapping) else source)
            parts.append({"type": "image"})
        elif isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError(f"row {row}: a part of a message must be an image or a text, got {part!r:.80}")
    if images and not style.has_parts:
        raise ValueError(f"row {row}: {style.owner} takes text alone, and the messages hold an image; leave it out")
    return parts if style.has_parts else text_of(parts)


def _refuse_tokens(style: ChatStyle, row: int, texts: Sequence[str]) -> None:
    for token, meaning in ((style.placeholder, "a thought"), (style.image_token, "an image")):
        if token and any(token in text for text in texts):
            raise ValueError(
                f"row {row}: the question contains {token!r}, which stands for {meaning}; remove it, or pass another "
                "placeholder=..."
            )


__all__ = [
    "COT_TEMPLATES",
    "SYSTEM_PROMPT",
    "ChatStyle",
    "SearchChat",
    "caller_chat",
    "question_chat",
    "text_of",
    "thought_block",
]
