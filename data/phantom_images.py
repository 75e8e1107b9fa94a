"""Draw the images of the phantoms with numpy: a canvas, and four drawings of an anatomy on it.

Coordinates are the body's: x to the image's right, y down, the image spanning -1 … 1. As on a
light box, the patient's right is on the image's left. Grey values run from 0 (black) to 1 (white).
"""
import copy
import math
from typing import NamedTuple

import numpy as np

SIDES = {"right": -1, "left": 1}   # of the patient: the sign of x


class Finding(NamedTuple):
    """One abnormality. The texts give its name, size, side and zone, and nothing else."""
    name: str
    size: str
    side: str
    zone: str | None   # None if it fills its side
    x: float
    y: float
    radius: float
    stretch: float     # √(long / short axis)
    tilt: float        # radians


# The result of a drawing: image (S, S) in 0 … 1, the body's mask (S, S) in 0 … 1, and the
# standard deviation of the noise, a number or (S, S).
Drawing = tuple[np.ndarray, np.ndarray, float | np.ndarray]


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """A random number between two bounds."""
    return low + (high - low) * rng.random()


# ------------------------------------------------------------------------------------------- canvas

class Canvas:
    """An image (S, S) of a patient in a slightly random pose, tilted by at most `tilt` radians.

    A shape is given by every pixel's distance (S, S) to its edge, negative inside. So the
    minimum of two shapes is their union, and the maximum their intersection.
    """

    def __init__(self, size: int, rng: np.random.Generator, tilt: float):
        # A random pose: rotation, zoom, and a shift along both axes.
        tilt, zoom = between(rng, -tilt, tilt), between(rng, 0.95, 1.03)
        centres = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)  # (S,) of pixels
        across = (centres[None, :] - between(rng, -0.03, 0.03)) / zoom  # (1, S)
        down = (centres[:, None] - between(rng, -0.03, 0.03)) / zoom  # (S, 1)

        # The body's coordinates of each pixel.
        self.x = math.cos(tilt) * across + math.sin(tilt) * down      # (S, S)
        self.y = math.cos(tilt) * down - math.sin(tilt) * across      # (S, S)
        self.pixel = 2 / size
        self.image = np.zeros((size, size), np.float32)

    def mirrored(self) -> "Canvas":
        """The same image with |x| for x: what is drawn at x > 0 appears on both sides."""
        both = copy.copy(self)
        both.x = np.abs(self.x)
        return both

    def ellipse(self, x, y, rx: float, ry: float, tilt: float = 0.0) -> np.ndarray:
        """The shape (S, S) of an ellipse around (x, y), tilted by `tilt` radians."""
        u, v = self.x - x, self.y - y
        if tilt:
            u, v = (math.cos(tilt) * u + math.sin(tilt) * v,
                    math.cos(tilt) * v - math.sin(tilt) * u)
        return (np.sqrt((u / rx) ** 2 + (v / ry) ** 2) - 1) * min(rx, ry)

    def line(self, x0, y0, x1, y1, width: float, taper: float = 0.0) -> np.ndarray:
        """The shape (S, S) of a line with round ends. Its width falls to width · (1 - taper)."""
        dx, dy = x1 - x0, y1 - y0
        u, v = self.x - x0, self.y - y0
        along = np.clip((u * dx + v * dy) / (dx * dx + dy * dy), 0, 1)   # 0 at its start, 1 at end
        distance = np.sqrt((u - along * dx) ** 2 + (v - along * dy) ** 2)
        return distance - width / 2 * (1 - taper * along)

    def cover(self, shape: np.ndarray, blur: float = 0.0) -> np.ndarray:
        """(S, S): the share of each pixel inside. The edge is one pixel wide, or `blur` if more."""
        return np.clip(0.5 - shape / max(self.pixel, blur), 0, 1)

    def fill(self, shape: np.ndarray, grey: float | np.ndarray, blur: float = 0.0) -> None:
        """Paint a shape in one grey value, or in those of an array (S, S)."""
        self.image += self.cover(shape, blur) * (grey - self.image)

    def lesion(self, f: Finding, grey: float, rim: float | None = None) -> None:
        """Paint a finding as a disk, with a ring of grey value `rim` around it if given."""
        edge = self.ellipse(f.x, f.y, f.radius * f.stretch, f.radius / f.stretch, f.tilt)
        if rim is not None:
            self.fill(edge, rim)
            edge = edge + 0.4 * f.radius
        self.fill(edge, grey)


