"""Renders photos with faces, so that everything can be tried and tested without any data set.

The faces are drawn: shaded heads of many skin tones with hair, eyes, nose and mouth, some with glasses, beards or
masks, in front of textured backgrounds with shapes that are no faces. A small network learns to find them in minutes,
but not at once: skin-coloured blobs and discs with dots are not faces.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from retinaface.errors import InputError

MARKER = "synthetic.json"
_EVENT = "0--Synthetic"
_RENDERER_VERSION = 1  # raise it when the same seed gives other pictures: existing roots are then rendered anew
_SKIN_TONES_BGR = ((195, 215, 245), (165, 190, 230), (130, 165, 215), (100, 140, 195), (75, 110, 165), (55, 80, 125),
                   (40, 60, 95))  # fmt: skip
_HAIR_BGR = ((20, 20, 25), (30, 45, 70), (45, 75, 115), (90, 150, 200), (150, 150, 155), (35, 55, 140))
_SMALLEST_FACE = 16.0
_LARGEST_FACE = 200.0
_DRAWN_HEIGHT = 96  # faces are drawn at least this high and then shrunk, which keeps the details of small ones soft


class RenderedPhoto(NamedTuple):
    """A rendered photo.

    Attributes:
        image: ``(size, size, 3)`` uint8 BGR.
        boxes: ``(N, 4)`` float32 xyxy in whole pixels, inside the photo.
        landmarks: ``(N, 5, 2)`` float32 in pixels.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]


@dataclass(frozen=True)
class _Settings:
    """What a rendered root was made with; its marker file."""

    train: int
    val: int
    size: int
    seed: int
    version: int = _RENDERER_VERSION


class _Patch(NamedTuple):
    """A face on a transparent square: colours and opacity, box ``(4,)`` and landmarks ``(5, 2)`` in its pixels."""

    colour: NDArray[np.uint8]
    opacity: NDArray[np.uint8]
    box: NDArray[np.float64]
    landmarks: NDArray[np.float64]


def write_synthetic_root(root: Path | str, train: int, val: int, size: int = 320, seed: int = 0) -> Path:
    """Renders a data root in WIDER FACE layout, with official annotations and RetinaFace labels (landmarks).

    A complete root that was made with the same settings is kept. The root appears in one step when everything is
    written, so an interrupted call leaves no half root.

    Args:
        root: The folder to make. An existing one is replaced only if it was rendered too.
        train: Number of training photos, at least 1.
        val: Number of validation photos, at least 1.
        size: Side of the photos in pixels, at least 64.
        seed: Same seed, same photos.

    Returns:
        The root.

    Raises:
        InputError: A number is too small, or the folder holds something that was not rendered.
    """
    root = Path(root)
    settings = _Settings(train, val, size, seed)
    if min(train, val) < 1 or size < 64 or seed < 0:
        raise InputError(f"synthetic photos: expected train >= 1, val >= 1, size >= 64 and seed >= 0, found {settings}")
    if _is_complete(root, settings):
        return root
    if root.exists() and not (root / MARKER).is_file() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root}: holds something that was not rendered; give another folder for the synthetic photos")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        (new / "wider_face_split").mkdir(parents=True)
        _write_split(new, "train", train, size, seed=(seed, 0))
        _write_split(new, "val", val, size, seed=(seed, 1))
        (new / MARKER).write_text(json.dumps(asdict(settings)) + "\n", encoding="utf-8")
        try:
            if root.exists():
                root.rename(old)
            new.rename(root)
        except OSError:
            if not _is_complete(root, settings):  # otherwise another process was faster, with the same result
                raise
    return root


def render_photo(rng: np.random.Generator, size: int = 320) -> RenderedPhoto:
    """Draws one photo with 0 to 8 faces.

    Args:
        rng: The only source of randomness.
        size: Side of the photo in pixels.

    Returns:
        The photo and its faces, from far (small) to near (large).
    """
    image = _draw_background(rng, size)
    boxes: list[NDArray[np.float64]] = []
    landmarks: list[NDArray[np.float64]] = []
    for height in _face_heights(rng, size):
        patch = _draw_face(rng, height)
        offset = _find_place(rng, patch.box, boxes, size)
        if offset is None:
            continue
        _paste(image, patch, offset)
        boxes.append(patch.box + np.tile(offset, 2))
        landmarks.append(patch.landmarks + offset)
    return RenderedPhoto(
        _develop(rng, image),
        np.rint(np.array(boxes).reshape(-1, 4)).clip(0, size).astype(np.float32),
        np.array(landmarks).reshape(-1, 5, 2).astype(np.float32),
    )


