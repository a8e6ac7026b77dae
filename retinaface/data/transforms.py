"""Training augmentation: a random square of a photo, its faces moved with it, from one seed per sample.

Coordinates are pixels from the top left corner of a picture: pixel ``i`` covers ``[i, i + 1)``.
"""

import math
import os
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray

# Looking for a newer version on the network at import would slow down or hang machines that have no network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

from retinaface.data.annotations import MEAN_BGR, MIRRORED_LANDMARKS
from retinaface.errors import InputError

FACE, IGNORED = 1, -1
"""Labels: a face to learn, and a face that is neither a face nor background for the loss."""

_FRACTIONS = ("balanced", "min_visible", "flip", "affine", "translate", "colour", "brightness", "contrast",
              "saturation", "grayscale", "blur", "jpeg")  # fmt: skip
_LARGEST_ZOOM = 4  # of a scale-balanced crop: more would show nothing but pixels
_PIXEL_CENTRE = 0.5  # albumentations counts from the centre of the first pixel


@dataclass(frozen=True)
class TransformOptions:
    """What the training augmentation does, and how often.

    Attributes:
        crop_scale: Side of the square crop as a fraction of the photo's short side, drawn uniformly; above 1 the
            surroundings are filled, which makes faces smaller than they are.
        zoom: Instead of ``crop_scale``: pixels of the training picture per pixel of the photo, drawn on a logarithmic
            scale. A range around 1 shows faces at the sizes that they have when photos are evaluated as they are,
            whatever the photos' size.
        balanced: Probability of a scale-balanced crop, the data-anchor-sampling of PyramidBox (arXiv:1803.07737): one
            of the photo's faces, whatever its size, is shown at a size from ``balanced_faces``. Photos without faces
            are cropped as usual.
        balanced_faces: Size (square root of the area) in pixels of the training picture that the chosen face gets,
            drawn on a logarithmic scale. Photos are enlarged at most 4 times, and shrunk until their long side is half
            of the picture's.
        crop_tries: Crops drawn per photo until one holds a face to learn; the last is taken if none does.
        min_face: Faces whose shorter visible side is below this many pixels after resizing are ignored.
        min_visible: Faces of which less than this fraction is visible are ignored.
        flip: Probability of a horizontal flip.
        affine: Probability of a rotation together with a translation.
        rotate: Largest rotation in degrees, to either side.
        translate: Largest translation as a fraction of the side, in either direction.
        colour: Probability of changing the colours.
        brightness: Largest relative change of brightness.
        contrast: Largest relative change of contrast.
        saturation: Largest relative change of saturation.
        hue: Largest shift of the hue as a fraction of the colour circle.
        grayscale: Probability of taking all colour away.
        blur: Probability of blurring, out of focus or by motion with equal chance.
        blur_size: Largest size of the blur in pixels, odd.
        jpeg: Probability of the artefacts of a JPEG file.
        jpeg_quality: Range of its quality, 1 to 100.

    Raises:
        InputError: A range is reversed or a number is out of range.
    """

    crop_scale: tuple[float, float] = (0.3, 1.0)
    zoom: tuple[float, float] | None = None
    balanced: float = 0.0
    balanced_faces: tuple[float, float] = (8.0, 128.0)
    crop_tries: int = 50
    min_face: float = 4.0
    min_visible: float = 0.3
    flip: float = 0.5
    affine: float = 0.3
    rotate: float = 10.0
    translate: float = 0.1
    colour: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02
    grayscale: float = 0.05
    blur: float = 0.1
    blur_size: int = 7
    jpeg: float = 0.1
    jpeg_quality: tuple[int, int] = (30, 90)

    def __post_init__(self) -> None:
        ranges = {name: getattr(self, name) for name in ("crop_scale", "zoom", "balanced_faces", "jpeg_quality")}
        for name, range_ in ranges.items():
            if range_ is not None and not 0 < range_[0] <= range_[1]:
                raise InputError(f"{name}: expected 0 < low <= high, found {range_[0]}, {range_[1]}")
        if self.jpeg_quality[1] > 100:
            raise InputError(f"jpeg_quality: expected at most 100, found {self.jpeg_quality[1]}")
        if self.blur_size < 3 or self.blur_size % 2 == 0:
            raise InputError(f"blur_size: expected an odd number from 3 on, found {self.blur_size}")
        if self.crop_tries < 1:
            raise InputError(f"crop_tries: expected at least 1, found {self.crop_tries}")
        for name in ("min_face", "rotate"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected a number from 0 to 1, found {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise InputError(f"hue: expected a number from 0 to 0.5, found {self.hue}")


class Crop(NamedTuple):
    """A square of a photo in whole pixels; it may reach beyond the photo."""

    left: int
    top: int
    side: int


class TransformedSample(TypedDict):
    """An augmented picture and the faces that are at least partly in it.

    ``image`` (S, S, 3) uint8 BGR; ``boxes`` (N, 4) float32 xyxy pixels, inside the picture; ``landmarks`` (N, 5, 2)
    float32 pixels, 0 where ``has_landmarks`` (N,) bool is False; ``labels`` (N,) int64, 1 face or -1 ignored.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    has_landmarks: NDArray[np.bool_]
    labels: NDArray[np.int64]


class _Faces(NamedTuple):
    """Faces on their way: float64 boxes ``(N, 4)`` and landmarks ``(N, 5, 2)``, NaN where unknown or out of sight."""

    boxes: NDArray[np.float64]
    landmarks: NDArray[np.float64]
    labels: NDArray[np.int64]
    visible: NDArray[np.float64]  # (N,) fraction of the annotated box that is still in the picture


class TrainTransform:
    """Random square crop, resize, flip, rotation and translation, colours, blur and JPEG artefacts.

    A face stays a face while its centre is in the picture and enough of it is visible; what else of a face remains
    is labelled as ignored, because calling it background would be wrong as well.

    Args:
        size: Side ``S`` of the result in pixels.
        options: Probabilities and ranges.
    """

    def __init__(self, size: int, options: TransformOptions | None = None) -> None:
        self.size = size
        self.options = options or TransformOptions()
        self._pipeline = _build_pipeline(self.options)

    def __call__(
        self,
        image: NDArray[np.uint8],
        boxes: NDArray[np.float32],
        landmarks: NDArray[np.float32],
        labels: NDArray[np.int64],
        seed: int,
    ) -> TransformedSample:
        """Augments one photo; the same arguments give the same result.

        Args:
            image: ``(H, W, 3)`` uint8 BGR.
            boxes: ``(N, 4)`` xyxy in pixels; may reach beyond the photo or be empty.
            landmarks: ``(N, 5, 2)`` in pixels, NaN where not labelled.
            labels: ``(N,)`` 1 for a face, -1 for a face to ignore.
            seed: The only source of randomness, at least 0.

        Returns:
            The picture and its remaining faces.
        """
        rng = np.random.default_rng(seed)
        height, width = image.shape[:2]
        faces = _Faces(boxes.astype(np.float64), landmarks.astype(np.float64), labels, visible=np.ones(len(boxes)))
        # Three times, because what the photo lacks or the crop lost must not count as visible when the surroundings of
        # the photo are filled or a translation moves its place back in.
        faces = self._clip(faces, (width, height), min_face=0)
        crop = self._choose_crop(height, width, faces.boxes, faces.labels, rng)
        picture = _cut(image, crop, self.size)
        scale, origin = self.size / crop.side, np.array([crop.left, crop.top])
        faces = faces._replace(
            boxes=(faces.boxes - np.tile(origin, 2)) * scale, landmarks=(faces.landmarks - origin) * scale
        )
        faces = self._clip(faces, (self.size, self.size), self.options.min_face)
        picture, faces = self._augment(picture, faces, seed=int(rng.integers(2**31)))
        faces = self._clip(faces, (self.size, self.size), self.options.min_face)
        has_landmarks = np.asarray(np.isfinite(faces.landmarks.reshape(-1, 10)).all(axis=1), dtype=bool)
        return {
            "image": picture,
            "boxes": faces.boxes.astype(np.float32),
            "landmarks": np.where(has_landmarks[:, None, None], faces.landmarks, 0.0).astype(np.float32),
            "has_landmarks": has_landmarks,
            "labels": faces.labels,
        }

    def _choose_crop(
        self,
        height: int,
        width: int,
        boxes: NDArray[np.float64],
        labels: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> Crop:
        """A scale-balanced crop, or the first of several that holds the centre of a face large enough to be learned."""
        faces = boxes[labels == FACE]
        if self.options.balanced and len(faces) and rng.random() < self.options.balanced:
            return self._draw_balanced_crop(height, width, rng.choice(faces), rng)
        for _ in range(self.options.crop_tries):
            crop = _draw_crop(height, width, self._draw_side(min(height, width), rng), rng)
            centres = (faces[:, :2] + faces[:, 2:]) / 2 - (crop.left, crop.top)
            inside = ((centres >= 0) & (centres < crop.side)).all(axis=1)
            large = (faces[:, 2:] - faces[:, :2]).min(axis=1) * self.size >= self.options.min_face * crop.side
            if not len(faces) or (inside & large).any():
                break
        return crop

    def _draw_balanced_crop(self, height: int, width: int, face: NDArray[np.float64], rng: np.random.Generator) -> Crop:
        """A square with the face in it, at a size from ``balanced_faces``."""
        corner, sides = face[:2], face[2:] - face[:2]
        zoom = _log_uniform(rng, self.options.balanced_faces) / math.sqrt(sides.prod())
        lowest = self.size / (2 * max(height, width))
        side = max(1, round(self.size / min(max(zoom, lowest), _LARGEST_ZOOM)))
        left, top = (_draw_start(rng, *axis, side) for axis in zip(corner, sides, (width, height), strict=True))
        return Crop(left, top, side)

    def _draw_side(self, short_side: int, rng: np.random.Generator) -> int:
        """Side of a crop in pixels of the photo."""
        if self.options.zoom is None:
            return max(1, round(short_side * rng.uniform(*self.options.crop_scale)))
        return max(1, round(self.size / _log_uniform(rng, self.options.zoom)))

    def _clip(self, faces: _Faces, size: tuple[int, int], min_face: float) -> _Faces:
        """Clips boxes to a picture of ``width, height``; badly cut and tiny faces become ignored, those outside go.

        Landmarks outside the picture become NaN.
        """
        boxes = faces.boxes.clip(0, np.tile(size, 2))
        sides = boxes[:, 2:] - boxes[:, :2]
        whole = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(axis=1)
        visible = faces.visible * sides.prod(axis=1) / np.maximum(whole, 1e-9)
        centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
        learnable = (
            ((centres >= 0) & (centres < size)).all(axis=1)
            & (sides.min(axis=1) >= min_face)
            & (visible >= self.options.min_visible)
        )
        outside = (faces.landmarks < 0) | (faces.landmarks > size)
        stays = sides.min(axis=1) > 0
        return _Faces(
            boxes[stays],
            np.where(outside.any(axis=2, keepdims=True), np.nan, faces.landmarks)[stays],
            np.where(learnable, faces.labels, IGNORED)[stays],
            visible[stays],
        )

    def _augment(self, picture: NDArray[np.uint8], faces: _Faces, seed: int) -> tuple[NDArray[np.uint8], _Faces]:
        """Runs albumentations with everything passed as keypoints, none removed.

        As boxes, albumentations would clip them at every step, and their visible part would be unknown afterwards.
        """
        points = np.concatenate([_frames_of_boxes(faces.boxes), np.nan_to_num(faces.landmarks, nan=0.0)], axis=1)
        corner = np.array([[0.0, 0.0], [self.size, 0.0], [0.0, self.size]])  # shows a flip
        keypoints = np.concatenate([corner, points.reshape(-1, 2)]) - _PIXEL_CENTRE
        self._pipeline.set_random_seed(seed)
        result = self._pipeline(image=picture, keypoints=keypoints)
        moved = np.asarray(result["keypoints"], dtype=np.float64).reshape(-1, 2) + _PIXEL_CENTRE
        right, down = moved[1] - moved[0], moved[2] - moved[0]
        points = moved[3:].reshape(points.shape)
        landmarks = np.where(np.isnan(faces.landmarks), np.nan, points[:, 3:])
        if right[0] * down[1] < right[1] * down[0]:
            landmarks = landmarks[:, MIRRORED_LANDMARKS]
        moved_faces = faces._replace(boxes=_boxes_of_frames(points[:, :3]), landmarks=landmarks)
        return np.ascontiguousarray(result["image"]), moved_faces


def _build_pipeline(options: TransformOptions) -> A.Compose:
    shift = (-options.translate, options.translate)
    return A.Compose(
        [
            A.HorizontalFlip(p=options.flip),
            A.Affine(
                rotate=(-options.rotate, options.rotate),
                translate_percent={"x": shift, "y": shift},
                fill=MEAN_BGR,
                p=options.affine,
            ),
            # They take the picture for RGB: hue shifts turn the other way round, which symmetric ranges do not notice,
            # and the weights of red and blue in saturation and contrast are exchanged, which matters little.
            A.ColorJitter(
                brightness=(1 - options.brightness, 1 + options.brightness),
                contrast=(1 - options.contrast, 1 + options.contrast),
                saturation=(1 - options.saturation, 1 + options.saturation),
                hue=(-options.hue, options.hue),
                p=options.colour,
            ),
            A.ToGray(method="average", p=options.grayscale),
            A.OneOf(
                [
                    A.GaussianBlur(blur_limit=(3, options.blur_size), sigma_limit=(0.5, options.blur_size / 4), p=1.0),
                    _centred_motion_blur(options.blur_size),
                ],
                p=options.blur,
            ),
            A.ImageCompression(quality_range=options.jpeg_quality, p=options.jpeg),
        ],
        keypoint_params=A.KeypointParams(format="xy", remove_invisible=False),
    )


def _centred_motion_blur(size: int) -> A.MotionBlur:
    # By default it also shifts the picture by up to half its size: enough to take small faces out of their boxes.
    return A.MotionBlur(blur_limit=(3, size), allow_shifted=False, direction_range=(0.0, 0.0), p=1.0)


def _log_uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))


def _draw_start(rng: np.random.Generator, face_start: float, face_length: float, length: int, side: int) -> int:
    """Where a crop begins along one axis: the face is inside, and of the photo's surroundings as little as possible."""
    first, last = face_start + face_length - side, face_start
    if first > last:  # the face is longer than the crop, so that its middle has to do
        first = last = (first + last) / 2
    within = (min(0, length - side), max(0, length - side))
    low, high = np.clip((first, last), *within) if first <= within[1] and last >= within[0] else (first, last)
    return round(rng.uniform(low, high))


def _draw_crop(height: int, width: int, side: int, rng: np.random.Generator) -> Crop:
    """A square of random place: inside the photo where it fits, else around it."""
    left, top = (int(rng.integers(min(0, length - side), max(0, length - side) + 1)) for length in (width, height))
    return Crop(left, top, side)


def _cut(image: NDArray[np.uint8], crop: Crop, size: int) -> NDArray[np.uint8]:
    """``(size, size, 3)``: the crop, resized; what lies outside the photo has the mean colour."""
    height, width = image.shape[:2]
    right, bottom = crop.left + crop.side, crop.top + crop.side
    part = image[max(crop.top, 0) : bottom, max(crop.left, 0) : right]
    margins = (max(-crop.top, 0), max(bottom - height, 0), max(-crop.left, 0), max(right - width, 0))
    if any(margins):
        part = cv2.copyMakeBorder(part, *margins, cv2.BORDER_CONSTANT, value=MEAN_BGR)
    # Up to a factor of two bilinear interpolation sees every pixel, and takes a seventh of the time.
    method = cv2.INTER_AREA if crop.side > 2 * size else cv2.INTER_LINEAR
    resized = cv2.resize(part, (size, size), interpolation=method)
    return np.asarray(resized, dtype=np.uint8)


def _frames_of_boxes(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(N, 4)`` to ``(N, 3, 2)``: centre, middle of the right side, middle of the lower side."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    return np.stack([centre, centre + half * (1, 0), centre + half * (0, 1)], axis=1)


def _boxes_of_frames(frames: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(N, 4)``: the box around the ellipse that a frame spans.

    Heads are round: the box around a rotated ellipse fits them, the box around a rotated box is too large.
    """
    centre = frames[:, 0]
    half = np.sqrt(((frames[:, 1:] - frames[:, :1]) ** 2).sum(axis=1))
    return np.concatenate([centre - half, centre + half], axis=1)
