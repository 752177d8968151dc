"""The scorer is right about videos whose truth is known, and says no to captions that lie."""

import numpy as np
import pytest
import torch

from dit_sparse.eval.attributes import attributes, observe, paired_interval, study, summary
from dit_sparse.pipelines.tiny import data

COUNT = 48


@pytest.fixture(scope="module")
def videos():
    """Scenes of a stream training does not use, at three lengths, and their frames."""
    lengths = (17, data.STRAIGHT, 41)
    return [
        (scene, data.render(scene, lengths[i % 3]))
        for i, scene in enumerate(data.sample(77, i) for i in range(COUNT))
    ]


def test_truth_is_right(videos):
    scores = [attributes(video, scene.caption)["score"] for scene, video in videos]
    assert np.mean(scores) >= 0.98


def test_noise_and_blur_do_not_matter_much(videos):
    generator = torch.Generator().manual_seed(0)
    scores = []
    for scene, video in videos[:12]:
        soft = torch.nn.functional.avg_pool2d(video.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
        noisy = soft.permute(0, 2, 3, 1) + 0.03 * torch.randn(video.shape, generator=generator)
        scores.append(attributes(noisy.clamp(0, 1), scene.caption)["score"])
    assert np.mean(scores) >= 0.95


def _swap(caption: str, old: str, palette) -> str:
    words = list(palette)
    return caption.replace(f" {old} ", f" {words[(words.index(old) + 1) % len(words)]} ", 1)


@pytest.mark.parametrize(
    ("name", "palette"), [("colour", data.COLOURS), ("kind", data.SHAPES), ("direction", data.DIRECTIONS)]
)
def test_one_wrong_word_is_one_wrong_attribute(videos, name, palette):
    caught, others = 0, []
    for scene, video in [v for v in videos if len(v[0].shapes) == 1]:
        verdict = attributes(video, _swap(scene.caption, getattr(scene.shapes[0], name), palette))
        caught += not verdict["shapes"][0][name]
        others += [v for k, v in verdict["shapes"][0].items() if k != name] + [verdict["background"]]
    assert caught == sum(len(s.shapes) == 1 for s, _ in videos)
    assert np.mean(others) >= 0.98


def test_wrong_background_is_caught(videos):
    for scene, video in videos:
        lie = _swap(scene.caption, scene.background, data.BACKGROUNDS)
        assert not attributes(video, lie)["background"]


def test_swapped_colours_of_two_shapes_are_caught():
    one = data.Shape("red", "circle", "left", 11.0, 100.0, 20.0, 1.0)
    two = data.Shape("blue", "square", "right", 11.0, 20.0, 45.0, 1.0)
    video = data.render(data.Scene((one, two), "gray"), 17)
    lie = "a blue circle moving left and a red square moving right on a gray background"
    verdict = attributes(video, lie)
    assert verdict["score"] < 0.6
    assert attributes(video, data.Scene((two, one), "gray").caption)["score"] == 1.0


def test_missing_shape_and_still_shape():
    still = data.Scene((data.Shape("red", "circle", "left", 11.0, 60.0, 30.0, 0.0),), "navy")
    video = data.render(still, 17)
    background, (seen,) = observe(video)
    assert (background, seen.colour, seen.kind, seen.direction) == ("navy", "red", "circle", None)
    two = "a red circle moving left and a green square moving up on a navy background"
    assert attributes(video, two)["shapes"][1] == {"colour": False, "kind": False, "direction": False}


def test_uint8_equals_float(videos):
    scene, video = videos[0]
    whole = (video * 255).round().to(torch.uint8).numpy()
    assert attributes(whole, scene.caption) == attributes(video, scene.caption)


@pytest.mark.parametrize(
    ("frames", "caption", "message"),
    [
        (torch.zeros(3, 8, 8, 3), "a red circle moving left on a gray background", r"F >= 5.*\(3, 8, 8, 3\)"),
        (torch.zeros(9, 3, 8, 8), "a red circle moving left on a gray background", r"\(9, 3, 8, 8\)"),
        (torch.full((9, 8, 8, 3), 2.0), "a red circle moving left on a gray background", r"0\.\.1"),
        (torch.full((9, 8, 8, 3), torch.nan), "a red circle moving left on a gray background", r"finite"),
        (torch.zeros(9, 8, 8, 3), "a cat", "a cat"),
    ],
)
def test_bad_input_is_named(frames, caption, message):
    with pytest.raises(ValueError, match=message):
        attributes(frames, caption)


def test_paired_interval():
    rng = np.random.default_rng(1)
    base = rng.normal(size=200)
    low, high = paired_interval(base + 0.5 + 0.1 * rng.normal(size=200), base)
    assert 0.45 < low < 0.5 < high < 0.55
    assert paired_interval(base, base) == (0.0, 0.0)
    with pytest.raises(ValueError, match="2 and 3"):
        paired_interval([1, 2], [1, 2, 3])


def test_study_scores_pairs_and_removes():
    """A stand-in pipeline that draws the truth: the study's bookkeeping, without a model."""
    prompts = data.held_out_prompts(4)
    truths = dict(prompts)
    events = []

    class Pipe:
        def __call__(self, prompt, *, generator, output_type, num_frames):
            assert output_type == "np"
            events.append(generator.initial_seed())
            return type("Out", (), {"frames": data.render(truths[prompt], num_frames).numpy()[None]})

    class Session:
        def report(self):
            return type("Report", (), {"density": 0.5, "sparse_density": 0.25})

        def remove(self):
            events.append("removed")

    rows = study(Pipe(), prompts, {"num_frames": 17}, seed=5, attach=lambda pipe: Session())
    assert events == [5, 6, 7, 8, "removed"]
    assert [r["prompt"] for r in rows] == [p for p, _ in prompts]
    means = summary(rows)
    assert means["score"] >= 0.98
    assert (means["density"], means["sparse_density"]) == (0.5, 0.25)