def _is_complete(root: Path, settings: _Settings) -> bool:
    try:
        return bool(json.loads((root / MARKER).read_text(encoding="utf-8")) == asdict(settings))
    except (OSError, ValueError):
        return False


def _write_split(root: Path, split: str, count: int, size: int, seed: tuple[int, int]) -> None:
    """Photos, official annotations and labels with landmarks of one split."""
    folder = root / f"WIDER_{split}" / "images" / _EVENT
    folder.mkdir(parents=True)
    official, labels = [], []
    for index in range(count):
        photo = render_photo(np.random.default_rng((*seed, index)), size)
        name = f"0_Synthetic_{split}_{index:05d}.jpg"
        quality = 75 + index % 4 * 6
        _, content = cv2.imencode(".jpg", photo.image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        (folder / name).write_bytes(content.tobytes())
        xywh = np.concatenate([photo.boxes[:, :2], photo.boxes[:, 2:] - photo.boxes[:, :2]], axis=1).astype(int)
        rows = [" ".join(map(str, row)) for row in xywh.tolist()]
        # Like the official files, a photo without faces is followed by a row of zeros.
        official += [f"{_EVENT}/{name}", str(len(rows)), *(f"{row} 0 0 0 0 0 0" for row in rows or ["0 0 0 0"])]
        labels.append(f"# {_EVENT}/{name}")
        for row, points in zip(rows, photo.landmarks.tolist(), strict=True):
            labels.append(f"{row} {' '.join(f'{x:.3f} {y:.3f} 0.0' for x, y in points)} 0.0")
    split_folder = root / "wider_face_split"
    (split_folder / f"wider_face_{split}_bbx_gt.txt").write_text("\n".join(official) + "\n", encoding="utf-8")
    (split_folder / f"label_{split}.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")


def _face_heights(rng: np.random.Generator, size: int) -> list[float]:
    """Heights in pixels, ascending: few large faces or many small ones; none in about a tenth of the photos."""
    if rng.random() < 0.1:
        return []
    count = int(rng.integers(1, 9))
    largest = min(_LARGEST_FACE, 0.65 * size / np.sqrt(count))
    logs = rng.uniform(np.log(_SMALLEST_FACE), np.log(max(largest, _SMALLEST_FACE + 1)), count)
    return sorted(float(height) for height in np.exp(logs))


def _find_place(
    rng: np.random.Generator, box: NDArray[np.float64], taken: Sequence[NDArray[np.float64]], size: int
) -> NDArray[np.int64] | None:
    """An offset in whole pixels that keeps the box in the photo and off the other faces, or None if none was found."""
    low, high = np.ceil(-box[:2]).astype(int), np.floor(size - box[2:]).astype(int)
    if (high < low).any():
        return None
    for _ in range(20):
        offset = rng.integers(low, high + 1)
        x1, y1, x2, y2 = box + np.tile(offset, 2)
        height = y2 - y1
        # Shoulders of nearer people reach about one face height below and to the sides of their faces.
        if all(x2 < o[0] - 2 or x1 > o[2] + 2 or y2 < o[1] - 2 or y1 > o[3] + height * 0.2 for o in taken) and not any(
            o[1] > y2 and o[1] < y2 + height and o[2] > x1 - height / 2 and o[0] < x2 + height / 2 for o in taken
        ):
            return np.asarray(offset, dtype=np.int64)
    return None


def _paste(image: NDArray[np.uint8], patch: _Patch, offset: NDArray[np.int64]) -> None:
    """Blends the patch into the image, which is changed; parts outside it are lost."""
    side = len(patch.colour)
    left, top = offset.tolist()
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + side, image.shape[1]), min(top + side, image.shape[0])
    inside = (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))
    opacity = patch.opacity[inside].astype(np.float32)[..., None] / 255
    below = image[y1:y2, x1:x2]
    below[:] = np.rint(below * (1 - opacity) + patch.colour[inside] * opacity).astype(np.uint8)


