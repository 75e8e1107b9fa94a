"""The embedded data set: radiology-like images drawn with numpy, with captions, questions and classes.

Everything is a pure function of (seed, number). A scene says what is to be seen: the kind of image and
up to two findings. From it the image is drawn at any size, and the words are made. What they say of a
finding (what, how large, on which side, in which zone) is drawn by lot: only looking at the image tells.

Coordinates are the body's: x to the image's right, y down, the image spanning -1 ... 1. As on a light
box, the patient's right is on the image's left. Grey values run from 0 (black) to 1 (white).
"""
import copy
import math
from itertools import count, islice
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
from PIL import Image

from data import Row
from m3ae_mini.config import UserError

COUNTS = {"train": 24000, "val": 1024, "test": 2048}       # images for "pretrain" and "irtr"
LABELLED = {"train": 600, "val": 400, "test": 1000}        # images for "vqa" and "cls"
RANGES = {"pretrain": 0, "irtr": 0, "vqa": 1, "cls": 2}    # tasks of one range have their images in common

FINDINGS = {                                               # what can be found in which kind of image
    "chest x-ray": ("nodule", "cavity", "effusion", "pneumothorax"),
    "abdominal ct": ("cyst", "calcification", "abscess"),
    "brain mri": ("cyst", "mass", "abscess"),
    "ultrasound": ("cyst", "mass", "calcification"),
}
ZONES = {                                                  # zone: x of the midline, distance from it, y
    "chest x-ray": {"upper": (0.00, 0.42, -0.33), "lower": (0.00, 0.53, 0.17)},
    "abdominal ct": {"liver": (-0.11, 0.36, -0.24), "kidney": (0.00, 0.40, 0.38)},
    "brain mri": {"frontal": (0.00, 0.30, -0.42), "occipital": (0.00, 0.32, 0.44)},
    "ultrasound": {"anterior": (0.00, 0.33, -0.28), "posterior": (0.00, 0.38, 0.31)},
}
HIDES = {                                                  # zones of its side where nothing else is seen
    "effusion": {"upper", "lower"}, "pneumothorax": {"upper", "lower"},
    "calcification": {"posterior"},                        # in the shadow of an ultrasound
}
SIDES = {"right": -1, "left": 1}                           # the patient's: the sign of x
RADII = {"small": (0.125, 0.14), "large": (0.245, 0.27)}   # at 48 pixels about 3 and 6 of them
NORMAL, SINGLE = 0.10, 0.55                                # shares of images with no finding and with one
SCENE, ANATOMY, NOISE, CAPTION, QUESTIONS = range(5)       # an image's streams of random numbers


# ---------------------------------------------------------------------------------------------- the scene

class Finding(NamedTuple):
    """One abnormality. The words tell name, size, side and zone; the rest varies unsaid."""
    name: str
    size: str
    side: str
    zone: str | None      # None where it fills its side
    x: float
    y: float
    radius: float
    stretch: float        # √(long / short axis)
    tilt: float           # radians


class Scene(NamedTuple):
    """All that is to be seen in image `number`, and the key to its anatomy and noise."""
    seed: int
    number: int
    kind: str
    findings: tuple[Finding, ...]


