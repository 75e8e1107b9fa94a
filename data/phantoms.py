"""The embedded data set: radiology-like images drawn with numpy, with texts.

Everything is a pure function of (seed, number). A scene is the content of an image: its group
and up to two findings. phantom_images.py draws it at any size; this file makes the scenes, and
their captions, questions and classes. What a text says of a finding (its name, size, side and
zone) is random, so only the image shows it.
"""
import math
import re
from collections.abc import Collection
from itertools import count, islice
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
from PIL import Image

from data import Row
from data.phantom_images import DRAWINGS, SIDES, Finding, between, shift_image
from m3ae_mini.config import require

COUNTS = {"train": 24000, "val": 1024, "test": 2048}      # images for "pretrain" and "irtr"
LABELLED = {"train": 600, "val": 400, "test": 1000}       # images for "vqa" and "cls"
RANGES = {"pretrain": 0, "irtr": 0, "vqa": 1, "cls": 2}   # tasks of one range share their images

# The findings of each group.
FINDINGS = {
    "chest x-ray": ("nodule", "cavity", "effusion", "pneumothorax"),
    "abdominal ct": ("cyst", "calcification", "abscess"),
    "brain mri": ("cyst", "mass", "abscess"),
    "ultrasound": ("cyst", "mass", "calcification"),
}
# zone: x of the midline, distance from it, y
ZONES = {
    "chest x-ray": {"upper": (0.00, 0.42, -0.33), "lower": (0.00, 0.53, 0.17)},
    "abdominal ct": {"liver": (-0.11, 0.36, -0.24), "kidney": (0.00, 0.40, 0.38)},
    "brain mri": {"frontal": (0.00, 0.30, -0.42), "occipital": (0.00, 0.32, 0.44)},
    "ultrasound": {"anterior": (0.00, 0.33, -0.28), "posterior": (0.00, 0.38, 0.31)},
}
# Zones of its side where a finding hides all else. In ultrasound a calcification casts a shadow.
HIDES = {"effusion": {"upper", "lower"}, "pneumothorax": {"upper", "lower"},
         "calcification": {"posterior"}}
RADII = {"small": (0.125, 0.14), "large": (0.245, 0.27)}   # about 3 and 6 pixels of 48 x 48
NORMAL = 0.10                                              # share of images without a finding
SINGLE = 0.55                                              # share of images with one

# Streams of random numbers, independent of one another.
SCENE, ANATOMY, NOISE, CAPTION, QUESTIONS = range(5)


# ------------------------------------------------------------------------------------------- scenes

class Scene(NamedTuple):
    """The content of image `number` of data set `seed`."""
    seed: int
    number: int
    group: str                       # a key of FINDINGS
    findings: tuple[Finding, ...]


