"""Images and texts of a processor: what may be passed, what is read, and errors that name the image or the row."""

import os
from itertools import accumulate
from typing import Any

from PIL import Image
from transformers.image_utils import is_valid_image, load_image

# Hooks of `ProcessorMixin` that a processor with this mixin overrides.
IMAGE_HOOKS = ("prepare_inputs_layout", "validate_inputs", "replace_image_token", "_process_images")


class LatentImagesMixin:
    """For a processor class with an `image_token`, before `ProcessorMixin` and behind `LatentTokensMixin`."""

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[list | None, list | None, None, None]:
        """Make `text` a list, read the images (flat, or one list a text), and refuse videos and sound.

        Raises:
            ValueError: names the image that cannot be read.
        """
        for name, value in (("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"{type(self).__name__} takes images and text; got {name}={type(value).__name__}")
        if isinstance(text, str):
            text = [text]
        if text is not None and not isinstance(text, (list, tuple)):
            raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
        return _read_images(images), None if text is None else list(text), None, None

    def validate_inputs(self, images: list | None = None, text: list | None = None, **kwargs: Any) -> None:
        """Check that every text has as many placeholders as images, and no latent token that nobody allowed.

        Raises:
            ValueError: names the row of the text, the counts or the token, and the remedy.
        """
        for row, sample in enumerate(text or []):
            if not isinstance(sample, str):
                raise ValueError(f"text {row} must be a string, got {type(sample).__name__}")
        if text is not None:
            self.refuse_latent_tokens(text, bool(kwargs.get("allow_latent_tokens")))
            _check_counts([sample.count(self.image_token) for sample in text], images, self.image_token)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _process_images(self, images: list, **kwargs: Any) -> tuple[Any, list[str]]:
        flat = _flatten(images)
        try:
            return super()._process_images(flat, **kwargs)
        except (ValueError, TypeError, ArithmeticError, OSError):
            for index, image in enumerate(flat):
                try:
                    self.image_processor([image], **kwargs)
                except (ValueError, TypeError, ArithmeticError, OSError) as reason:
                    size = getattr(image, "size", getattr(image, "shape", None))
                    raise ValueError(
                        f"image {index} of this call ({type(image).__name__}, size {size}) was refused by "
                        f"{type(self.image_processor).__name__}: {reason}; resize, convert or drop it"
                    ) from reason
            raise


def _read_images(images: Any) -> list | None:
    """Images as a list, or as one list a text when they came so; `None` when there is none.

    Raises:
        ValueError: names the image that cannot be read.
    """
    if images is None:
        return None
    if getattr(images, "ndim", None) == 4:
        images = list(images)
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if all(image is None for image in images):
        return None
    if not any(isinstance(row, (list, tuple)) for row in images):
        return [_read_image(image, f"images[{i}]") for i, image in enumerate(images)]
    for row, inner in enumerate(images):
        if inner is not None and not isinstance(inner, (list, tuple)):
            raise ValueError(
                f"images[{row}] is a {type(inner).__name__} among lists; give one list a text, an empty one for a "
                "text without image"
            )
    rows = [
        [_read_image(image, f"images[{row}][{i}]") for i, image in enumerate(inner or [])]
        for row, inner in enumerate(images)
    ]
    return rows if any(rows) else None


def _read_image(image: Any, where: str) -> Any:
    reason = "not an image"
    try:
        if isinstance(image, (str, os.PathLike)):
            return load_image(os.fspath(image))
        if isinstance(image, Image.Image):
            image.load()
            return image
        if is_valid_image(image):
            return image
    except Exception as error:  # whatever Pillow or the download raises, the caller needs to know which image it was
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    raise ValueError(
        f"{where} cannot be read ({reason}): {repr(image)[:100]}; pass a PIL image, an array, or the path or URL of a "
        "file that Pillow opens"
    )


def _flatten(images: list) -> list:
    return [image for row in images for image in row] if isinstance(images[0], list) else images


def _check_counts(placeholders: list[int], images: list | None, token: str) -> None:
    """Compare the placeholders of each text with its images.

    Raises:
        ValueError: names the first row of the texts where they differ, and both counts.
    """
    remedy = f"put one {token} (a {{'type': 'image'}} part of a message) in the text for each of its images"
    if images is not None and not isinstance(images[0], list):
        if sum(placeholders) != len(images):
            ends = list(accumulate(placeholders))
            row = next((row for row, end in enumerate(ends) if end > len(images)), len(ends) - 1)
            raise ValueError(
                f"{len(images)} images for {sum(placeholders)} image placeholders ({placeholders} a text); text {row} "
                f"is the first that does not fit; {remedy}"
            )
        return
    given = [0] * len(placeholders) if images is None else [len(row) for row in images]
    if len(given) != len(placeholders):
        raise ValueError(f"{len(given)} lists of images for {len(placeholders)} texts; give one list a text")
    for row, (wanted, got) in enumerate(zip(placeholders, given, strict=True)):
        if wanted != got:
            raise ValueError(f"text {row} has {wanted} image placeholders and {got} images; {remedy}")


__all__ = ["IMAGE_HOOKS", "LatentImagesMixin"]