def _draw_background(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """``(size, size, 3)``: coarse and fine texture with shapes on it, some of them skin-coloured."""
    image = np.full((size, size, 3), rng.uniform(50, 205) + rng.normal(0, 20, 3), dtype=np.float32)
    for cells, strength in ((3, 40.0), (9, 20.0), (40, 12.0)):
        texture = rng.normal(0, strength, (cells, cells, 1)) + rng.normal(0, strength * 0.3, (cells, cells, 3))
        image += cv2.resize(texture.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    canvas = image.clip(0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(6, 22))):
        _draw_shape(rng, canvas, size)
    for _ in range(int(rng.integers(0, 4))):
        _draw_lookalike(rng, canvas, size)
    return canvas


def _draw_shape(rng: np.random.Generator, canvas: NDArray[np.uint8], size: int) -> None:
    """A building-, tree-, pole- or sign-like thing."""
    colour = rng.integers(0, 256, 3).tolist()
    x, y = rng.integers(0, size, 2).tolist()
    width, height = rng.integers(size // 20 + 1, size // 3, 2).tolist()
    kind = int(rng.integers(5))
    if kind == 0:
        cv2.rectangle(canvas, (x, y), (x + width, y + height), colour, -1)
        for row in range(y + 4, y + height - 4, 12):  # windows
            cv2.line(canvas, (x + 3, row), (x + width - 3, row), rng.integers(0, 256, 3).tolist(), 2)
    elif kind == 1:
        cv2.ellipse(canvas, (x, y), (width // 2, height // 2), rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
    elif kind == 2:
        corners = np.array([x, y]) + rng.integers(-size // 6, size // 6, (int(rng.integers(3, 6)), 2))
        cv2.fillPoly(canvas, [corners.astype(np.int32)], colour, cv2.LINE_AA)
    elif kind == 3:
        cv2.line(canvas, (x, y), (x + width - height, y + height), colour, int(rng.integers(1, 6)), cv2.LINE_AA)
    else:
        cv2.circle(canvas, (x, y), width // 3, colour, int(rng.integers(1, 4)), cv2.LINE_AA)


def _draw_lookalike(rng: np.random.Generator, canvas: NDArray[np.uint8], size: int) -> None:
    """Something that shares a part with faces: a skin-coloured blob, a disc with dots, a dark disc on shoulders."""
    x, y = rng.integers(0, size, 2).tolist()
    radius = int(rng.integers(8, max(size // 8, 9)))
    kind = int(rng.integers(3))
    colour = _vary(rng, _SKIN_TONES_BGR[rng.integers(len(_SKIN_TONES_BGR))], 15)
    if kind == 2:
        colour = _vary(rng, _HAIR_BGR[rng.integers(len(_HAIR_BGR))], 15)
        cv2.ellipse(canvas, (x, y + 2 * radius), (2 * radius, radius), 0, 0, 360, rng.integers(0, 256, 3).tolist(), -1)
    cv2.ellipse(canvas, (x, y), (int(radius * 0.8), radius), rng.uniform(-20, 20), 0, 360, colour, -1, cv2.LINE_AA)
    if kind == 1:
        for _ in range(int(rng.integers(1, 6))):
            dot = (x + rng.integers(-radius // 2, radius // 2 + 1), y + rng.integers(-radius // 2, radius // 2 + 1))
            cv2.circle(canvas, (int(dot[0]), int(dot[1])), max(radius // 7, 1), (25, 25, 25), -1, cv2.LINE_AA)


def _draw_face(rng: np.random.Generator, height: float) -> _Patch:
    """A head with shoulders whose face is about ``height`` pixels high."""
    factor = max(1, int(np.ceil(_DRAWN_HEIGHT / height)))
    pen = _Pen(height * factor)
    look = _Look.draw(rng)
    _draw_head(rng, pen, look)
    eyes_x, eyes_y = np.array([-0.19, 0.19]) + look.yaw, -0.07
    landmarks = np.array([[eyes_x[0], eyes_y], [eyes_x[1], eyes_y], [look.yaw * 1.5, 0.12],
                          [look.yaw - 0.14, 0.27], [look.yaw + 0.14, 0.27]])  # fmt: skip
    _draw_features(rng, pen, look, landmarks)
    colour = _shade(rng, pen)
    # Head tilt, at the drawn size; then shrink.
    centre = pen.side / 2
    tilt = rng.uniform(-20, 20)
    matrix = cv2.getRotationMatrix2D((centre, centre), tilt, 1.0)
    picture = cv2.warpAffine(np.dstack([colour, pen.opacity]), matrix, (pen.side, pen.side), borderValue=(0, 0, 0, 0))
    shrunk = cv2.resize(picture, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)
    points = (landmarks * pen.unit + centre) @ matrix[:, :2].T + matrix[:, 2]
    cosine, sine = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    half_width, half_height = look.width / 2 * pen.unit, pen.unit / 2
    extent = np.array(
        [np.hypot(half_width * cosine, half_height * sine), np.hypot(half_width * sine, half_height * cosine)]
    )
    box = np.concatenate([centre - extent, centre + extent])
    return _Patch(shrunk[..., :3], shrunk[..., 3], box / factor, points / factor)


class _Look(NamedTuple):
    """What tells one face from another; lengths in face heights."""

    skin: list[int]
    hair: list[int]
    width: float
    yaw: float
    style: int
    beard: bool
    mask: bool
    glasses: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Look":
        """A random look."""
        return cls(
            skin=_vary(rng, _SKIN_TONES_BGR[rng.integers(len(_SKIN_TONES_BGR))], 12),
            hair=_vary(rng, _HAIR_BGR[rng.integers(len(_HAIR_BGR))], 12),
            width=float(rng.uniform(0.7, 0.85)),
            yaw=float(rng.uniform(-0.09, 0.09)),
            style=int(rng.integers(4)),
            beard=bool(rng.random() < 0.15),
            mask=bool(rng.random() < 0.08),
            glasses=int(rng.choice([0, 1, 2], p=[0.75, 0.17, 0.08])),
        )


class _Pen:
    """Draws shapes given in face heights from the centre of the face onto colours and opacity."""

    def __init__(self, unit: float) -> None:
        self.unit = unit
        self.side = int(np.ceil(2.6 * unit))
        self.colour = np.zeros((self.side, self.side, 3), dtype=np.uint8)
        self.opacity = np.zeros((self.side, self.side), dtype=np.uint8)

    def ellipse(
        self, x: float, y: float, half_width: float, half_height: float, colour: list[int], start: float = 0,
        end: float = 360, thickness: float = 0,
    ) -> None:  # fmt: skip
        """A filled ellipse or part of one; an arc if ``thickness`` (in face heights) is given."""
        centre, axes = self._pixels(x, y), self._lengths(half_width, half_height)
        width = max(1, round(thickness * self.unit)) if thickness else -1
        for layer, value in ((self.colour, colour), (self.opacity, [255])):
            cv2.ellipse(layer, centre, axes, 0, start, end, value, width, cv2.LINE_AA, 4)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: list[int], thickness: float) -> None:
        """A line, ``thickness`` in face heights."""
        width = max(1, round(thickness * self.unit))
        for layer, value in ((self.colour, colour), (self.opacity, [255])):
            cv2.line(layer, self._pixels(x1, y1), self._pixels(x2, y2), value, width, cv2.LINE_AA, 4)

    def _pixels(self, x: float, y: float) -> tuple[int, int]:
        """A point in sixteenths of a pixel, which OpenCV counts from the centre of the first pixel."""
        centre = self.side / 2 - 0.5
        return round((x * self.unit + centre) * 16), round((y * self.unit + centre) * 16)

    def _lengths(self, x: float, y: float) -> tuple[int, int]:
        return round(x * self.unit * 16), round(y * self.unit * 16)


def _draw_head(rng: np.random.Generator, pen: _Pen, look: _Look) -> None:
    """Shoulders, neck, hair, ears and the face itself."""
    cloth = rng.integers(0, 256, 3).tolist()
    shadow = [int(value * 0.75) for value in look.skin]
    half = look.width / 2
    pen.ellipse(0, 1.12, 0.95, 0.52, cloth)
    pen.line(0, 0.35, 0, 0.68, shadow, 0.36)
    if look.style == 1:  # long hair
        pen.ellipse(-look.yaw / 2, 0.08, half + 0.13, 0.68, look.hair)
    elif look.style > 1:
        pen.ellipse(-look.yaw / 2, -0.14, half + 0.06, 0.46, look.hair)
    for side in (-1, 1):
        pen.ellipse(side * (half - 0.01) - look.yaw / 2, 0.0, 0.06, 0.1, shadow)
    pen.ellipse(0, 0, half, 0.5, look.skin)
    if look.style:  # the hairline, or the rim of a cap
        colour = rng.integers(0, 256, 3).tolist() if look.style == 3 else look.hair
        pen.ellipse(0, -0.2, half + 0.02, 0.36, colour, 190, 350)
    if look.beard:
        pen.ellipse(look.yaw / 2, 0.14, half * 0.97, 0.37, look.hair, 15, 165)


def _draw_features(rng: np.random.Generator, pen: _Pen, look: _Look, landmarks: NDArray[np.float64]) -> None:
    """Eyes, brows, nose, mouth and what may cover them; the landmarks are in face heights."""
    dark = [int(value * 0.55) for value in look.skin]
    eyes, nose, mouth = landmarks[:2].tolist(), landmarks[2].tolist(), landmarks[3:].mean(axis=0).tolist()
    iris = rng.integers(10, 90, 3).tolist()
    lift = rng.uniform(0.03, 0.05)
    for x, y in eyes:
        pen.ellipse(x, y, 0.085, lift, [235, 240, 240])
        pen.ellipse(x + look.yaw * 0.15, y, lift, lift, iris)
        pen.line(x - 0.09, y - 0.11, x + 0.09, y - 0.11, [int(value * 0.8) for value in look.hair], 0.03)
    pen.line(look.yaw * 1.1, -0.05, nose[0] - 0.02, nose[1], dark, 0.02)
    pen.ellipse(nose[0], nose[1], 0.07, 0.03, dark, 0, 180)
    if look.mask:
        pen.ellipse(look.yaw / 2, 0.12, look.width / 2 * 0.95, 0.36, rng.integers(120, 256, 3).tolist(), -10, 190)
    elif rng.random() < 0.3:  # open
        pen.ellipse(mouth[0], mouth[1], 0.14, rng.uniform(0.04, 0.09), [40, 30, 90])
    else:
        curve = rng.uniform(0.02, 0.07)
        lips = [int(look.skin[0] * 0.6), int(look.skin[1] * 0.55), min(255, int(look.skin[2] * 0.85))]
        pen.ellipse(mouth[0], mouth[1] - curve / 2, 0.14, curve, lips, 0, 180)
        pen.line(mouth[0] - 0.14, mouth[1] - curve / 2, mouth[0] + 0.14, mouth[1] - curve / 2, dark, 0.02)
    if look.glasses:
        frame = rng.integers(0, 80, 3).tolist()
        for x, y in eyes:
            pen.ellipse(x, y, 0.14, 0.1, frame, thickness=0 if look.glasses == 2 else 0.025)
        pen.line(eyes[0][0] + 0.12, eyes[0][1], eyes[1][0] - 0.12, eyes[1][1], frame, 0.025)


def _shade(rng: np.random.Generator, pen: _Pen) -> NDArray[np.uint8]:
    """The drawn colours, lit from one side and darker towards the rim of the head."""
    axis = (np.arange(pen.side, dtype=np.float32) + 0.5 - pen.side / 2) / pen.unit
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.6)
    light = 1 + strength * (np.cos(direction) * axis[None, :] + np.sin(direction) * axis[:, None])
    light -= 0.5 * np.minimum(axis[None, :] ** 2 + axis[:, None] ** 2, 0.5)
    return np.asarray((pen.colour * light[..., None]).clip(0, 255), dtype=np.uint8)


def _develop(rng: np.random.Generator, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The camera: uneven light, exposure, colour cast, blur and noise."""
    size = len(image)
    light = rng.uniform(0.6, 1.3) + rng.normal(0, 0.12, (2, 2, 1)).astype(np.float32)
    light = cv2.resize(light, (size, size), interpolation=cv2.INTER_LINEAR)[..., None]
    picture = image.astype(np.float32) * (light * rng.uniform(0.9, 1.1, 3)).astype(np.float32)
    if rng.random() < 0.5:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.2))
    picture += rng.normal(0, 1, picture.shape).astype(np.float32) * np.float32(rng.uniform(1, 9))
    return np.asarray(picture.clip(0, 255), dtype=np.uint8)


def _vary(rng: np.random.Generator, colour: Sequence[int], strength: int) -> list[int]:
    """The colour, changed a little."""
    varied: list[int] = (np.array(colour) + rng.integers(-strength, strength + 1, 3)).clip(0, 255).tolist()
    return varied