def generator(seed: int, number: int, stream: int) -> np.random.Generator:
    """Of its methods only random() is used: no version of numpy gives other numbers."""
    key, counter = np.array([seed, number], np.uint64), np.array([0, 0, 0, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def between(rng, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def pick(rng, choices):
    return tuple(choices)[int(rng.random() * len(choices))]


def make_finding(rng, kind: str, name: str) -> Finding:
    size, side, zone = pick(rng, RADII), pick(rng, SIDES), pick(rng, ZONES[kind])
    midline, lateral, y = ZONES[kind][zone]
    x = midline + SIDES[side] * lateral + between(rng, -0.04, 0.04)
    y = y + between(rng, -0.04, 0.04)
    zone = None if HIDES.get(name, set()) >= set(ZONES[kind]) else zone
    radius, stretch, tilt = between(rng, *RADII[size]), between(rng, 1.0, 1.1), between(rng, 0, math.pi)
    return Finding(name, size, side, zone, x, y, radius, stretch, tilt)


def clash(findings) -> bool:
    """Do two findings share a place?"""
    taken = [(f.side, zone) for f in findings for zone in {f.zone} | HIDES.get(f.name, set())]
    return len(taken) > len(set(taken))


def make_scene(seed: int, number: int) -> Scene:
    """Two findings differ in name and in place, so that no word is ambiguous; other lots are independent."""
    rng = generator(seed, number, SCENE)
    kind, lot = pick(rng, FINDINGS), rng.random()
    names = sorted(FINDINGS[kind], key=lambda name: rng.random())[:(lot > NORMAL) + (lot > NORMAL + SINGLE)]
    findings = [make_finding(rng, kind, name) for name in names]
    while clash(findings):
        findings = [make_finding(rng, kind, name) for name in names]
    return Scene(seed, number, kind, tuple(findings))


# ---------------------------------------------------------------------------------------------- the brush

class Canvas:
    """An image (S, S) of a patient in a slightly varied pose, tilted by at most `tilt` radians.

    A shape is given by every pixel's distance (S, S) to its edge, negative inside. So the minimum of two
    shapes is their union, and the maximum what they share.
    """

    def __init__(self, size: int, rng, tilt: float):
        tilt, zoom = between(rng, -tilt, tilt), between(rng, 0.95, 1.03)
        centres = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
        across = (centres[None, :] - between(rng, -0.03, 0.03)) / zoom
        down = (centres[:, None] - between(rng, -0.03, 0.03)) / zoom
        self.x = math.cos(tilt) * across + math.sin(tilt) * down
        self.y = math.cos(tilt) * down - math.sin(tilt) * across
        self.pixel = 2 / size
        self.image = np.zeros((size, size), np.float32)

    def mirrored(self) -> "Canvas":
        """The same image, its right half laid on its left: what is painted there comes on both sides."""
        both = copy.copy(self)
        both.x = np.abs(self.x)
        return both

    def ellipse(self, x, y, rx: float, ry: float, tilt: float = 0.0) -> np.ndarray:
        u, v = self.x - x, self.y - y
        if tilt:
            u, v = math.cos(tilt) * u + math.sin(tilt) * v, math.cos(tilt) * v - math.sin(tilt) * u
        return (np.sqrt((u / rx) ** 2 + (v / ry) ** 2) - 1) * min(rx, ry)

    def line(self, x0, y0, x1, y1, width: float, taper: float = 0.0) -> np.ndarray:
        """A stroke with round ends; its width falls to width · (1 - taper)."""
        dx, dy, u, v = x1 - x0, y1 - y0, self.x - x0, self.y - y0
        along = np.clip((u * dx + v * dy) / (dx * dx + dy * dy), 0, 1)
        return np.sqrt((u - along * dx) ** 2 + (v - along * dy) ** 2) - width / 2 * (1 - taper * along)

    def cover(self, shape: np.ndarray, blur: float = 0.0) -> np.ndarray:
        """(S, S): the share of each pixel inside. The edge is one pixel wide, or `blur` if that is more."""
        return np.clip(0.5 - shape / max(self.pixel, blur), 0, 1)

    def fill(self, shape: np.ndarray, grey, blur: float = 0.0) -> None:
        """Paint a shape in a grey value, or in an image of them."""
        self.image += self.cover(shape, blur) * (grey - self.image)

    def lesion(self, f: Finding, grey: float, rim: float | None = None) -> None:
        """A disk, or a ring of grey value `rim` around one."""
        edge = self.ellipse(f.x, f.y, f.radius * f.stretch, f.radius / f.stretch, f.tilt)
        if rim is not None:
            self.fill(edge, rim)
            edge = edge + 0.4 * f.radius
        self.fill(edge, grey)


# ---------------------------------------------------------------------------------------------- four kinds
# Each draws an anatomy by lot (the same one for any findings) and the findings in it. It returns the image
# and the body's mask, both (S, S), and the standard deviation of the noise.

def draw_chest(size: int, rng, findings):
    """Frontal radiograph: dark lungs crossed by ribs, a bright heart and spine, two domes of diaphragm."""
    c = Canvas(size, rng, tilt=0.04)
    both = c.mirrored()
    out = both.x                                                              # distance from the midline
    shoulders = between(rng, -0.94, -0.88) + 0.34 * out ** 2 - c.y
    body = c.cover(np.minimum(np.maximum(out - between(rng, 0.90, 0.96), shoulders), out - 0.24))
    c.image += between(rng, 0.56, 0.64) - 0.12 * out ** 4

    width, height, top = between(rng, 0.35, 0.38), between(rng, 0.84, 0.90), between(rng, 0.10, 0.16)
    air, pitch, phase = between(rng, 0.24, 0.30), between(rng, 4.2, 4.8), rng.random()
    ribs = 0.07 * np.cos(2 * np.pi * (pitch * (c.y - 0.45 * (out - 0.25) ** 2 + 0.12 * out) + phase))
    vessels = 0.16 * np.exp(-12 * ((out - 0.18) ** 2 + c.y ** 2))
    domes = {"right": between(rng, 0.40, 0.44), "left": between(rng, 0.46, 0.50)}

    for side, sign in SIDES.items():
        dome = c.y - domes[side] - 0.9 * (c.x - sign * 0.42) ** 2
        lung = np.maximum(c.ellipse(sign * 0.42, top, width, height), dome)
        c.fill(np.maximum(-dome, out - 0.86), 0.74)                           # abdomen
        c.fill(lung, air + ribs + vessels)

        for f in findings:
            if f.side == side and f.name == "pneumothorax":
                rest = 0.94 - 1.9 * f.radius                                  # of the lung's width and height
                hilum = sign * (0.42 - 0.9 * width * (1 - rest))
                collapsed = c.ellipse(hilum, top + 0.05, width * rest, height * rest)
                c.fill(lung, 0.03)
                c.fill(np.maximum(lung, collapsed - 0.03), 0.75)              # pleural line
                c.fill(np.maximum(lung, collapsed), air + 0.14 + ribs)
            if f.side == side and f.name == "effusion":
                climb = 0.35 * np.maximum(out - 0.35, 0)                      # along the chest wall
                fluid = 0.67 - 2.8 * f.radius - climb - c.y
                c.fill(np.maximum(lung, fluid), 0.84)

    c.fill(out - 0.10, 0.72 + 0.05 * np.cos(2 * np.pi * (5 * c.y + phase)), blur=0.06)  # spine
    heart = c.ellipse(between(rng, 0.10, 0.14), 0.27, between(rng, 0.26, 0.30), 0.22, 0.5)
    c.fill(np.minimum(heart, c.ellipse(-0.06, 0.20, 0.14, 0.22)), 0.78, blur=0.06)
    c.fill(c.ellipse(0.10, -0.24, 0.12, 0.13), 0.74, blur=0.05)               # aortic knob
    c.fill(c.line(0, -1.1, 0, -0.22, 0.09), 0.40, blur=0.05)                  # trachea
    c.fill(c.ellipse(0.45, 0.72, between(rng, 0.12, 0.17), 0.09), 0.38)       # gastric bubble
    rise = between(rng, 0.06, 0.14)
    c.fill(both.line(0.10, -0.58, 0.74, -0.58 - rise, 0.06), 0.74)            # clavicles

    for f in findings:
        if f.name == "nodule":
            c.lesion(f, 0.95)
        elif f.name == "cavity":
            c.lesion(f, 0.04, rim=0.92)
    return c.image, body, 0.02


def draw_ct(size: int, rng, findings):
    """Axial slice with contrast medium: liver, stomach, spleen and kidneys around the spine, in fat."""
    c = Canvas(size, rng, tilt=0.07)
    both = c.mirrored()
    skin = c.ellipse(0, 0, between(rng, 0.93, 0.97), between(rng, 0.78, 0.83))
    wall = skin + between(rng, 0.05, 0.09)
    cavity = wall + 0.08
    c.image += 0.26                                                           # fat
    c.fill(wall, 0.50)                                                        # muscle
    c.fill(cavity, 0.36)                                                      # mesentery

    tissue = between(rng, 0.52, 0.58)
    stomach = np.maximum(cavity, c.ellipse(0.52, -0.18, 0.24, 0.26, between(rng, 0.2, 0.6)))
    air = np.maximum(stomach + 0.03, c.y + between(rng, 0.20, 0.26))
    spleen = c.ellipse(0.70, 0.16, 0.13, between(rng, 0.24, 0.30), -0.25)
    right = c.ellipse(-0.47, -0.10, between(rng, 0.38, 0.42), between(rng, 0.42, 0.46), 0.2)
    left = c.ellipse(0.08, -0.32, between(rng, 0.42, 0.48), between(rng, 0.22, 0.25), -0.12)
    c.fill(stomach, 0.44)
    c.fill(air, 0.02)
    c.fill(np.maximum(cavity, spleen), tissue + 0.10)
    c.fill(np.maximum(cavity, np.minimum(right, left)), tissue)               # liver
    c.fill(c.line(-0.30, 0.02, -0.08, -0.10, 0.07), tissue + 0.16)            # portal vein

    width = between(rng, 0.20, 0.23)
    c.fill(both.line(0.18, 0.40, 0.20, 0.52, 0.20), 0.48)                     # psoas
    c.fill(both.ellipse(0.40, 0.38, width, 0.18, -0.5), 0.68)                 # kidneys
    c.fill(both.ellipse(0.30, 0.38, 0.09, 0.07), 0.46)                        # renal sinus
    c.fill(both.line(0.82, 0.0, 0.76, 0.24, 0.05), 0.90)                      # ribs
    c.fill(c.ellipse(0, 0.38, 0.15, 0.13), 0.88)                              # vertebra
    c.fill(c.line(0, 0.50, 0, 0.66, 0.07), 0.88)
    c.fill(c.ellipse(0, 0.52, 0.06, 0.05), 0.40)                              # spinal canal
    c.fill(c.ellipse(0.08, 0.15, 0.085, 0.085), 0.86)                         # aorta
    c.fill(c.ellipse(-0.13, 0.14, 0.09, 0.07), 0.66)                          # vena cava

    for f in findings:
        grey, rim = {"cyst": (0.10, None), "calcification": (1.00, None), "abscess": (0.14, 0.96)}[f.name]
        c.lesion(f, grey, rim)
    return c.image, c.cover(skin), 0.03


def draw_mri(size: int, rng, findings):
    """Axial T1-weighted slice with contrast medium: scalp, skull, folded cortex around dark ventricles."""
    c = Canvas(size, rng, tilt=0.10)
    both = c.mirrored()
    head = c.ellipse(0, 0, between(rng, 0.76, 0.82), 0.95)
    brain = head + 0.13
    c.image += 0.80                                                           # scalp
    c.fill(head + 0.06, 0.06)                                                 # skull
    c.fill(brain, between(rng, 0.36, 0.42))                                   # cortex
    folds = 0.03 * np.sin(between(rng, 15, 19) * np.arctan2(c.x, c.y) + between(rng, 0, 2 * np.pi))
    white = np.maximum(brain + 0.10 + folds, 0.025 - both.x)
    c.fill(white, between(rng, 0.60, 0.66), blur=0.05)
    c.fill(np.maximum(brain, both.x - 0.008), 0.22, blur=0.03)                # falx

    horn = between(rng, 0.05, 0.075)
    c.fill(both.ellipse(0.24, 0.03, 0.11, 0.17, -0.3), 0.46, blur=0.06)       # deep grey nuclei
    c.fill(both.ellipse(0.11, -0.13, horn, 0.15, 0.35), 0.10)                 # lateral ventricles
    c.fill(both.ellipse(0.15, 0.14, horn, 0.16, -0.45), 0.10)
    c.fill(c.ellipse(0, 0.05, 0.025, 0.09), 0.10)                             # third ventricle

    for f in findings:
        grey, rim = {"cyst": (0.04, None), "mass": (0.98, None), "abscess": (0.12, 0.98)}[f.name]
        c.lesion(f, grey, rim)
    return c.image, c.cover(head), 0.02


PROBE = 1.25                                               # the beams start that far above the middle


def draw_ultrasound(size: int, rng, findings):
    """Transverse sector of the liver: speckle, dark hepatic veins, a bright diaphragm far from the probe."""
    c = Canvas(size, rng, tilt=0.0)
    depth, angle = np.sqrt(c.x ** 2 + (c.y + PROBE) ** 2), np.arctan2(c.x, c.y + PROBE)
    sides = (np.abs(angle) - between(rng, 0.60, 0.66)) * depth
    body = c.cover(np.maximum(sides, np.abs(depth - 1.225) - 0.925))
    c.image += between(rng, 0.46, 0.54) - 0.16 * (depth - 1.2)
    for layer in range(3):
        c.fill(np.abs(depth - 0.36 - 0.11 * layer) - 0.018, 0.80 - 0.12 * layer)  # abdominal wall

    middle, dome = between(rng, -0.08, 0.08), between(rng, 1.94, 2.00)
    c.fill(np.abs(depth - dome + 0.10 * np.cos(3 * angle)) - 0.025, 0.92)     # diaphragm
    c.fill(c.ellipse(middle, 0.46, 0.085, 0.075), 0.05)                       # vena cava
    for way in (-0.26, 0.0, 0.26):
        tip = middle + way + between(rng, -0.04, 0.04)
        c.fill(c.line(middle, 0.42, tip, abs(way) - 0.45, 0.11, taper=0.7), 0.10, blur=0.03)  # hepatic vein

    # Behind a cyst echoes are stronger, behind a calcification there are next to none.
    for f in findings:
        reach, towards = math.hypot(f.x, f.y + PROBE), math.atan2(f.x, f.y + PROBE)
        behind = np.maximum(np.abs(angle - towards) * reach - 0.8 * f.radius, reach - depth)
        if f.name != "mass":
            c.fill(behind, c.image * {"cyst": 1.5, "calcification": 0.1}[f.name], blur=0.05)
    for f in findings:
        c.lesion(f, {"cyst": 0.02, "mass": 0.95, "calcification": 1.00}[f.name])
    return c.image, body, 0.06 * np.sqrt(np.minimum(c.image, 1))              # speckle grows with the echo


DRAW = {"chest x-ray": draw_chest, "abdominal ct": draw_ct,
        "brain mri": draw_mri, "ultrasound": draw_ultrasound}


def render(scene: Scene, size: int, noise: bool = True) -> np.ndarray:
    """(size, size) uint8, exactly 0 outside the body. Without noise: the best that could be reconstructed."""
    key = scene.seed, scene.number
    image, body, sd = DRAW[scene.kind](size, generator(*key, ANATOMY), scene.findings)
    if noise:
        first, second = generator(*key, NOISE).random((2, size, size), np.float32)
        image = image + sd * math.sqrt(6) * (first + second - 1)       # a triangle's shape: at most 2.45 sd
    return np.rint(255 * np.clip(image * body, 0, 1)).astype(np.uint8)


def draw(seed: int, number: int, size: int, noise: bool = True) -> np.ndarray:
    """(size, size) uint8: image `number` of data set `seed`."""
    return render(make_scene(seed, number), size, noise)


# ---------------------------------------------------------------------------------------------- words

VIEWS = {
    "chest x-ray": ("chest radiograph", "radiograph of the chest"),
    "abdominal ct": ("abdominal CT", "axial CT of the abdomen"),
    "brain mri": ("brain MRI", "axial MRI of the brain"),
    "ultrasound": ("liver ultrasound", "ultrasound of the liver"),
}
PLACES = {                                                 # zone: as a place, and before a finding's name
    "upper": ("upper lobe", "upper lobe "), "lower": ("lower lobe", "lower lobe "), None: ("hemithorax", ""),
    "liver": ("liver", "hepatic "), "kidney": ("kidney", "renal "),
    "frontal": ("frontal lobe", "frontal "), "occipital": ("occipital lobe", "occipital "),
    "anterior": ("anterior liver", "anterior hepatic "),
    "posterior": ("posterior liver", "posterior hepatic "),
}
SYNONYMS = {                                               # now and then in place of a finding's name
    ("chest x-ray", "nodule"): "round opacity", ("chest x-ray", "cavity"): "cavitary lesion",
    ("abdominal ct", "cyst"): "hypodense lesion", ("abdominal ct", "calcification"): "hyperdense lesion",
    ("brain mri", "cyst"): "hypointense lesion", ("brain mri", "mass"): "enhancing lesion",
    ("ultrasound", "cyst"): "anechoic lesion", ("ultrasound", "mass"): "echogenic lesion",
}
CLAUSES = (
    "{size} {name} in the {side} {place}",
    "{size} {side} {before}{name}",
    "{side} {place} with {size} {name}",
)
FRAMES = ("{text}.",) * 3 + ("{view}. {text}.", "{view}: {text}.", "{text} on {view}.")


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def caption(scene: Scene) -> str:
    """One of many phrasings. Half of them leave out what kind of image it is."""
    rng = generator(scene.seed, scene.number, CAPTION)
    clauses = []
    for f in sorted(scene.findings, key=lambda f: rng.random()):
        if rng.random() < 0.25:
            f = f._replace(name=SYNONYMS.get((scene.kind, f.name), f.name))
        place, before = PLACES[f.zone]
        clauses.append(pick(rng, CLAUSES).format(place=place, before=before, **f._asdict()))

    text = " and ".join(clauses) or "no focal abnormality"
    view = pick(rng, VIEWS[scene.kind][:3 - len(clauses)])             # the short one beside two findings
    return ". ".join(map(sentence, pick(rng, FRAMES).format(text=text, view=view).split(". ")))


# ---------------------------------------------------------------------------------------------- questions

ABOUT = {                                                  # modality, region, what a zone is
    "chest x-ray": ("x-ray", "chest", "lobe"), "abdominal ct": ("ct", "abdomen", "organ"),
    "brain mri": ("mri", "brain", "lobe"), "ultrasound": ("ultrasound", "liver", "part of the liver"),
}
OPEN = {
    "name": ("What is seen in the {side} {place}?", "What does the {side} {place} show?"),
    "side": ("Which side is the {name} on?", "On which side is the {name}?"),
    "size": ("How large is the {name}?", "What size is the {name}?"),
    "zone": ("Which {unit} holds the {name}?", "In which {unit} is the {name}?"),
}
CLOSED = {
    "side": ("Is the {name} on the {side}?", "Is the {name} on the {side} side?"),
    "size": ("Is the {name} {size}?", "Is this a {size} {name}?"),
    "zone": ("Is the {name} in the {place}?", "Does the {place} hold the {name}?"),
}


def questions(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """Two to four (question, answer, closed); a question alone tells little of its answer."""
    rng = generator(scene.seed, scene.number, QUESTIONS)
    kind, findings = scene.kind, scene.findings
    modality, region, unit = ABOUT[kind]
    yes_no = {True: "yes", False: "no"}

    if rng.random() < 0.5:
        yield pick(rng, ("What modality is this?", "Which imaging modality was used?")), modality, False
    else:
        yield pick(rng, ("What organ or region is shown?", "Which part of the body is this?")), region, False

    # Presence: "yes" half of the time over all images, the normal ones among them.
    there = [f.name for f in findings]
    present = bool(there) and rng.random() < 0.5 / (1 - NORMAL)
    name = pick(rng, there if present else [name for name in FINDINGS[kind] if name not in there])
    a_name = f"an {name}" if name[0] in "aeiou" else f"a {name}"
    yield pick(rng, ("Is there {}?", "Does the picture show {}?")).format(a_name), yes_no[present], True

    # Count: 0, 1 and 2 come equally often, since the commoner are asked about less.
    if rng.random() < NORMAL / (NORMAL, SINGLE, 1 - NORMAL - SINGLE)[len(findings)]:
        text = pick(rng, ("How many findings are there?", "How many abnormalities are seen?"))
        yield text, str(len(findings)), False

    # One attribute of one finding; closed questions guess it.
    if findings:
        f = pick(rng, findings)
        topic = pick(rng, ("name", "side", "size", "zone")[:4 if f.zone else 3])
        closed = topic != "name" and rng.random() < 0.5
        choices = {"side": SIDES, "size": RADII, "zone": ZONES[kind]}
        guess = f._replace(**{topic: pick(rng, choices[topic])}) if closed else f
        text = pick(rng, (CLOSED if closed else OPEN)[topic])
        text = text.format(unit=unit, place=PLACES[guess.zone][0], **guess._asdict())
        yield text, yes_no[guess == f] if closed else getattr(f, topic), closed


# ---------------------------------------------------------------------------------------------- rows

class Phantom(NamedTuple):
    """An image yet to be drawn, at whatever size."""
    seed: int
    number: int

    def __call__(self, size: int) -> Image.Image:
        return Image.fromarray(draw(self.seed, self.number, size))     # mode "L"


def rows(root: Path | None, task: str, counts: dict[str, int] | None = None, seed: int = 0) -> Iterator[Row]:
    """The rows of `task`, of counts[split] images a split (COUNTS or LABELLED if None); `root` is not read.

    A split has a million numbers of its own. So no image is in two splits, labelled ones are never those of
    pre-training, and a split stays the same whatever the size of the others.
    """
    if task not in RANGES:
        raise UserError(f"the phantoms have no task {task!r}: choose one of {', '.join(RANGES)}.")
    if counts is None:
        counts = LABELLED if task in ("vqa", "cls") else COUNTS

    for place, split in enumerate(("train", "val", "test")):
        scenes = (make_scene(seed, number) for number in count((3 * RANGES[task] + place) * 10 ** 6))
        if task == "cls":
            scenes = (scene for scene in scenes if len(scene.findings) < 2)        # one class an image
        for scene in islice(scenes, counts.get(split, 0)):
            row = Row(split, Phantom(scene.seed, scene.number), caption(scene), group=scene.kind)
            if task == "vqa":
                for question, answer, closed in questions(scene):
                    yield row._replace(text=question, answer=answer, closed=closed)
            elif task == "cls":
                label = scene.findings[0].name if scene.findings else "normal"
                yield row._replace(text=sentence(VIEWS[scene.kind][1]) + ".", label=label)
            else:
                yield row
