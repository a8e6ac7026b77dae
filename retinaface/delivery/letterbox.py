"""From photos of any size to one input of the network, and back to the photos' own pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinaface.data.annotations import MEAN_BGR
from retinaface.errors import InputError
from retinaface.model.network import SMALLEST_PICTURE, NetworkConfig, Outputs, normalize
from retinaface.model.postprocess import Detections


class Letterboxed(NamedTuple):
    """Photos in the top left corners of inputs of one size.

    Attributes:
        images: ``(B, 3, H, W)`` float32, as from :func:`retinaface.model.network.normalize`; around the photos the mean
            colour, which is zero.
        extents: Height and width of each photo in its input, in pixels.
        scales: ``(B, 2)`` float32: width and height of each photo in its input, relative to its own.
    """

    images: Tensor
    extents: list[tuple[int, int]]
    scales: Tensor


def letterbox(
    images: Sequence[NDArray[np.uint8]], size: tuple[int, int] | None = None, longest: int | None = None
) -> Letterboxed:
    """Brings photos to one size.

    Args:
        images: At least one photo, ``(H, W, 3)`` uint8 BGR, as OpenCV reads it.
        size: Height and width in pixels of a network that takes no other: what does not fit in is shrunk, with its
            aspect ratio kept. With None the largest height and width of all photos, at least 64 pixels, are the size.
        longest: Photos whose long side is above this are shrunk to it; None keeps every photo as it is.

    Returns:
        The input, and where the photos are in it.

    Raises:
        InputError: One is no such photo, or there is no such size.
    """
    if longest is not None and longest < SMALLEST_PICTURE:
        raise InputError(f"longest: found {longest}; expected {SMALLEST_PICTURE} pixels or more")
    for image in images:
        _require_picture(image)
    limits = [min(side, longest or side) for side in size or (max(max(image.shape) for image in images),) * 2]
    fitted = [_shrink_into(image, *limits) for image in images]
    height, width = size or (max(SMALLEST_PICTURE, *(image.shape[side] for image in fitted)) for side in (0, 1))
    # Planes are made of bytes, before they are four times as many.
    canvas = np.empty((len(images), 3, height, width), np.uint8)
    canvas[:] = np.array(MEAN_BGR, np.uint8)[:, None, None]
    extents = [(image.shape[0], image.shape[1]) for image in fitted]
    for photo, image, (rows, columns) in zip(canvas, fitted, extents, strict=True):
        photo[:, :rows, :columns] = image.transpose(2, 0, 1)
    scales = [
        [columns / image.shape[1], rows / image.shape[0]]
        for (rows, columns), image in zip(extents, images, strict=True)
    ]
    return Letterboxed(normalize(torch.from_numpy(canvas)), extents, torch.tensor(scales))


def _require_picture(image: NDArray[np.uint8] | None) -> None:
    if image is None:
        raise InputError("picture: there is none; cv2.imread gives None for a file that is missing or no picture")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(
            f"picture: found {image.dtype} of shape {image.shape}; expected uint8 of shape (height, width, 3), BGR, as "
            "cv2.imread gives it"
        )


def _shrink_into(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    scale = min(height / image.shape[0], width / image.shape[1])
    if scale >= 1:
        return image
    shape = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    # Bilinear, as the evaluation resizes photos.
    return np.asarray(cv2.resize(image, shape, interpolation=cv2.INTER_LINEAR), np.uint8)


def without_padding(outputs: Outputs, letterboxed: Letterboxed, config: NetworkConfig) -> Outputs:
    """Makes sure that nothing is found where no photo is, but for those with a side below 64 pixels.

    These are always filled up, also alone: see :func:`retinaface.model.network.pad_small`.

    Args:
        outputs: The network's, on the CPU.
        letterboxed: Its input.
        config: Its anchors and strides.

    Returns:
        The outputs, with a score of 0 for the anchors that a photo without padding would not have.
    """
    size = letterboxed.images.shape[2:]
    alone = [(max(SMALLEST_PICTURE, height), max(SMALLEST_PICTURE, width)) for height, width in letterboxed.extents]
    if all(extent == size for extent in alone):
        return outputs
    class_logits, box_deltas, landmark_deltas = outputs
    padding = torch.stack([_padding_anchors(size, extent, config) for extent in alone])
    beyond = torch.stack([torch.zeros_like(padding), padding], dim=-1)  # the logit of a face
    return class_logits.masked_fill(beyond, -torch.inf), box_deltas, landmark_deltas


def _padding_anchors(size: Sequence[int], extent: Sequence[int], config: NetworkConfig) -> Tensor:
    """``(A,)`` bool, in the order of :func:`retinaface.model.anchors.make_anchors`."""
    levels = []
    for sizes, stride in zip(config.anchor_sizes, config.strides, strict=True):
        rows, columns = (torch.arange(0, whole, stride) >= used for whole, used in zip(size, extent, strict=True))
        levels.append((rows[:, None] | columns).flatten().repeat_interleave(len(sizes)))
    return torch.cat(levels)


def to_photo(faces: Detections, scale: Tensor) -> Detections:
    """Brings faces from pixels of the input to pixels of the photo.

    Args:
        faces: Found in an input.
        scale: ``(2,)``, see :class:`Letterboxed`.

    Returns:
        The same faces.
    """
    return Detections(faces.boxes / scale.repeat(2), faces.scores, faces.landmarks / scale)