# ------------------------------------------------------------------------------------ four drawings
# Each draws a random anatomy (the same one for any findings) and the findings in it.

def draw_chest(size: int, rng: np.random.Generator, findings: tuple[Finding, ...]) -> Drawing:
    """Frontal radiograph: dark lungs crossed by ribs, bright heart and spine, two diaphragms."""
    c = Canvas(size, rng, tilt=0.04)
    both = c.mirrored()
    out = both.x   # distance from the midline

    # Soft tissue, within neck, shoulders and chest wall.
    shoulders = between(rng, -0.94, -0.88) + 0.34 * out ** 2 - c.y
    chest_wall = out - between(rng, 0.90, 0.96)
    body = c.cover(np.minimum(np.maximum(chest_wall, shoulders), out - 0.24))
    c.image += between(rng, 0.56, 0.64) - 0.12 * out ** 4

    # What both lungs have in common.
    width, height = between(rng, 0.35, 0.38), between(rng, 0.84, 0.90)
    top = between(rng, 0.10, 0.16)
    air = between(rng, 0.24, 0.30)
    pitch, phase = between(rng, 4.2, 4.8), rng.random()
    rib_phase = pitch * (c.y - 0.45 * (out - 0.25) ** 2 + 0.12 * out) + phase
    ribs = 0.07 * np.cos(2 * np.pi * rib_phase)
    vessels = 0.16 * np.exp(-12 * ((out - 0.18) ** 2 + c.y ** 2))
    domes = {"right": between(rng, 0.40, 0.44), "left": between(rng, 0.46, 0.50)}

    for side, sign in SIDES.items():
        # The abdomen below the diaphragm, then the lung above it.
        dome = c.y - domes[side] - 0.9 * (c.x - sign * 0.42) ** 2
        lung = np.maximum(c.ellipse(sign * 0.42, top, width, height), dome)
        c.fill(np.maximum(-dome, out - 0.86), 0.74)
        c.fill(lung, air + ribs + vessels)

        # Findings that fill a side: a collapsed lung in black air, or fluid at its bottom.
        for f in findings:
            if f.side == side and f.name == "pneumothorax":
                rest = 0.94 - 1.9 * f.radius   # of the lung's width and height
                hilum = sign * (0.42 - 0.9 * width * (1 - rest))
                collapsed = c.ellipse(hilum, top + 0.05, width * rest, height * rest)
                c.fill(lung, 0.03)
                c.fill(np.maximum(lung, collapsed - 0.03), 0.75)   # pleural line
                c.fill(np.maximum(lung, collapsed), air + 0.14 + ribs)
            if f.side == side and f.name == "effusion":
                climb = 0.35 * np.maximum(out - 0.35, 0)           # along the chest wall
                fluid = 0.67 - 2.8 * f.radius - climb - c.y
                c.fill(np.maximum(lung, fluid), 0.84)

    # What lies in front of the lungs: spine, heart (two ellipses), aortic knob, trachea, gastric
    # bubble, clavicles.
    c.fill(out - 0.10, 0.72 + 0.05 * np.cos(2 * np.pi * (5 * c.y + phase)), blur=0.06)
    heart = c.ellipse(between(rng, 0.10, 0.14), 0.27, between(rng, 0.26, 0.30), 0.22, 0.5)
    c.fill(np.minimum(heart, c.ellipse(-0.06, 0.20, 0.14, 0.22)), 0.78, blur=0.06)
    c.fill(c.ellipse(0.10, -0.24, 0.12, 0.13), 0.74, blur=0.05)
    c.fill(c.line(0, -1.1, 0, -0.22, 0.09), 0.40, blur=0.05)
    c.fill(c.ellipse(0.45, 0.72, between(rng, 0.12, 0.17), 0.09), 0.38)
    rise = between(rng, 0.06, 0.14)
    c.fill(both.line(0.10, -0.58, 0.74, -0.58 - rise, 0.06), 0.74)

    for f in findings:
        if f.name == "nodule":
            c.lesion(f, 0.95)
        elif f.name == "cavity":
            c.lesion(f, 0.04, rim=0.92)
    return c.image, body, 0.02


