"""Captioned videos of moving shapes: everything tiny-wan has ever seen.

A scene holds one or two shapes (8 colours, 3 kinds) that move in one of 4 directions at their own constant
speed over one of 4 background colours with a soft gradient, and bounce off the frame's edges. Its caption is
one regular sentence:

    a red circle moving left and a blue square moving up on a gray background

The direction in the caption is the direction at the start. A shape starts with room to keep that direction
for the first `STRAIGHT` frames, so that a short clip never contradicts its caption, and two shapes keep 4
pixels apart for `LONGEST` frames.

Captions, not videos, are held out: `is_held_out` hashes the sentence, training skips one caption in ten, and
`held_out_prompts` draws only from those. The words of a held-out caption are all known to the model; their
combination is new.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HEIGHT, WIDTH = 64, 128
FPS = 16
STRAIGHT = 25
LONGEST = 65

COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.15, 0.35, 1.00),
    "yellow": (0.95, 0.88, 0.15),
    "purple": (0.65, 0.20, 0.85),
    "orange": (1.00, 0.50, 0.05),
    "cyan": (0.10, 0.85, 0.90),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS = {
    "black": (0.04, 0.04, 0.05),
    "gray": (0.45, 0.45, 0.47),
    "navy": (0.05, 0.08, 0.28),
    "brown": (0.33, 0.20, 0.10),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# How far each shape reaches from its centre, in units of its radius: left, right, up, down. The sizes give
# the three kinds about the same area.
REACH = {"circle": (1.0, 1.0, 1.0, 1.0), "square": (0.89,) * 4, "triangle": (1.21, 1.21, 1.4, 0.7)}
SHAPES = tuple(REACH)
MEANINGS = (*COLOURS, *SHAPES, *DIRECTIONS)
WORDS = ("a", "moving", "and", "on", "background", *COLOURS, *BACKGROUNDS, *SHAPES, *DIRECTIONS)


@dataclass(frozen=True)
class Shape:
    """One moving shape. Lengths in pixels, speed in pixels per frame, `x` to the right and `y` down."""

    colour: str
    kind: str
    direction: str
    radius: float = 0.0
    x: float = 0.0
    y: float = 0.0
    speed: float = 0.0

    def path(self, frames: int) -> np.ndarray:
        """Centres [frames, 2] as (x, y), bouncing between the edges of the picture."""
        left, right, up, down = (self.radius * r for r in REACH[self.kind])
        low = np.array([left, up])
        high = np.array([WIDTH - right, HEIGHT - down])
        step = self.speed * np.array(DIRECTIONS[self.direction])
        travelled = np.array([self.x, self.y]) - low + np.arange(frames)[:, None] * step
        span = high - low
        return low + span - np.abs(np.mod(travelled, 2 * span) - span)


@dataclass(frozen=True)
class Scene:
    """Shapes over a background whose brightness changes by `slope` across it along `angle` (radians)."""

    shapes: tuple[Shape, ...]
    background: str
    angle: float = 0.0
    slope: float = 0.0

    @property
    def caption(self) -> str:
        """The sentence that tells all that is scored: shapes' colours, kinds, directions; the background."""
        shapes = " and ".join(f"a {s.colour} {s.kind} moving {s.direction}" for s in self.shapes)
        return f"{shapes} on a {self.background} background"


def parse(caption: str) -> Scene:
    """The scene a caption describes, without sizes and places; ValueError where it is not such a caption."""
    words = caption.lower().replace(".", " ").split()
    shapes = []
    while len(words) >= 5 and words[0] == "a" and words[3] == "moving":
        _, colour, kind, _, direction = words[:5]
        if colour not in COLOURS or kind not in SHAPES or direction not in DIRECTIONS:
            break
        shapes.append(Shape(colour, kind, direction))
        words = words[6:] if words[5:6] == ["and"] else words[5:]
    if not shapes or words[:2] != ["on", "a"] or words[3:] != ["background"] or words[2] not in BACKGROUNDS:
        raise ValueError(
            "expected 'a COLOUR SHAPE moving DIRECTION [and ...] on a BACKGROUND background', "
            f"got {caption!r}"
        )
    return Scene(tuple(shapes), words[2])


def is_held_out(caption: str) -> bool:
    """Whether training never uses this caption: one in ten, by its SHA-256."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def _describe(rng: np.random.Generator, count: int) -> Scene:
    """A random caption's content."""
    # Two shapes of one colour could not be told apart by an observer who goes by colour.
    colours = rng.choice(list(COLOURS), size=count, replace=False)
    shapes = tuple(Shape(str(c), str(rng.choice(SHAPES)), str(rng.choice(list(DIRECTIONS)))) for c in colours)
    return Scene(shapes, str(rng.choice(list(BACKGROUNDS))))


