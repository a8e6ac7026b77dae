"""Renders a photo: a textured scene, people and things in front of each other, and the camera's flaws."""

from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from retinaface.data.synthetic_person import (
    HAIR_COLOURS,
    SKIN_TONES,
    CutOut,
    draw_lookalike,
    draw_person,
    vary,
)

SMALLEST_FACE, LARGEST_FACE = 8.0, 300.0
"""Heights of the upright faces in pixels; in small photos the largest is 0.65 of the side."""

MIN_VISIBLE = 0.3
"""Faces of which less is visible are invalid: neither faces to be found nor background."""

_NOBODY = -1


class Attributes(NamedTuple):
    """What the official text files say about a face, in their order and with their meaning.

    Attributes:
        blur: 0 clear, 1 normal, 2 heavy: deviation of the blur above 2.5 and 5 percent of the face's height.
        expression: 1 for a wide-open mouth.
        illumination: 1 for less than 0.45 of the usual light.
        invalid: 1 where less than ``MIN_VISIBLE`` of the face is visible.
        occlusion: 0 none, 1 partial, 2 heavy: more than 5 and 30 percent of the face are covered or cut off.
        pose: 1 for a head far from facing the camera upright.
    """

    blur: int
    expression: int
    illumination: int
    invalid: int
    occlusion: int
    pose: int


class RenderedPhoto(NamedTuple):
    """A rendered photo.

    Attributes:
        image: ``(size, size, 3)`` uint8 BGR.
        boxes: ``(N, 4)`` float32 xyxy in whole pixels, inside the photo, no two alike. Tight around the face from
            forehead to chin, whether covered or not.
        landmarks: ``(N, 5, 2)`` float32 in pixels, also where something covers them; outside the photo where its
            border cuts the face.
        visible: ``(N,)`` float32, the share of the face that nothing covers and no border cuts off.
        attributes: ``(N, 6)`` int64, the columns of ``Attributes``.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    visible: NDArray[np.float32]
    attributes: NDArray[np.int64]


class _Camera(NamedTuple):
    """How a photo is taken: exposure (1 is normal), deviation of the blur in pixels and of the noise in grey levels."""

    exposure: float
    blur: float
    motion: int
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Camera":
        """Random settings; an eighth of the photos is dark and noisy."""
        dark = rng.random() < 0.12
        return cls(
            exposure=rng.uniform(0.2, 0.45) if dark else rng.uniform(0.7, 1.25),
            blur=rng.uniform(0.5, 2.0) if rng.random() < 0.3 else 0.0,
            motion=int(rng.integers(3, 10)) if rng.random() < 0.1 else 1,
            noise=rng.uniform(5, 14) if dark else rng.uniform(1, 9),
        )

    @property
    def total_blur(self) -> float:
        """Standard deviation in pixels, that of the motion included."""
        return float(np.sqrt(self.blur**2 + (self.motion**2 - 1) / 12))


def render_photo(rng: np.random.Generator, size: int = 640) -> RenderedPhoto:
    """Draws one photo: a tenth is empty, others show a person, a group or a crowd of up to 60.

    Args:
        rng: The only source of randomness.
        size: Side of the photo in pixels, at least 64.

    Returns:
        The photo and its faces, from far (small) to near (large).
    """
    image = _draw_background(rng, size)
    front = np.full((size, size), _NOBODY, dtype=np.int16)  # whose bare face is seen where
    faces: list[CutOut] = []
    camera = _Camera.draw(rng)
    for height, is_person in _draw_cast(rng, size):
        if not is_person:
            thing = draw_lookalike(rng, height)
            _paste(image, front, thing, rng.integers(0, size, 2) - _centre(thing), _NOBODY)
            continue
        person = draw_person(rng, height)
        offset = _find_place(rng, person.box, np.array([face.box for face in faces]).reshape(-1, 4), size)
        if offset is not None:
            _paste(image, front, person, offset, len(faces))
            faces.append(person._replace(box=person.box + np.tile(offset, 2), landmarks=person.landmarks + offset))
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.25 else 0):
        _draw_object(rng, image, front)
    seen = np.bincount(front.ravel() + 1, minlength=len(faces) + 1)[1:]
    visible = np.minimum(seen / np.array([face.area for face in faces]), 1) if faces else np.zeros(0)
    attributes = [_describe(face, share, camera) for face, share in zip(faces, visible.tolist(), strict=True)]
    return RenderedPhoto(
        _take(rng, image, camera),
        _whole_pixels(np.array([face.box for face in faces]).reshape(-1, 4), size),
        np.array([face.landmarks for face in faces], dtype=np.float32).reshape(-1, 5, 2),
        visible.astype(np.float32),
        np.array(attributes, dtype=np.int64).reshape(-1, 6),
    )


def _draw_cast(rng: np.random.Generator, size: int) -> list[tuple[float, bool]]:
    """Heights in pixels, ascending, each with whether it is a person's."""
    scale = size / 640
    largest = min(LARGEST_FACE, 0.65 * size)
    kind = rng.choice(4, p=[0.1, 0.3, 0.45, 0.15])
    if kind == 0:
        heights = np.zeros(0)
    elif kind == 1:
        heights = _log_uniform(rng, 0.1 * size, largest, int(rng.integers(1, 3)))
    elif kind == 2:
        count = int(rng.integers(2, 11))
        heights = _log_uniform(rng, SMALLEST_FACE, largest * 1.3 / np.sqrt(count), count)
    else:
        crowd = _log_uniform(rng, SMALLEST_FACE, 48 * scale, int(rng.integers(15, 61) * min(scale, 1)))
        heights = np.concatenate([crowd, _log_uniform(rng, 48 * scale, largest, int(rng.integers(0, 2)))])
    things = _log_uniform(rng, SMALLEST_FACE, 0.3 * size, int(rng.integers(0, 7)))
    cast = [(height, True) for height in heights.tolist()] + [(height, False) for height in things.tolist()]
    return sorted(cast)