def draw_ct(size: int, rng: np.random.Generator, findings: tuple[Finding, ...]) -> Drawing:
    """Axial slice with contrast medium: liver, stomach, spleen, kidneys and spine, in fat."""
    c = Canvas(size, rng, tilt=0.07)
    both = c.mirrored()

    # Fat under the skin, the muscular wall, the mesentery inside.
    skin = c.ellipse(0, 0, between(rng, 0.93, 0.97), between(rng, 0.78, 0.83))
    wall = skin + between(rng, 0.05, 0.09)
    cavity = wall + 0.08
    c.image += 0.26
    c.fill(wall, 0.50)
    c.fill(cavity, 0.36)

    # Stomach with a bubble of air, spleen, liver in two lobes, portal vein.
    tissue = between(rng, 0.52, 0.58)
    stomach = np.maximum(cavity, c.ellipse(0.52, -0.18, 0.24, 0.26, between(rng, 0.2, 0.6)))
    air = np.maximum(stomach + 0.03, c.y + between(rng, 0.20, 0.26))
    spleen = c.ellipse(0.70, 0.16, 0.13, between(rng, 0.24, 0.30), -0.25)
    right = c.ellipse(-0.47, -0.10, between(rng, 0.38, 0.42), between(rng, 0.42, 0.46), 0.2)
    left = c.ellipse(0.08, -0.32, between(rng, 0.42, 0.48), between(rng, 0.22, 0.25), -0.12)
    c.fill(stomach, 0.44)
    c.fill(air, 0.02)
    c.fill(np.maximum(cavity, spleen), tissue + 0.10)
    c.fill(np.maximum(cavity, np.minimum(right, left)), tissue)
    c.fill(c.line(-0.30, 0.02, -0.08, -0.10, 0.07), tissue + 0.16)

    # Back to front, on both sides or in the middle.
    width = between(rng, 0.20, 0.23)
    c.fill(both.line(0.18, 0.40, 0.20, 0.52, 0.20), 0.48)      # psoas
    c.fill(both.ellipse(0.40, 0.38, width, 0.18, -0.5), 0.68)  # kidneys
    c.fill(both.ellipse(0.30, 0.38, 0.09, 0.07), 0.46)         # renal sinus
    c.fill(both.line(0.82, 0.0, 0.76, 0.24, 0.05), 0.90)       # ribs
    c.fill(c.ellipse(0, 0.38, 0.15, 0.13), 0.88)               # vertebra
    c.fill(c.line(0, 0.50, 0, 0.66, 0.07), 0.88)               # its spinous process
    c.fill(c.ellipse(0, 0.52, 0.06, 0.05), 0.40)               # spinal canal
    c.fill(c.ellipse(0.08, 0.15, 0.085, 0.085), 0.86)          # aorta
    c.fill(c.ellipse(-0.13, 0.14, 0.09, 0.07), 0.66)           # vena cava

    greys = {"cyst": (0.10, None), "calcification": (1.00, None), "abscess": (0.14, 0.96)}
    for f in findings:
        c.lesion(f, *greys[f.name])
    return c.image, c.cover(skin), 0.03


def draw_mri(size: int, rng: np.random.Generator, findings: tuple[Finding, ...]) -> Drawing:
    """Axial T1-weighted slice with contrast medium: skull, folded cortex, dark ventricles."""
    c = Canvas(size, rng, tilt=0.10)
    both = c.mirrored()

    # From the outside inwards: scalp, skull, cortex, folded white matter, falx.
    head = c.ellipse(0, 0, between(rng, 0.76, 0.82), 0.95)
    brain = head + 0.13
    c.image += 0.80
    c.fill(head + 0.06, 0.06)
    c.fill(brain, between(rng, 0.36, 0.42))
    folds = between(rng, 15, 19) * np.arctan2(c.x, c.y) + between(rng, 0, 2 * np.pi)
    white = np.maximum(brain + 0.10 + 0.03 * np.sin(folds), 0.025 - both.x)
    c.fill(white, between(rng, 0.60, 0.66), blur=0.05)
    c.fill(np.maximum(brain, both.x - 0.008), 0.22, blur=0.03)

    # Deep grey nuclei, the two horns of the lateral ventricles, the third ventricle.
    horn = between(rng, 0.05, 0.075)
    c.fill(both.ellipse(0.24, 0.03, 0.11, 0.17, -0.3), 0.46, blur=0.06)
    c.fill(both.ellipse(0.11, -0.13, horn, 0.15, 0.35), 0.10)
    c.fill(both.ellipse(0.15, 0.14, horn, 0.16, -0.45), 0.10)
    c.fill(c.ellipse(0, 0.05, 0.025, 0.09), 0.10)

    greys = {"cyst": (0.04, None), "mass": (0.98, None), "abscess": (0.12, 0.98)}
    for f in findings:
        c.lesion(f, *greys[f.name])
    return c.image, c.cover(head), 0.02