def place(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same caption with random sizes, places, speeds and gradient; its shapes never touch."""
    radii = (10.0, 13.0) if len(scene.shapes) == 1 else (9.5, 11.5)
    while True:
        shapes = []
        for shape in scene.shapes:
            radius, speed = rng.uniform(*radii), rng.uniform(0.8, 1.4)
            left, right, up, down = (radius * r for r in REACH[shape.kind])
            centre = []
            for low, high, step in zip(
                (left, up), (WIDTH - right, HEIGHT - down), DIRECTIONS[shape.direction], strict=True
            ):
                room = min(speed * (STRAIGHT - 1), high - low)
                centre.append(rng.uniform(low + room * (step < 0), high - room * (step > 0)))
            shapes.append(
                Shape(shape.colour, shape.kind, shape.direction, radius, centre[0], centre[1], speed)
            )
        if len(shapes) == 1:
            break
        one, two = shapes
        gap = np.linalg.norm(one.path(LONGEST) - two.path(LONGEST), axis=1).min()
        if gap > sum(s.radius * max(REACH[s.kind]) for s in shapes) + 4:
            break
    return Scene(tuple(shapes), scene.background, rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.3))


def sample(seed: int, index: int, *, held_out: bool = False) -> Scene:
    """Scene `index` of the stream `seed`: the same on every machine, one or two shapes with equal chance."""
    rng = np.random.default_rng((seed, index))
    while True:
        scene = _describe(rng, int(rng.integers(1, 3)))
        if is_held_out(scene.caption) == held_out:
            return place(scene, rng)


def covers(scene: Scene, frames: int) -> Tensor:
    """How much of each pixel each shape covers, float32 [shapes, frames, HEIGHT, WIDTH] in 0..1."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    maps = []
    for shape in scene.shapes:
        centre = torch.from_numpy(shape.path(frames)).float()
        dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
        if shape.kind == "circle":
            outside = (dx.square() + dy.square()).sqrt() - shape.radius
        elif shape.kind == "square":
            outside = torch.maximum(dx.abs(), dy.abs()) - shape.radius * 0.89
        else:
            # An equilateral triangle, apex up: the largest of the distances to its three sides.
            outside = torch.maximum(dy, 0.866 * dx.abs() - 0.5 * dy) - 0.7 * shape.radius
        # An edge of 1.5 pixels: sharp to look at, smooth enough that sub-pixel motion shows.
        maps.append((0.5 - outside / 1.5).clamp(0, 1))
    return torch.stack(maps)


def render(scene: Scene, frames: int) -> Tensor:
    """The video, float32 [frames, HEIGHT, WIDTH, 3] in 0..1."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    along = (x / WIDTH - 0.5) * np.cos(scene.angle) + (y / HEIGHT - 0.5) * np.sin(scene.angle)
    video = torch.tensor(BACKGROUNDS[scene.background]) * (1 + scene.slope * along)[..., None]
    video = video.float().expand(frames, HEIGHT, WIDTH, 3)
    for shape, cover in zip(scene.shapes, covers(scene, frames), strict=True):
        video = video + (torch.tensor(COLOURS[shape.colour]) - video) * cover[..., None]
    return video.clamp(0, 1)


def meaning(scene: Scene, frames: int) -> Tensor:
    """What a caption's words point at: float32 [latent frames, HEIGHT/8, WIDTH/8, len(MEANINGS)] in 0..1.

    Per token (8x8 pixels, 2 frames, the first frame alone) the share covered by shapes of each colour, kind
    and direction.
    """
    maps = covers(scene, frames)
    maps = torch.cat([maps[:, :1], maps], 1).unflatten(1, (-1, 2)).mean(2)
    maps = maps.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).mean((-1, -3))
    words = [[float(w in (s.colour, s.kind, s.direction)) for w in MEANINGS] for s in scene.shapes]
    return torch.einsum("nfhw,nm->fhwm", maps, torch.tensor(words))


def described(scene: Scene) -> Tensor:
    """What each word of a caption speaks of: float32 [words, len(MEANINGS) + len(BACKGROUNDS)], 0 or 1.

    Every word of "a red circle moving left" speaks of red, circle and left, every word of "on a gray
    background" of gray.
    """
    rows: list[set[str]] = []
    for shape in scene.shapes:
        rows += [set()] * bool(rows) + [{shape.colour, shape.kind, shape.direction}] * 5
    rows += [{scene.background}] * 4
    return torch.tensor([[float(word in row) for word in (*MEANINGS, *BACKGROUNDS)] for row in rows])


def clips(seed: int, start: int, count: int, frames: int) -> tuple[Tensor, list[Scene]]:
    """`count` training clips of a stream: float32 [count, 3, frames, H, W] in -1..1, and their scenes."""
    scenes = [sample(seed, i) for i in range(start, start + count)]
    video = torch.stack([render(s, frames) for s in scenes])
    return video.permute(0, 4, 1, 2, 3) * 2 - 1, scenes


def held_out_prompts(count: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """`count` different captions that training never used, each with a scene that shows it.

    Captions with one and with two shapes alternate. Raises ValueError when `count` exceeds what the grammar
    holds out.
    """
    if not 0 <= count <= 64:
        raise ValueError(f"expected 0 to 64 prompts (few one-shape captions are held out), got {count}")
    rng = np.random.default_rng((seed, 1_000_003))
    prompts: dict[str, Scene] = {}
    while len(prompts) < count:
        scene = _describe(rng, 1 + len(prompts) % 2)
        if is_held_out(scene.caption):
            prompts.setdefault(scene.caption, place(scene, rng))
    return list(prompts.items())
