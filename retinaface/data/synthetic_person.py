"""Draws people, and things that resemble them, as cut-outs for rendered photos.

A head is an ellipsoid that turns: the features are points on its front that are rotated by yaw and pitch, so the five
landmarks are the points where the eyes, the nose and the corners of the mouth are drawn. Lengths are in face heights
(forehead to chin), measured from the centre of the face, x to the right and y down; colours are BGR.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Colour = list[int]

SKIN_TONES: tuple[tuple[int, int, int], ...] = (
    (195, 215, 245), (165, 190, 230), (130, 165, 215), (100, 140, 195), (75, 110, 165), (55, 80, 125), (40, 60, 95),
)  # fmt: skip
"""From light to dark, BGR."""

HAIR_COLOURS: tuple[tuple[int, int, int], ...] = (
    (20, 20, 25), (25, 30, 40), (30, 45, 70), (45, 75, 115), (90, 150, 200), (150, 150, 155), (35, 55, 140),
)  # fmt: skip
"""BGR."""

_DRAWN_HEIGHT = 40  # smaller faces are drawn at least this high and then shrunk, which keeps their details soft
_HALF_WIDTH, _ABOVE, _BELOW = 1.25, 1.15, 1.9  # of a cut-out, in face heights
_DEPTH = 0.42  # of the head, half
_EYE, _NOSE, _MOUTH = (0.185, -0.06), (0.0, 0.12), (0.13, 0.27)  # of the right eye, nose tip and mouth corner


class CutOut(NamedTuple):
    """Something on a transparent ground, to be pasted into a photo. Coordinates are its own pixels.

    Attributes:
        picture: ``(H, W, 4)`` uint8: blue, green and red times opacity, and opacity.
        face: ``(H, W)`` uint8: 255 where the face is bare, 0 outside it and where a mask, a hand or the like covers it.
        area: Pixels that the whole face takes, covered or not; 0 for what is no person.
        box: ``(4,)`` xyxy, tight around the whole face; around the head for what is no person.
        landmarks: ``(5, 2)``: left eye, right eye, nose, left and right mouth corner as seen.
        turned: Whether the head is far from facing the camera upright.
        grimace: Whether the mouth is wide open.
        light: Brightness of the light on it, 1 is normal.
        blur: Standard deviation of its blur in pixels.
    """

    picture: NDArray[np.uint8]
    face: NDArray[np.uint8]
    area: float
    box: NDArray[np.float64]
    landmarks: NDArray[np.float64]
    turned: bool
    grimace: bool
    light: float
    blur: float


class _Pen:
    """Draws shapes, given in face heights, onto a transparent picture; ``covers`` marks what hides the face."""

    def __init__(self, unit: float) -> None:
        self.unit = unit
        self.tilt = 0.0
        shape = (int(np.ceil((_ABOVE + _BELOW) * unit)), int(np.ceil(2 * _HALF_WIDTH * unit)))
        self.picture = np.zeros((*shape, 4), dtype=np.uint8)
        self.face = np.zeros(shape, dtype=np.uint8)

    def tilted(self, degrees: float) -> "_Pen":
        """The same picture, turned clockwise around the centre of the face."""
        turned = copy.copy(self)
        turned.tilt = self.tilt + degrees
        return turned

    def to_pixels(self, points: ArrayLike) -> NDArray[np.float64]:
        """``(N, 2)`` face heights to pixels of the picture."""
        cosine, sine = np.cos(np.radians(self.tilt)), np.sin(np.radians(self.tilt))
        turned = np.asarray(points, dtype=np.float64) @ np.array([[cosine, sine], [-sine, cosine]])
        return np.asarray((turned + np.array([_HALF_WIDTH, _ABOVE])) * self.unit)

    def polygon(self, points: ArrayLike, colour: Sequence[int], covers: bool = False) -> None:
        """A filled polygon."""
        corners = self._fixed(points)
        cv2.fillPoly(self.picture, [corners], (*colour, 255), cv2.LINE_AA, 4)
        if covers:
            cv2.fillPoly(self.face, [corners], 0, cv2.LINE_8, 4)

    def line(self, points: ArrayLike, colour: Sequence[int], thickness: float, covers: bool = False) -> None:
        """Connected lines."""
        corners, width = self._fixed(points), max(1, round(thickness * self.unit))
        cv2.polylines(self.picture, [corners], False, (*colour, 255), width, cv2.LINE_AA, 4)
        if covers:
            cv2.polylines(self.face, [corners], False, 0, width, cv2.LINE_8, 4)

    def ellipse(
        self,
        centre: ArrayLike,
        half_width: float,
        half_height: float,
        colour: Sequence[int],
        arc: tuple[float, float] = (0, 360),
        covers: bool = False,
        angle: float = 0.0,
    ) -> None:
        """A filled ellipse, or the part of one between two angles (degrees, clockwise from the right)."""
        ((x, y),) = self._fixed(np.asarray(centre)[None]).tolist()
        axes = (round(half_width * self.unit * 16), round(half_height * self.unit * 16))
        shape = ((x, y), axes, self.tilt + angle, *arc)
        cv2.ellipse(self.picture, *shape, (*colour, 255), -1, cv2.LINE_AA, 4)
        if covers:
            cv2.ellipse(self.face, *shape, 0, -1, cv2.LINE_8, 4)

    def _fixed(self, points: ArrayLike) -> NDArray[np.int32]:
        """Sixteenths of a pixel, which OpenCV counts from the centre of the first pixel."""
        return np.rint((self.to_pixels(points) - 0.5) * 16).astype(np.int32)


class _Head:
    """Where things are on a head of a given width that is turned by yaw (to the right) and pitch (down), in radians."""

    def __init__(self, half_width: float, jaw: float, yaw: float, pitch: float) -> None:
        self.half_width = half_width
        self.yaw = yaw
        self._pitch = pitch
        # The ears end the face: turning moves one of them in, and the other out of sight.
        middle = np.sign(yaw) * half_width * (1 - np.cos(yaw)) / 2
        half = half_width * (1 + np.cos(yaw)) / 2
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        down = np.sin(angle)
        across = np.cos(angle) * (1 - jaw * np.maximum(down, 0) ** 2)
        self.outline = np.stack([middle + half * across, down / 2], axis=1)
        self.left, self.right = middle - half, middle + half

    def project(self, points: ArrayLike, height: float = 0.0) -> NDArray[np.float64]:
        """``(N, 2)`` points of a face seen from the front, ``height`` above it, to where the turned head shows them."""
        x, y = np.asarray(points, dtype=np.float64).T
        depth = _DEPTH * np.sqrt(np.maximum(0, 1 - (x / self.half_width) ** 2 - (y / 0.5) ** 2)) + height
        across = x * np.cos(self.yaw) + depth * np.sin(self.yaw)
        depth = depth * np.cos(self.yaw) - x * np.sin(self.yaw)
        return np.stack([across, y * np.cos(self._pitch) + 0.7 * depth * np.sin(self._pitch)], axis=1)

    def oval(self, x: float, y: float, half_width: float, half_height: float) -> NDArray[np.float64]:
        """``(N, 2)``: an ellipse on the face, as the turned head shows it."""
        return self.project(_CIRCLE * (half_width, half_height) + (x, y))

    def above(self, y: float) -> NDArray[np.float64]:
        """``(N, 2)``: the outline above a height, a little enlarged, from left to right."""
        upper = self.outline[self.outline[:, 1] < y] * (1.04, 1.06)
        return np.asarray(np.roll(upper, -int(np.argmin(upper[:, 0])), axis=0))

    def below(self, y: float, sag: float, scale: float) -> NDArray[np.float64]:
        """``(N, 2)``: the part of the face below a line that sags in its middle, enlarged by ``scale``."""
        lower = self.outline[self.outline[:, 1] > y - 0.02] * scale
        return np.concatenate([lower, self.project([(x, y + sag * (1 - abs(x) / 0.3)) for x in (-0.25, 0, 0.25)])])


_CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 14)), np.sin(np.linspace(0, 2 * np.pi, 14))], axis=1)


class _Look(NamedTuple):
    """What tells one person from another; angles in degrees."""

    skin: Colour
    hair: Colour
    half_width: float
    jaw: float
    yaw: float
    pitch: float
    tilt: float
    style: str
    hat: str
    beard: str
    glasses: str
    mask: bool
    mouth: str

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Look":
        """A random look; most heads roughly face the camera."""
        return cls(
            skin=vary(rng, SKIN_TONES[rng.integers(len(SKIN_TONES))], 12),
            hair=vary(rng, HAIR_COLOURS[rng.integers(len(HAIR_COLOURS))], 12),
            half_width=rng.uniform(0.35, 0.42),
            jaw=rng.uniform(0.05, 0.3),
            yaw=rng.uniform(-60, 60) if rng.random() < 0.35 else rng.uniform(-20, 20),
            pitch=float(np.clip(rng.normal(2, 9), -22, 22)),
            tilt=rng.uniform(-35, 35) if rng.random() < 0.25 else rng.uniform(-10, 10),
            style=_pick(rng, bald=0.1, short=0.35, curly=0.15, long=0.25, bun=0.07, scarf=0.08),
            hat=_pick(rng, none=0.74, cap=0.1, beanie=0.08, brim=0.05, helmet=0.03),
            beard=_pick(rng, none=0.78, full=0.12, moustache=0.1),
            glasses=_pick(rng, none=0.74, clear=0.16, sun=0.1),
            mask=bool(rng.random() < 0.1),
            mouth=_pick(rng, closed=0.4, smile=0.4, open=0.2),
        )


def vary(rng: np.random.Generator, colour: Sequence[int], strength: int) -> Colour:
    """The colour, changed by up to ``strength`` in each channel."""
    varied: Colour = (np.array(colour) + rng.integers(-strength, strength + 1, 3)).clip(0, 255).tolist()
    return varied


def draw_person(rng: np.random.Generator, height: float) -> CutOut:
    """Draws a person from the head to the chest.

    Args:
        rng: The only source of randomness.
        height: From forehead to chin in pixels, if the head were upright.

    Returns:
        The cut-out.
    """
    factor = max(1, int(np.ceil(_DRAWN_HEIGHT / height)))
    body = _Pen(height * factor)
    look = _Look.draw(rng)
    head = _Head(look.half_width, look.jaw, np.radians(look.yaw), np.radians(look.pitch))
    pen = body.tilted(look.tilt)
    if look.style in ("long", "scarf"):
        pen.ellipse((-0.1 * np.sin(head.yaw), 0.12), look.half_width + 0.16, 0.68, look.hair)
    _draw_body(rng, body, [int(value * 0.8) for value in look.skin])
    _draw_skull(pen, head, look)
    pen.polygon(head.outline, look.skin)
    cv2.fillPoly(pen.face, [np.rint(pen.to_pixels(head.outline) - 0.5).astype(np.int32)], 255)
    landmarks = np.concatenate([
        head.project([(-_EYE[0], _EYE[1]), _EYE]),
        head.project([_NOSE], height=0.07),
        head.project([(-_MOUTH[0], _MOUTH[1]), _MOUTH]),
    ])  # fmt: skip
    _draw_features(rng, pen, head, look, landmarks)
    _draw_hair(rng, pen, head, look)
    _draw_worn(rng, pen, head, look)
    if rng.random() < 0.12:
        _draw_held(rng, pen, look)
    outline = pen.to_pixels(head.outline)
    light = rng.uniform(0.35, 0.6) if rng.random() < 0.12 else rng.uniform(0.75, 1.15)
    cut_out = CutOut(
        _light(rng, pen, light),
        pen.face,
        area=cv2.contourArea(outline.astype(np.float32)),
        box=np.concatenate([outline.min(axis=0), outline.max(axis=0)]),
        landmarks=pen.to_pixels(landmarks),
        turned=abs(look.yaw) > 35 or abs(look.tilt) > 25 or abs(look.pitch) > 18,
        grimace=look.mouth == "open" and not look.mask,
        light=light,
        blur=0.0,
    )
    return _blur(rng, _shrink(cut_out, factor), height)


def draw_lookalike(rng: np.random.Generator, height: float) -> CutOut:
    """Draws something that shares parts with a person but shows no face.

    The back of a head, a dummy without features, a smiley, an animal, a hand, a clock or a socket.

    Args:
        rng: The only source of randomness.
        height: Of the head or disc in pixels.

    Returns:
        The cut-out, without a face.
    """
    factor = max(1, int(np.ceil(_DRAWN_HEIGHT / height)))
    pen = _Pen(height * factor).tilted(rng.uniform(-20, 20))
    kinds: tuple[Callable[[np.random.Generator, _Pen], None], ...] = (
        _draw_back_of_head, _draw_back_of_head, _draw_dummy, _draw_smiley, _draw_animal, _draw_raised_hand, _draw_dial,
    )  # fmt: skip
    kinds[rng.integers(len(kinds))](rng, pen)
    corners = pen.tilted(-pen.tilt).to_pixels([(-0.4, -0.5), (0.4, 0.5)])
    light = rng.uniform(0.5, 1.15)
    picture = _light(rng, pen, light)
    cut_out = CutOut(picture, pen.face, 0.0, corners.reshape(4), np.zeros((5, 2)), False, False, light, 0.0)
    return _blur(rng, _shrink(cut_out, factor), height)


def _pick(rng: np.random.Generator, **shares: float) -> str:
    """One of the names, by its share."""
    return list(shares)[int(np.searchsorted(np.cumsum(list(shares.values())), rng.random() * sum(shares.values())))]


def _any_colour(rng: np.random.Generator, low: int = 0, high: int = 256) -> Colour:
    colour: Colour = rng.integers(low, high, 3).tolist()
    return colour


def _darker(colour: Sequence[int], factor: float) -> Colour:
    return [min(255, int(value * factor)) for value in colour]


def _draw_body(rng: np.random.Generator, pen: _Pen, neck: Colour) -> None:
    """Neck, shoulders and chest, some with a pattern."""
    cloth = _any_colour(rng)
    half = rng.uniform(0.75, 1.0)
    slope = rng.uniform(0.0, 0.15)
    pen.polygon([(-0.2, 0.25), (0.2, 0.25), (0.24, 0.75), (-0.24, 0.75)], neck)
    upper = [(-half, 0.95), (-half * 0.85, 0.78 + slope / 2), (-0.24, 0.68 - slope), (0, 0.76)]
    right = [(-x, y) for x, y in reversed(upper[:3])]
    pen.polygon([(-half * 0.95, 2.2), *upper, *right, (half * 0.95, 2.2)], cloth)
    pattern, second = _pick(rng, plain=0.5, stripes=0.2, coat=0.2, shirt=0.1), _any_colour(rng)
    if pattern == "stripes":
        for y in np.arange(0.9, 1.9, 0.18).tolist():
            pen.line([(-half * 0.9, y), (half * 0.9, y)], second, 0.07)
    elif pattern == "coat":
        pen.polygon([(-0.2, 0.7), (0.2, 0.7), (0.06, 1.9), (-0.06, 1.9)], second)
    elif pattern == "shirt":
        pen.polygon([(-0.24, 0.66), (0.24, 0.66), (0.3, 0.85), (0, 0.8), (-0.3, 0.85)], second)


def _draw_skull(pen: _Pen, head: _Head, look: _Look) -> None:
    """What the face is in front of: the back of the hair and the ears."""
    back = -0.14 * np.sin(head.yaw)
    if look.style == "bun":
        pen.ellipse((back, -0.62), 0.17, 0.15, look.hair)
    if look.style == "bald":
        pen.ellipse((back, -0.08), look.half_width - 0.01, 0.44, look.skin)
    else:
        pen.ellipse((back, -0.13), look.half_width + 0.05, 0.46, look.hair)
    if look.style == "curly":
        for angle in np.linspace(np.pi * 0.9, np.pi * 2.1, 9):
            curl = (back + np.cos(angle) * (look.half_width + 0.03), -0.12 + np.sin(angle) * 0.44)
            pen.ellipse(curl, 0.13, 0.13, look.hair)
    if look.style != "scarf":
        ear = _darker(look.skin, 0.85)
        for x, hidden in ((head.left, head.yaw < -0.3), (head.right, head.yaw > 0.3)):
            if not hidden:
                pen.ellipse((x, -0.01), 0.06, 0.1, ear)


def _draw_features(
    rng: np.random.Generator, pen: _Pen, head: _Head, look: _Look, landmarks: NDArray[np.float64]
) -> None:
    """Eyes, brows, nose and mouth; the nose tip and the corners of the mouth are given."""
    shadow, dark = _darker(look.skin, 0.8), _darker(look.skin, 0.5)
    lips = [int(look.skin[0] * 0.6), int(look.skin[1] * 0.5), min(255, int(look.skin[2] * 0.9))]
    iris, brow = _any_colour(rng, 10, 90), _darker(look.hair, 0.8)
    lift = 0.0 if rng.random() < 0.08 else rng.uniform(0.025, 0.045)  # closed, or by how much the eyes are open
    frown = rng.uniform(-0.02, 0.03)
    for side in (-1, 1):
        x, y = side * _EYE[0], _EYE[1]
        pen.polygon(head.oval(x, y - 0.01, 0.11, 0.075), shadow)
        if lift:
            pen.polygon(head.oval(x, y, 0.08, lift), [225, 232, 235])
            pen.polygon(head.oval(x, y, lift, lift), iris)
        pen.line(head.project([(x - 0.09, y), (x, y - lift), (x + 0.09, y)]), dark, 0.02)
        pen.line(head.project([(x - side * 0.09, y - 0.1 + frown), (x + side * 0.1, y - 0.11)]), brow, 0.035)
    nose = landmarks[2]
    bridge = head.project([(0.0, -0.08)], height=0.02)[0]
    wing = head.project([(0.07 if head.yaw < 0 else -0.07, 0.13)])[0]
    pen.polygon([bridge, nose, wing], shadow)
    other_wing = nose + np.array([0.04 if wing[0] < nose[0] else -0.04, 0.03])
    pen.ellipse(nose + np.array([0, 0.01]), 0.045, 0.035, shadow)
    pen.line([wing, nose + np.array([0, 0.045]), other_wing], dark, 0.018)
    corners = [(-_MOUTH[0], _MOUTH[1]), _MOUTH]
    if look.mouth == "open":
        drop = rng.uniform(0.07, 0.13)
        pen.polygon(head.oval(0, _MOUTH[1], _MOUTH[0], drop), lips)
        pen.polygon(head.oval(0, _MOUTH[1], _MOUTH[0] * 0.75, drop * 0.7), [40, 25, 70])
    elif look.mouth == "smile":
        sag = rng.uniform(0.05, 0.1)
        lower, teeth = _MOUTH[1] + sag, _MOUTH[1] + 0.008
        pen.polygon(head.project([*corners, (0.06, lower), (-0.06, lower)]), lips)
        pen.polygon(head.project([(-0.09, teeth), (0.09, teeth), (0, teeth + sag * 0.6)]), [225, 230, 235])
    else:
        pen.polygon(head.oval(0, _MOUTH[1], _MOUTH[0], 0.035), lips)
        pen.line(head.project([corners[0], (0, _MOUTH[1] + 0.005), corners[1]]), dark, 0.015)


def _draw_hair(rng: np.random.Generator, pen: _Pen, head: _Head, look: _Look) -> None:
    """Hair and beard in front of the face."""
    if look.beard == "full":
        pen.polygon(head.below(0.1, 0.08, 1.02), look.hair)
        pen.polygon(head.oval(0, _MOUTH[1], _MOUTH[0] * 0.8, 0.03), [70, 60, 130])
    elif look.beard == "moustache":
        pen.polygon(head.oval(0, 0.205, 0.13, 0.03), look.hair)
    if look.style == "bald":
        return
    hairline = rng.uniform(-0.38, -0.22)
    temple, part = hairline + 0.08, (rng.uniform(-0.15, 0.15), hairline - 0.06)
    fringe = head.project([(0.3, temple), (0.2, hairline), part, (-0.2, hairline), (-0.3, temple)])
    pen.polygon(np.concatenate([head.above(hairline + 0.1), fringe]), look.hair)
    if look.style in ("long", "scarf"):
        for x, hidden in ((head.left, head.yaw < -0.5), (head.right, head.yaw > 0.5)):
            if not hidden:
                pen.ellipse((x * 1.08, 0.1), 0.09, 0.5, look.hair)


def _draw_worn(rng: np.random.Generator, pen: _Pen, head: _Head, look: _Look) -> None:
    """Mask, glasses and hat."""
    if look.mask:
        cloth = [225, 215, 180] if rng.random() < 0.5 else _any_colour(rng)
        pen.polygon(head.below(rng.uniform(0.02, 0.1), -0.06, 1.03), cloth, covers=True)
        for y in (0.16, 0.24, 0.32):
            pen.line(head.project([(-0.2, y), (0.2, y)]), _darker(cloth, 0.8), 0.012)
    if look.glasses != "none":
        frame = _any_colour(rng, 0, 80)
        half = rng.uniform(0.12, 0.15), rng.uniform(0.075, 0.11)
        for side in (-1, 1):
            rim = head.oval(side * _EYE[0], _EYE[1], *half)
            if look.glasses == "sun":
                pen.polygon(rim, _darker(frame, 0.6), covers=True)
            pen.line(rim, frame, 0.025)
        pen.line(head.project([(-0.06, _EYE[1]), (0.06, _EYE[1])], height=0.03), frame, 0.025)
    colour, second = _any_colour(rng), _any_colour(rng)
    turn = 0.35 * np.sin(head.yaw)
    if look.hat == "cap":
        pen.ellipse((-turn * 0.3, -0.28), look.half_width + 0.06, 0.36, colour, (180, 360))
        pen.ellipse((turn, -0.29), 0.36, 0.075, _darker(colour, 0.7))
    elif look.hat == "beanie":
        pen.ellipse((-turn * 0.3, -0.24), look.half_width + 0.06, 0.45, colour, (180, 360))
        pen.polygon([(-0.45, -0.33), (0.45, -0.33), (0.44, -0.2), (-0.44, -0.2)], second)
    elif look.hat == "brim":
        pen.ellipse((-turn * 0.2, -0.34), 0.75, 0.12, _darker(colour, 0.75))
        pen.ellipse((-turn * 0.2, -0.36), look.half_width + 0.02, 0.4, colour, (180, 360))
    elif look.hat == "helmet":
        pen.ellipse((-turn * 0.3, -0.2), look.half_width + 0.1, 0.52, colour, (180, 360))
        pen.line([(-0.4, -0.2), (-0.36, 0.3), (0, 0.53), (0.36, 0.3), (0.4, -0.2)], _darker(second, 0.5), 0.04)


def _draw_held(rng: np.random.Generator, pen: _Pen, look: _Look) -> None:
    """A hand, or something held, in front of the face."""
    x, y = rng.uniform(-0.35, 0.35), rng.uniform(0.05, 0.45)
    skin = _darker(look.skin, rng.uniform(0.8, 1.0))
    kind = _pick(rng, hand=0.5, box=0.35, microphone=0.15)
    pen.line([(x * 2.2, 1.6), (x * 1.2, y + 0.15)], _any_colour(rng), 0.22, covers=True)
    pen.ellipse((x, y), 0.16, 0.19, skin, covers=True)
    if kind == "hand":
        for spread in (-0.12, -0.04, 0.04, 0.12):
            pen.line([(x + spread, y), (x + spread * 1.5 - x * 0.3, y - 0.35)], _darker(skin, 0.9), 0.075, covers=True)
    elif kind == "box":  # a phone, a cup, a book
        half, top = rng.uniform(0.1, 0.2), y - rng.uniform(0.25, 0.45)
        corners = [(x - half, top), (x + half, top), (x + half, y + 0.1), (x - half, y + 0.1)]
        pen.polygon(corners, _any_colour(rng), covers=True)
    else:
        pen.line([(x, y), (x * 0.5, y - 0.3)], [60, 60, 60], 0.08, covers=True)
        pen.ellipse((x * 0.5, y - 0.3), 0.09, 0.1, [40, 40, 45], covers=True)


def _draw_back_of_head(rng: np.random.Generator, pen: _Pen) -> None:
    skin = vary(rng, SKIN_TONES[rng.integers(len(SKIN_TONES))], 12)
    hair = vary(rng, HAIR_COLOURS[rng.integers(len(HAIR_COLOURS))], 12)
    _draw_body(rng, pen.tilted(-pen.tilt), _darker(skin, 0.8))
    half = rng.uniform(0.36, 0.43)
    for side in (-1, 1):
        pen.ellipse((side * half, 0.02), 0.06, 0.1, skin)
    pen.ellipse((0, 0.02), half, 0.5, skin)
    pen.ellipse((0, -0.05), half + 0.03, rng.uniform(0.46, 0.62), hair)


def _draw_dummy(rng: np.random.Generator, pen: _Pen) -> None:
    """A shop-window dummy, or skin without a face."""
    grey = int(rng.integers(60, 240))
    plain = [grey] * 3 if rng.random() < 0.5 else vary(rng, SKIN_TONES[rng.integers(len(SKIN_TONES))], 12)
    if rng.random() < 0.6:
        _draw_body(rng, pen.tilted(-pen.tilt), _darker(plain, 0.8))
    pen.ellipse((0, 0), rng.uniform(0.34, 0.43), 0.5, plain)
    if rng.random() < 0.5:
        pen.ellipse((0, -0.2), 0.42, 0.36, vary(rng, HAIR_COLOURS[rng.integers(len(HAIR_COLOURS))], 12), (180, 360))


def _draw_smiley(rng: np.random.Generator, pen: _Pen) -> None:
    ink = _any_colour(rng, 0, 70)
    pen.ellipse((0, 0), 0.5, 0.5, [60, 210, 245] if rng.random() < 0.5 else _any_colour(rng, 100))
    for side in (-1, 1):
        pen.ellipse((side * 0.17, -0.13), 0.055, 0.09, ink)
    bend = rng.uniform(-0.15, 0.15)
    pen.line([(-0.25, 0.2 - bend), (-0.12, 0.2), (0.12, 0.2), (0.25, 0.2 - bend)], ink, 0.05)


def _draw_animal(rng: np.random.Generator, pen: _Pen) -> None:
    """A cat or a bear."""
    fur = vary(rng, HAIR_COLOURS[rng.integers(1, len(HAIR_COLOURS))], 25)
    pen.tilted(-pen.tilt).ellipse((0, 1.0), 0.6, 0.75, _darker(fur, 0.9))
    pointed = rng.random() < 0.5
    for side in (-1, 1):
        if pointed:
            pen.polygon([(side * 0.45, -0.65), (side * 0.1, -0.4), (side * 0.46, -0.1)], fur)
        else:
            pen.ellipse((side * 0.36, -0.38), 0.16, 0.16, _darker(fur, 0.8))
    pen.ellipse((0, 0), 0.5, 0.45, fur)
    pen.ellipse((0, 0.18), 0.24, 0.19, _darker(fur, 1.4))
    for side in (-1, 1):
        pen.ellipse((side * 0.2, -0.1), 0.07, 0.07, [60, 190, 190] if pointed else [15, 15, 15])
        pen.ellipse((side * 0.2, -0.1), 0.025, 0.06, [10, 10, 10])
    pen.ellipse((0, 0.1), 0.08, 0.05, [30, 25, 35])
    pen.line([(-0.12, 0.26), (0, 0.22), (0.12, 0.26)], [30, 25, 35], 0.025)


def _draw_raised_hand(rng: np.random.Generator, pen: _Pen) -> None:
    skin = vary(rng, SKIN_TONES[rng.integers(len(SKIN_TONES))], 12)
    pen.line([(0.05, 1.9), (0, 0.5)], _any_colour(rng), 0.34)
    pen.ellipse((0, 0.2), 0.28, 0.34, skin)
    for spread in (-0.21, -0.07, 0.07, 0.21):
        pen.line([(spread, 0.1), (spread * 1.6, -0.45)], _darker(skin, 0.93), 0.13)
    pen.line([(0.2, 0.3), (0.48, -0.02)], _darker(skin, 0.93), 0.13)


def _draw_dial(rng: np.random.Generator, pen: _Pen) -> None:
    """A clock, or a socket: a disc with marks where a face has its features."""
    plate, ink = _any_colour(rng, 120), _any_colour(rng, 0, 90)
    pen.ellipse((0, 0), 0.5, 0.5, ink)
    pen.ellipse((0, 0), 0.44, 0.44, plate)
    if rng.random() < 0.5:
        for x, y in ((-0.17, -0.06), (0.17, -0.06), (0, 0.2)):
            pen.ellipse((x, y), 0.06, 0.06, ink)
        return
    for angle in np.arange(12) * np.pi / 6:
        direction = np.array([np.cos(angle), np.sin(angle)])
        pen.line([direction * 0.36, direction * 0.42], ink, 0.03)
    for length in (0.22, 0.34):
        angle = rng.uniform(0, 2 * np.pi)
        pen.line([(0, 0), (length * np.cos(angle), length * np.sin(angle))], ink, 0.04)


def _light(rng: np.random.Generator, pen: _Pen, brightness: float) -> NDArray[np.uint8]:
    """The picture, lit from one side and darker towards the rim of the head."""
    y = np.linspace(-_ABOVE, _BELOW, 13)[:, None]
    x = np.linspace(-_HALF_WIDTH, _HALF_WIDTH, 11)[None, :]
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.9)
    light = 1.05 + strength * (np.cos(direction) * x + np.sin(direction) * y).clip(-0.7, 0.7)
    light -= 0.7 * np.minimum(x**2 + y**2, 0.5)
    grid = np.empty((*light.shape, 4), dtype=np.uint8)
    grid[..., :3] = (light * brightness * 128).clip(20, 255)[..., None]
    grid[..., 3] = 128
    height, width = pen.face.shape
    scaled = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.multiply(pen.picture, scaled, scale=1 / 128), dtype=np.uint8)


def _shrink(cut_out: CutOut, factor: int) -> CutOut:
    """The cut-out at one ``factor``-th of its size."""
    if factor == 1:
        return cut_out
    height, width = (max(1, side // factor) for side in cut_out.face.shape)
    inside = (slice(height * factor), slice(width * factor))
    return cut_out._replace(
        picture=cv2.resize(cut_out.picture[inside], (width, height), interpolation=cv2.INTER_AREA),
        face=cv2.resize(cut_out.face[inside], (width, height), interpolation=cv2.INTER_AREA),
        area=cut_out.area / factor**2,
        box=cut_out.box / factor,
        landmarks=cut_out.landmarks / factor,
    )


def _blur(rng: np.random.Generator, cut_out: CutOut, height: float) -> CutOut:
    """Some are out of focus."""
    if rng.random() > 0.15:
        return cut_out
    sigma = max(0.5, rng.uniform(0.01, 0.06) * height)
    return cut_out._replace(picture=cv2.GaussianBlur(cut_out.picture, (0, 0), sigma), blur=sigma)