def _log_uniform(rng: np.random.Generator, low: float, high: float, count: int) -> NDArray[np.float64]:
    low = max(low, SMALLEST_FACE)
    return np.exp(rng.uniform(np.log(low), np.log(max(high, low + 1)), count))


def _centre(cut_out: CutOut) -> NDArray[np.int64]:
    return np.rint((cut_out.box[:2] + cut_out.box[2:]) / 2).astype(np.int64)


def _find_place(
    rng: np.random.Generator, box: NDArray[np.float64], taken: NDArray[np.float64], size: int
) -> NDArray[np.int64] | None:
    """An offset in whole pixels at which the person hides no other face too far, or None if none was found.

    Most people stand apart; the nearer one of some overlaps the face of another.
    """
    sides = box[2:] - box[:2]
    outside = 0.4 * sides if rng.random() < 0.12 else np.zeros(2)  # how far the photo's border may cut the face
    low, high = np.ceil(-box[:2] - outside).astype(int), np.floor(size - box[2:] + outside).astype(int)
    tolerated = rng.uniform(0.1, 0.9) if rng.random() < 0.25 else 0.03
    areas = (taken[:, 2:] - taken[:, :2]).prod(axis=1)
    for _ in range(25):
        offset = rng.integers(low, high + 1)
        x1, y1, x2, y2 = box + np.tile(offset, 2)
        # Hair, hat, shoulders and chest reach beyond the face.
        body = np.array([x1 - 0.5 * sides[0], y1 - 0.2 * sides[1], x2 + 0.5 * sides[0], y2 + 1.3 * sides[1]])
        overlap = np.minimum(body[2:], taken[:, 2:]) - np.maximum(body[:2], taken[:, :2])
        if (overlap.clip(0).prod(axis=1) > tolerated * areas).any():
            continue
        new = _whole_pixels(np.array([[x1, y1, x2, y2]]), size)
        if not (new == _whole_pixels(taken, size)).all(axis=1).any():  # annotations are matched by their boxes
            return np.asarray(offset, dtype=np.int64)
    return None


def _whole_pixels(boxes: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    return np.rint(boxes).clip(0, size).astype(np.float32)


def _paste(
    image: NDArray[np.uint8], front: NDArray[np.int16], cut_out: CutOut, offset: NDArray[np.int64], number: int
) -> None:
    """Blends the cut-out into the image and notes whose face is in front; parts outside the photo are lost."""
    height, width = cut_out.face.shape
    left, top = offset.tolist()
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + width, image.shape[1]), min(top + height, image.shape[0])
    if x2 <= x1 or y2 <= y1:
        return
    inside = (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))
    picture = cut_out.picture[inside]
    opacity = picture[..., 3]
    clear = cv2.cvtColor(255 - opacity, cv2.COLOR_GRAY2BGR)
    below = image[y1:y2, x1:x2]
    below[:] = cv2.add(cv2.multiply(below, clear, scale=1 / 255), cv2.cvtColor(picture, cv2.COLOR_BGRA2BGR))
    owners = front[y1:y2, x1:x2]
    owners[opacity > 127] = _NOBODY
    owners[cut_out.face[inside] > 127] = number


