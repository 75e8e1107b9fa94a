"""The embedded data set: the same for everybody, and its words agree with its images."""
import pickle
import re
from collections import Counter

import numpy as np
import pytest

from data import phantoms, prepare
from data.pack import Pack
from data.phantom_images import SHIFTS, shift_image
from data.phantoms import FINDINGS, RADII, SIDES, ZONES, draw, make_scene, render, rows
from m3ae_mini.config import UserError

SIZE = 48
SCENES = [make_scene(0, number) for number in range(400)]
FOUND = [(scene, f) for scene in SCENES for f in scene.findings]


def clean(scene) -> np.ndarray:
    """(SIZE, SIZE) in 0 ... 1, without noise."""
    return render(scene, SIZE, noise=False) / 255


def change(scene, finding) -> np.ndarray:
    """(SIZE, SIZE): how much the image owes to one finding."""
    others = tuple(f for f in scene.findings if f != finding)
    return np.abs(clean(scene) - clean(scene._replace(findings=others)))


def test_an_image_is_a_function_of_seed_and_number():
    once = [draw(3, number, SIZE) for number in range(20)]
    again = [draw(3, number, SIZE) for number in reversed(range(20))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(once, again))
    assert len({image.tobytes() for image in once}) == 20
    assert not np.array_equal(draw(3, 0, SIZE), draw(4, 0, SIZE))


def test_no_size_changes_what_is_drawn():
    for scene in SCENES[:40]:
        fine = render(scene, 3 * SIZE, noise=False).reshape(SIZE, 3, SIZE, 3).mean((1, 3)) / 255
        assert np.abs(fine - clean(scene)).mean() < 0.015


def test_the_background_is_black_and_the_noise_is_small():
    for scene in SCENES[:80]:
        noisy, clear = render(scene, SIZE) / 255, clean(scene)
        rng = phantoms.generator(scene.seed, scene.number, phantoms.ANATOMY)
        _, body, _ = phantoms.DRAWINGS[scene.group](SIZE, rng, scene.findings)
        assert (body == 0).mean() > 0.04
        assert not noisy[body == 0].any() and not clear[body == 0].any()

        unclipped = (body == 1) & (clear > 0.15) & (clear < 0.85)
        noise = (noisy - clear)[unclipped]
        assert 0.01 < noise.std() <= 0.06 and abs(noise.mean()) < 0.01
        assert np.abs(noise).max() < 0.06 * 6 ** 0.5 + 0.01


def test_another_scanner_shows_the_same_body_worse():
    """By Rose's criterion a person sees what stands out of the noise by 5 deviations of a mean."""
    weakest = {0: [], 1: [], 2: [], 3: []}
    for scene, f in FOUND[:200]:
        rng = phantoms.generator(scene.seed, scene.number, phantoms.ANATOMY)
        _, body, _ = phantoms.DRAWINGS[scene.group](SIZE, rng, scene.findings)
        without = scene._replace(findings=tuple(g for g in scene.findings if g != f))
        for shift, seen in weakest.items():
            noisy, clear, empty = (image / 255 for image in (
                render(scene, SIZE, shift=shift), render(scene, SIZE, False, shift),
                render(without, SIZE, False, shift)))
            assert not noisy[body == 0].any()
            gap = np.abs(clear - empty)
            inside = gap > gap.max() / 2
            noise = (noisy - clear)[inside]
            seen.append(gap[inside].mean() * inside.sum() ** 0.5 / max(noise.std(), 1 / 255))
    least = {shift: min(seen) for shift, seen in weakest.items()}
    assert least[0] > least[1] > least[2] > least[3] and least[2] > 5, least


@pytest.mark.parametrize("shift", SHIFTS)
def test_what_a_shift_does(shift):
    """A plain image only moves towards 0.5; an edge keeps its place and is as wide as stated."""
    contrast, blur, noise = SHIFTS[shift]
    plain, std = shift_image(np.full((90, 90), 0.9), 0.02, shift)
    assert np.allclose(plain, 0.5 + contrast * 0.4) and std == noise * 0.02
    edge, _ = shift_image(np.tile(np.arange(900) >= 450, (900, 1)) * 1.0, 0.0, shift)
    edge = (edge[450] - 0.5) / contrast + 0.5                          # (900,) from 0 to 1
    assert np.isclose(edge.sum(), 450) and edge[0] < 1e-6 < 1 - 1e-6 < edge[-1]
    inside = (edge > 0.1587) & (edge < 0.8413)                         # one deviation each way
    assert abs(inside.sum() / 900 - 2 * blur) < 0.002