PROBE = 1.25   # height of the ultrasound probe above the centre


def draw_ultrasound(size: int, rng: np.random.Generator, findings: tuple[Finding, ...]) -> Drawing:
    """Transverse sector of the liver: speckle, dark hepatic veins, a bright diaphragm below."""
    c = Canvas(size, rng, tilt=0.0)

    # Polar coordinates around the probe, from which the beams start.
    depth = np.sqrt(c.x ** 2 + (c.y + PROBE) ** 2)
    angle = np.arctan2(c.x, c.y + PROBE)
    sides = (np.abs(angle) - between(rng, 0.60, 0.66)) * depth
    body = c.cover(np.maximum(sides, np.abs(depth - 1.225) - 0.925))

    # The liver darkens with depth, below three layers of the abdominal wall.
    c.image += between(rng, 0.46, 0.54) - 0.16 * (depth - 1.2)
    for layer in range(3):
        c.fill(np.abs(depth - 0.36 - 0.11 * layer) - 0.018, 0.80 - 0.12 * layer)

    # Diaphragm, vena cava, and three hepatic veins that meet in it.
    middle, dome = between(rng, -0.08, 0.08), between(rng, 1.94, 2.00)
    c.fill(np.abs(depth - dome + 0.10 * np.cos(3 * angle)) - 0.025, 0.92)
    c.fill(c.ellipse(middle, 0.46, 0.085, 0.075), 0.05)
    for way in (-0.26, 0.0, 0.26):
        tip = middle + way + between(rng, -0.04, 0.04)
        vein = c.line(middle, 0.42, tip, abs(way) - 0.45, 0.11, taper=0.7)
        c.fill(vein, 0.10, blur=0.03)

    # Behind a cyst echoes are stronger, behind a calcification there are next to none.
    for f in findings:
        if f.name != "mass":
            reach = math.hypot(f.x, f.y + PROBE)
            towards = math.atan2(f.x, f.y + PROBE)
            beam = np.abs(angle - towards) * reach - 0.8 * f.radius
            behind = np.maximum(beam, reach - depth)
            c.fill(behind, c.image * {"cyst": 1.5, "calcification": 0.1}[f.name], blur=0.05)
    for f in findings:
        c.lesion(f, {"cyst": 0.02, "mass": 0.95, "calcification": 1.00}[f.name])
    return c.image, body, 0.06 * np.sqrt(np.minimum(c.image, 1))   # speckle grows with the echo


DRAWINGS = {"chest x-ray": draw_chest, "abdominal ct": draw_ct,
            "brain mri": draw_mri, "ultrasound": draw_ultrasound}


# ---------------------------------------------------------------------------------- another scanner

class Shift(NamedTuple):
    """How another scanner shows the same body."""
    contrast: float    # differences of grey values, as a share of ours
    blur: float        # standard deviation, as a share of the image's width
    noise: float       # deviations of the noise, as a multiple of ours


SHIFTS = {1: Shift(contrast=0.85, blur=0.008, noise=1.4),
          2: Shift(contrast=0.70, blur=0.013, noise=1.8),
          3: Shift(contrast=0.50, blur=0.020, noise=2.4)}


def shift_image(image: np.ndarray, noise_std: float | np.ndarray,
                shift: int) -> tuple[np.ndarray, float | np.ndarray]:
    """image (S, S) and its noise -> both as the scanner SHIFTS[shift] has them."""
    contrast, blur, noise = SHIFTS[shift]
    place = np.arange(len(image)) / len(image)                        # (S,)
    spread = np.exp(-((place[:, None] - place) / blur) ** 2 / 2)      # (S, S)
    spread /= spread.sum(axis=1, keepdims=True)                       # the edges lose nothing
    image = spread @ image @ spread.T
    return 0.5 + contrast * (image - 0.5), noise * noise_std