def _describe(face: CutOut, visible: float, camera: _Camera) -> Attributes:
    blur = float(np.hypot(face.blur, camera.total_blur)) / (face.box[3] - face.box[1])
    return Attributes(
        blur=int(blur > 0.025) + int(blur > 0.05),
        expression=int(face.grimace),
        illumination=int(face.light * camera.exposure < 0.45),
        invalid=int(visible < MIN_VISIBLE),
        occlusion=int(visible < 0.95) + int(visible < 0.7),
        pose=int(face.turned),
    )


def _draw_background(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """``(size, size, 3)``: one to three textured bands, such as a wall and a floor, with objects on them."""
    edges = [0, *sorted(rng.choice(np.arange(size // 5, size), rng.integers(0, 3), replace=False).tolist()), size]
    image = np.concatenate([_draw_texture(rng, low, high, size) for low, high in pairwise(edges)])
    if rng.random() < 0.3:
        image = image.transpose(1, 0, 2)
    image = np.ascontiguousarray(image)
    for _ in range(int(rng.integers(4, 26))):
        _draw_object(rng, image)
    if rng.random() < 0.3:
        _scatter(rng, image)
    return image


def _draw_texture(rng: np.random.Generator, low: int, high: int, width: int) -> NDArray[np.uint8]:
    """``(high - low, width, 3)``: clouds, stripes, checks or a gradient in a few colours."""
    height = high - low
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    kind = rng.integers(5)
    if kind <= 1:  # clouds, stone, leaves: noise at several scales
        values = np.full((height, width), 0, dtype=np.uint8)
        for cells, share in ((3, 0.5), (12, 0.3), (int(rng.integers(20, 120)), 0.4)):
            noise = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
            octave = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
            values = cv2.addWeighted(values, 1.0, octave, share, 0)
    elif kind == 2:  # stripes; the sum wraps around on purpose
        turns = rng.uniform(-12, 12, 2)
        values = ((x * turns[0]).astype(np.int64) + (y * turns[1]).astype(np.int64)).astype(np.uint8)
    elif kind == 3:  # bricks or tiles
        across, down = rng.integers(6, max(width // 8, 8), 2).tolist()
        row = y // down
        joint = (y % down < 2) | ((x + row % 2 * (across // 2)) % across < 2)
        values = np.where(joint, 0, 80 + ((x + row % 2 * (across // 2)) // across * 53 + row * 97) % 160)
        values = values.astype(np.uint8)
    else:
        values = np.broadcast_to(y * 255 // height, (height, width)).astype(np.uint8)
    paint = _paint(rng)
    stops = np.array([paint, *(_paint(rng) if rng.random() < 0.4 else vary(rng, paint, 60) for _ in range(3))])
    palette = [np.interp(np.arange(256), np.linspace(0, 255, len(stops)), channel) for channel in stops.T]
    table = np.stack(palette, axis=1).astype(np.uint8)[None]
    return np.asarray(cv2.LUT(cv2.cvtColor(values, cv2.COLOR_GRAY2BGR), table), dtype=np.uint8)


def _draw_object(rng: np.random.Generator, image: NDArray[np.uint8], front: NDArray[np.int16] | None = None) -> None:
    """A house-, tree-, pole-, sign- or ring-like thing; with ``front`` it stands in front of the people."""
    size = len(image)
    colour, second = _paint(rng), _paint(rng)
    x, y = rng.integers(0, size, 2).tolist()
    width, height = rng.integers(size // 30 + 1, size // 3 if front is None else size // 6, 2).tolist()
    layers = [(image, colour)] if front is None else [(image, colour), (front, _NOBODY)]
    kind = rng.integers(6)
    corners = np.array([x, y]) + rng.integers(-size // 8, size // 8, (int(rng.integers(3, 6)), 2))
    slant = int(rng.integers(-size // 4, size // 4 + 1))
    thickness = int(rng.integers(1, max(size // 40, 3)))
    angle = rng.uniform(0, 180)
    for layer, value in layers:
        if kind <= 1:
            cv2.rectangle(layer, (x, y), (x + width, y + height), value, -1)
        elif kind == 2:
            cv2.ellipse(layer, (x, y), (width // 2, height // 2), angle, 0, 360, value, -1)
        elif kind == 3:
            cv2.fillPoly(layer, [corners.astype(np.int32)], value)
        elif kind == 4:
            cv2.line(layer, (x, y), (x + slant, y + 2 * height), value, thickness)
        else:
            cv2.circle(layer, (x, y), width // 3, value, thickness)
    if kind == 0:  # windows
        gap = max(4, size // int(rng.integers(20, 60)))
        for top in range(y + gap // 2, y + height - gap, gap):
            for left in range(x + gap // 2, x + width - gap, gap):
                cv2.rectangle(image, (left, top), (left + gap // 2, top + gap // 2), second, -1)
    elif kind == 1:  # writing
        text = "".join(chr(rng.integers(65, 91)) for _ in range(int(rng.integers(2, 6))))
        scale = max(0.3, width / 100)
        cv2.putText(
            image, text, (x + 2, y + height - 3), cv2.FONT_HERSHEY_SIMPLEX, scale, second, thickness, cv2.LINE_AA
        )


def _paint(rng: np.random.Generator) -> list[int]:
    """A colour of something made or grown: most are far from pure."""
    if rng.random() < 0.2:
        return vary(rng, (128, 128, 128), 127)
    return vary(rng, [int(rng.integers(20, 236))] * 3, 45)


def _scatter(rng: np.random.Generator, image: NDArray[np.uint8]) -> None:
    """Many small blobs: leaves, or the blurred crowd of a stand, in the colours of skin and hair."""
    size = len(image)
    leaves = rng.random() < 0.5
    tones = [vary(rng, (40, 110, 60), 40) for _ in range(4)] if leaves else [*SKIN_TONES, *HAIR_COLOURS]
    left, top = rng.integers(-size // 4, size // 2, 2)
    right, bottom = left + rng.integers(size // 4, size), top + rng.integers(size // 8, size // 2)
    count = int(rng.integers(60, 250))
    places = np.stack([rng.integers(left, right, count), rng.integers(top, bottom, count)], axis=1).tolist()
    axes = rng.integers(2, max(size // 50, 4), (count, 2)).tolist()
    colours = rng.integers(0, len(tones), count).tolist()
    angles = rng.uniform(0, 180, count).tolist()
    for place, axis, colour, angle in zip(places, axes, colours, angles, strict=True):
        cv2.ellipse(image, place, axis, angle, 0, 360, tones[colour], -1, cv2.LINE_AA)


def _take(rng: np.random.Generator, image: NDArray[np.uint8], camera: _Camera) -> NDArray[np.uint8]:
    """The photo: uneven light, exposure, haze, colour cast, blur and noise."""
    size = len(image)
    light = (camera.exposure + rng.normal(0, 0.15, (3, 3)) * min(camera.exposure, 1)) * 100
    cast = rng.uniform(0.88, 1.12, 3)
    # Interpolated as bytes: a hundred is normal, and the range ends at two and a half times that.
    shade = cv2.resize((light[..., None] * cast).clip(8, 255).astype(np.uint8), (size, size))
    picture = cv2.multiply(image, shade, scale=1 / 100)
    if rng.random() < 0.15:
        haze = rng.uniform(0.2, 0.6)
        picture = cv2.addWeighted(picture, 1 - haze, picture, 0, 150 * haze * min(camera.exposure, 1))
    if rng.random() < 0.07:
        picture = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    if camera.motion > 1:
        picture = cv2.blur(picture, (camera.motion, 1) if rng.random() < 0.7 else (1, camera.motion))
    if camera.blur:
        picture = cv2.GaussianBlur(picture, (0, 0), camera.blur)
    # One tile of noise, repeated: drawing a number per pixel would take longer than everything else.
    side = min(size, 240)
    tile = (rng.standard_normal((side, side, 3), dtype=np.float32) * camera.noise).astype(np.int8)
    repeats = -(-size // side)
    noise = np.tile(tile, (repeats, repeats, 1))[:size, :size]
    return np.asarray(cv2.add(picture, np.ascontiguousarray(noise), dtype=cv2.CV_8U), dtype=np.uint8)