@pytest.mark.parametrize("task", ["pretrain", "vqa", "cls"])
def test_only_test_images_are_shifted(task):
    counts = {"train": 3, "val": 3, "test": 3}
    plain, shifted = (list(rows(None, task, counts, shift=shift)) for shift in (0, 2))
    assert [row._replace(image=None) for row in plain] == [row._replace(image=None) for row in shifted]
    for one, other in zip(plain, shifted):
        assert (one.image == other.image) == (one.split != "test")
        if one.split == "test":
            assert other.image[:2] == one.image and pickle.loads(pickle.dumps(other.image)) == other.image
            assert np.array_equal(np.asarray(other.image(24)), draw(*one.image, 24, shift=2))
            assert not np.array_equal(np.asarray(other.image(24)), draw(*one.image, 24))


def test_a_pack_of_shifted_phantoms(tmp_path, capsys):
    """Its test images are the shifted ones, and the noise floor draws them again like that."""
    counts = {"train": 4, "val": 2, "test": 3}
    for shift in 0, 3:
        prepare.write_pack(rows(None, "pretrain", counts, shift=shift), tmp_path / str(shift),
                           "phantoms", "pretrain", 24, workers=1)
    plain, shifted = Pack(tmp_path / "0"), Pack(tmp_path / "3")
    pixels = np.empty((2, 3, 24, 24), np.uint8)
    for n in range(9):
        plain.read_image(n, pixels[0])
        shifted.read_image(n, pixels[1])
        assert np.array_equal(*pixels) == (n < 6)
    lines = list(shifted.lines("test"))
    clear = phantoms.draw_clean(lines, 24)
    assert np.array_equal(clear[0], draw(0, 2 * 10 ** 6, 24, noise=False, shift=3))
    assert not np.array_equal(clear[0], draw(0, 2 * 10 ** 6, 24, noise=False))

    flags = ["table", "--root", str(tmp_path), "--shift", "1", "--out", str(tmp_path / "x")]
    assert prepare.main(flags) == 2
    assert "--shift is for phantoms: leave it out for table" in capsys.readouterr().err


def test_scenes_have_the_stated_shares():
    scenes = [make_scene(1, number) for number in range(4000)]
    shares = np.bincount([len(scene.findings) for scene in scenes]) / len(scenes)
    normal, single = phantoms.NORMAL, phantoms.SINGLE
    assert np.allclose(shares, [normal, single, 1 - normal - single], atol=0.03)

    for group, names in FINDINGS.items():
        findings = [f for scene in scenes if scene.group == group for f in scene.findings]
        for value, options in [("name", names), ("size", RADII), ("side", SIDES)]:
            count = Counter(getattr(f, value) for f in findings)
            assert all(abs(count[option] / len(findings) - 1 / len(options)) < 0.05 for option in options)

    for a, b in (scene.findings for scene in scenes if len(scene.findings) == 2):
        assert a.name != b.name and (a.side, a.zone) != (b.side, b.zone)


def test_a_finding_is_where_it_is_said_to_be():
    centres = (np.arange(SIZE) + 0.5) * 2 / SIZE - 1
    x, y = np.meshgrid(centres, centres)
    for scene, f in FOUND:
        difference = change(scene, f)
        assert SIDES[f.side] * (difference * x).sum() > 0
        if f.zone is None:
            continue

        places = {}
        for side, sign in SIDES.items():
            for zone, (midline, lateral, height) in ZONES[scene.group].items():
                near = (x - midline - sign * lateral) ** 2 + (y - height) ** 2 < 0.1 ** 2
                places[side, zone] = difference[near].mean()
        there = places.pop((f.side, f.zone))
        shadow = {(f.side, zone) for zone in phantoms.HIDES.get(f.name, ())}
        assert there > 0.2 and max(places[place] for place in places.keys() - shadow) < there / 2


def test_large_is_much_larger_than_small():
    areas = {}
    for scene, f in FOUND:
        areas.setdefault((scene.group, f.name, f.size), []).append((change(scene, f) > 0.1).sum())
    for group, name, _ in areas:
        small, large = np.mean(areas[group, name, "small"]), np.mean(areas[group, name, "large"])
        assert small > 30        # pixels of 48 x 48

        # These change more than they cover: the rest of the lung, or what lies behind in the beam.
        indirect = name == "pneumothorax" or group == "ultrasound"
        assert large > (1.25 if indirect else 2) * small
    assert RADII["large"][0] > 1.7 * RADII["small"][1]