def generator(seed: int, number: int, stream: int) -> np.random.Generator:
    """The random numbers of one image and stream.

    Call only random(): it gives the same numbers in every version of numpy.
    """
    key = np.array([seed, number], np.uint64)
    counter = np.array([0, 0, 0, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def pick(rng: np.random.Generator, choices: Collection):
    """One of the choices (of the keys, if they are a dict) at random."""
    return tuple(choices)[int(rng.random() * len(choices))]


def make_finding(rng: np.random.Generator, group: str, name: str) -> Finding:
    """A finding of random size, side, zone and shape."""
    size, side = pick(rng, RADII), pick(rng, SIDES)
    zone = pick(rng, ZONES[group])
    midline, lateral, y = ZONES[group][zone]
    x = midline + SIDES[side] * lateral + between(rng, -0.04, 0.04)
    y = y + between(rng, -0.04, 0.04)
    fills_side = HIDES.get(name, set()) >= set(ZONES[group])
    return Finding(name, size, side, None if fills_side else zone, x, y,
                   radius=between(rng, *RADII[size]), stretch=between(rng, 1.0, 1.1),
                   tilt=between(rng, 0, math.pi))


def overlap(findings: list[Finding]) -> bool:
    """Do two findings take, or hide, the same zone of the same side?"""
    taken = [(f.side, zone) for f in findings for zone in {f.zone} | HIDES.get(f.name, set())]
    return len(taken) > len(set(taken))


def make_scene(seed: int, number: int) -> Scene:
    """Two findings differ in name and in zone or side, so that no word is ambiguous. All other
    choices are independent."""
    rng = generator(seed, number, SCENE)
    group, chance = pick(rng, FINDINGS), rng.random()
    finding_count = (chance > NORMAL) + (chance > NORMAL + SINGLE)   # 0, 1 or 2
    names = sorted(FINDINGS[group], key=lambda name: rng.random())[:finding_count]
    findings = [make_finding(rng, group, name) for name in names]
    while overlap(findings):
        findings = [make_finding(rng, group, name) for name in names]
    return Scene(seed, number, group, tuple(findings))


# ------------------------------------------------------------------------------------------- images

def render(scene: Scene, size: int, noise: bool = True, shift: int = 0) -> np.ndarray:
    """(size, size) uint8, exactly 0 outside the body. Without noise it is the best possible
    reconstruction. shift: a key of SHIFTS, another scanner."""
    rng = generator(scene.seed, scene.number, ANATOMY)
    image, body, noise_std = DRAWINGS[scene.group](size, rng, scene.findings)  # (S, S), (S, S)
    if shift:
        image, noise_std = shift_image(image, noise_std, shift)
    if noise:
        # The sum of two uniform numbers has a triangular density: at most 2.45 deviations.
        rng = generator(scene.seed, scene.number, NOISE)
        first, second = rng.random((2, size, size), np.float32)
        image = image + noise_std * math.sqrt(6) * (first + second - 1)
    return np.rint(255 * np.clip(image * body, 0, 1)).astype(np.uint8)


def draw(seed: int, number: int, size: int, noise: bool = True, shift: int = 0) -> np.ndarray:
    """(size, size) uint8: image `number` of data set `seed`."""
    return render(make_scene(seed, number), size, noise, shift)


def draw_clean(lines: list[dict], size: int) -> np.ndarray:
    """The images of a pack's lines without their noise, uint8 (B, size, size)."""
    images = []
    for line in lines:
        seed, number, *shift = map(int, re.findall(r"\d+", line["source"]))
        images.append(draw(seed, number, size, False, *shift))
    return np.stack(images)


class Phantom(NamedTuple):
    """An image yet to be drawn, at any size. Packs write it down as the sample's source."""
    seed: int
    number: int

    def __call__(self, size: int) -> Image.Image:
        return Image.fromarray(draw(self.seed, self.number, size))   # mode L


class ShiftedPhantom(NamedTuple):
    """A phantom as another scanner shows it. shift: a key of SHIFTS."""
    seed: int
    number: int
    shift: int

    def __call__(self, size: int) -> Image.Image:
        return Image.fromarray(draw(self.seed, self.number, size, shift=self.shift))   # mode L


# ----------------------------------------------------------------------------------------- captions

VIEWS = {
    "chest x-ray": ("chest radiograph", "radiograph of the chest"),
    "abdominal ct": ("abdominal CT", "axial CT of the abdomen"),
    "brain mri": ("brain MRI", "axial MRI of the brain"),
    "ultrasound": ("liver ultrasound", "ultrasound of the liver"),
}
# zone: as a noun, and before a finding's name
PLACES = {
    "upper": ("upper lobe", "upper lobe "), "lower": ("lower lobe", "lower lobe "),
    None: ("hemithorax", ""),
    "liver": ("liver", "hepatic "), "kidney": ("kidney", "renal "),
    "frontal": ("frontal lobe", "frontal "), "occipital": ("occipital lobe", "occipital "),
    "anterior": ("anterior liver", "anterior hepatic "),
    "posterior": ("posterior liver", "posterior hepatic "),
}
# Sometimes used instead of a finding's name.
SYNONYMS = {
    ("chest x-ray", "nodule"): "round opacity", ("chest x-ray", "cavity"): "cavitary lesion",
    ("abdominal ct", "cyst"): "hypodense lesion",
    ("abdominal ct", "calcification"): "hyperdense lesion",
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
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def caption(scene: Scene) -> str:
    """A random caption. Half of the captions don't name the group."""
    rng = generator(scene.seed, scene.number, CAPTION)
    clauses = []
    for f in sorted(scene.findings, key=lambda f: rng.random()):
        if rng.random() < 0.25:
            f = f._replace(name=SYNONYMS.get((scene.group, f.name), f.name))
        place, before = PLACES[f.zone]
        clauses.append(pick(rng, CLAUSES).format(place=place, before=before, **f._asdict()))

    text = " and ".join(clauses) or "no focal abnormality"
    view = pick(rng, VIEWS[scene.group][:3 - len(clauses)])   # two findings: the short one
    return ". ".join(map(sentence, pick(rng, FRAMES).format(text=text, view=view).split(". ")))


# ---------------------------------------------------------------------------------------- questions

# modality, region, what a zone is
ABOUT = {
    "chest x-ray": ("x-ray", "chest", "lobe"), "abdominal ct": ("ct", "abdomen", "organ"),
    "brain mri": ("mri", "brain", "lobe"),
    "ultrasound": ("ultrasound", "liver", "part of the liver"),
}

# The words below are data: packs, and what was measured on them, depend on each.
MODALITY = ("What modality is this?", "Which imaging modality was used?")
REGION = ("What organ or region is shown?", "Which part of the body is this?")
PRESENCE = ("Is there {}?", "Does the picture show {}?")
NUMBER = ("How many findings are there?", "How many abnormalities are seen?")
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
YES_NO = {True: "yes", False: "no"}


def questions(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """Two to four (question, answer, closed) of a scene; the question reveals little."""
    rng = generator(scene.seed, scene.number, QUESTIONS)
    group, findings = scene.group, scene.findings
    modality, region, unit = ABOUT[group]

    # Modality or region.
    if rng.random() < 0.5:
        yield pick(rng, MODALITY), modality, False
    else:
        yield pick(rng, REGION), region, False

    # Presence: "yes" half of the time over all images, those without a finding among them.
    seen = [f.name for f in findings]
    unseen = [name for name in FINDINGS[group] if name not in seen]
    present = bool(seen) and rng.random() < 0.5 / (1 - NORMAL)
    name = pick(rng, seen if present else unseen)
    a_name = f"an {name}" if name[0] in "aeiou" else f"a {name}"
    yield pick(rng, PRESENCE).format(a_name), YES_NO[present], True

    # Number: the more frequent ones are asked about less, so that 0, 1 and 2 come equally often.
    share = (NORMAL, SINGLE, 1 - NORMAL - SINGLE)[len(findings)]
    if rng.random() < NORMAL / share:
        yield pick(rng, NUMBER), str(len(findings)), False

    # One attribute of one finding. A closed question guesses it.
    if findings:
        f = pick(rng, findings)
        topic = pick(rng, ("name", "side", "size", "zone")[:4 if f.zone else 3])
        closed = topic != "name" and rng.random() < 0.5
        choices = {"side": SIDES, "size": RADII, "zone": ZONES[group]}
        guess = f._replace(**{topic: pick(rng, choices[topic])}) if closed else f
        text = pick(rng, (CLOSED if closed else OPEN)[topic])
        text = text.format(unit=unit, place=PLACES[guess.zone][0], **guess._asdict())
        yield text, YES_NO[guess == f] if closed else getattr(f, topic), closed


# --------------------------------------------------------------------------------------------- rows

def rows(root: Path | None, task: str, counts: dict[str, int] | None = None,
         seed: int = 0, shift: int = 0) -> Iterator[Row]:
    """The rows of one task; `root` is unused. shift: another scanner, for the test split alone.

    counts: images per split; None: COUNTS, or LABELLED for "vqa" and "cls". Each split of a
    range in RANGES has its own million image numbers. So splits never share an image, "vqa" and
    "cls" share none with pre-training, and the size of one split does not change another.
    """
    require(task in RANGES,
            f"the phantoms have no task {task}: choose --task {', '.join(RANGES)}")
    if counts is None:
        counts = LABELLED if task in ("vqa", "cls") else COUNTS

    for i, split in enumerate(("train", "val", "test")):
        first = (3 * RANGES[task] + i) * 10 ** 6
        scenes = (make_scene(seed, number) for number in count(first))
        if task == "cls":   # one class per image
            scenes = (scene for scene in scenes if len(scene.findings) < 2)

        for scene in islice(scenes, counts.get(split, 0)):
            image: Phantom | ShiftedPhantom = Phantom(scene.seed, scene.number)
            if shift and split == "test":
                image = ShiftedPhantom(scene.seed, scene.number, shift)
            row = Row(split, image, caption(scene), group=scene.group)
            if task == "vqa":
                for question, answer, closed in questions(scene):
                    yield row._replace(text=question, answer=answer, closed=closed)
            elif task == "cls":
                label = scene.findings[0].name if scene.findings else "normal"
                yield row._replace(text=sentence(VIEWS[scene.group][1]) + ".", label=label)
            else:
                yield row