def test_captions_tell_the_scene():
    informative = words = named = 0
    for scene in SCENES:
        caption = phantoms.caption(scene)
        text = re.findall(r"[\w-]+", caption.lower())
        assert 3 <= len(text) <= 20 and caption[0].isupper() and caption.endswith(".")
        for attribute, options in [("size", RADII), ("side", SIDES)]:
            said = Counter(word for word in text if word in options)
            assert said == Counter(getattr(f, attribute) for f in scene.findings)
        for f in scene.findings:
            place, before = phantoms.PLACES[f.zone]
            synonym = phantoms.SYNONYMS.get((scene.group, f.name), f.name)
            assert place in caption.lower() or before in caption.lower()
            assert f.name in text or synonym in caption.lower()
        assert ("no focal abnormality" in caption.lower()) == (not scene.findings)

        told = sum(4 if f.zone else 3 for f in scene.findings)
        informative, words = informative + told, words + len(text)
        views = map(str.lower, phantoms.VIEWS[scene.group])
        named += any(view in caption.lower() for view in views)
    assert informative > 0.4 * words
    assert 0.4 < named / len(SCENES) < 0.6


def test_rows_of_all_tasks_and_splits():
    counts = {"train": 30, "val": 20, "test": 10}
    seen = {}
    for task in ("pretrain", "vqa", "cls"):
        found = list(rows(None, task, counts))
        for split, number in counts.items():
            images = {row.image for row in found if row.split == split}
            assert len(images) == number
            assert not any(images & others for others in seen.values())
            seen[task, split] = images
        for row in found:
            assert row.group == make_scene(*row.image).group and row.skip is None
    assert len({draw(*image, 16).tobytes() for images in seen.values() for image in images}) == 180

    pretrain = list(rows(None, "pretrain", counts))
    assert list(rows(None, "irtr", counts)) == pretrain
    assert list(rows(None, "irtr", {"val": 20})) == [row for row in pretrain if row.split == "val"]
    assert [row.text for row in rows(None, "irtr", counts, seed=1)] != [row.text for row in pretrain]

    image = pickle.loads(pickle.dumps(pretrain[0].image))
    assert image == pretrain[0].image and image(32).mode == "L" and image(32).size == (32, 32)
    with pytest.raises(UserError):
        next(rows(None, "segmentation"))


def test_answers_agree_with_the_scene():
    answers = {}
    for row in rows(None, "vqa", {"train": 1500}):
        scene, question = make_scene(*row.image), row.text.lower()
        names = {f.name: f for f in scene.findings}
        asked = next((name for name in sum(FINDINGS.values(), ()) if name in question), None)
        assert row.closed == (row.answer in ("yes", "no")) and row.answer == row.answer.lower()

        if row.closed:
            size, side, zone = (next((w for w in options if f" {w} " in question.replace("?", " ")), None)
                                for options in (RADII, SIDES, ZONES[scene.group]))
            f = names.get(asked)
            truth = f is not None and all(said in (None, real) for said, real in
                                          [(size, f.size), (side, f.side), (zone, f.zone)])
            assert row.answer == ("yes" if truth else "no")
            answers.setdefault("presence" if size == side == zone is None else "attribute", []).append(truth)
        elif "modality" in question:
            assert row.answer in {"x-ray", "ct", "mri", "ultrasound"} & set(scene.group.split())
        elif "how many" in question:
            assert row.answer == str(len(scene.findings))
            answers.setdefault("count", []).append(row.answer)
        elif asked:
            assert row.answer in (names[asked].size, names[asked].side, names[asked].zone)
        elif "what does" in question or "what is seen" in question:
            side = next(side for side in SIDES if side in question)
            assert names[row.answer].side == side and phantoms.PLACES[names[row.answer].zone][0] in question
        else:
            assert row.answer == phantoms.ABOUT[scene.group][1]

    assert 0.45 < np.mean(answers["presence"]) < 0.55 and 0.42 < np.mean(answers["attribute"]) < 0.58
    assert max(Counter(answers["count"]).values()) < 0.45 * len(answers["count"])


def test_classes_are_the_single_findings():
    found = list(rows(None, "cls", {"train": 300}))
    for row in found:
        findings = make_scene(*row.image).findings
        assert [row.label] == ([f.name for f in findings] or ["normal"]) and row.label not in row.text.lower()
    assert len({row.label for row in found}) == 9
