"""The tasks of `gapkern eval`: CLIP_benchmark's metrics to 1e-6, shifts and perturbations by hand, linear memory."""

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift, Quantize, Uniform
from gapkern.evaluation import Settings, classification, multiple_choice, retrieval, templates
from gapkern.perturb import perturb
from gapkern.ranks import Ranks
from tests.scenes import Batches, classes, draw, scene, unit
from tests.warm import peak_memory

ALONE = Ranks()


class Lookup:
    """A model that looks embeddings up: images are theirs already, tokens are rows of `texts`."""

    def __init__(self, texts):
        self.texts = texts

    def encode_image(self, images):
        return images

    def encode_text(self, tokens):
        return self.texts[tokens]


@pytest.mark.parametrize("count", [3, 12])
def test_classification_is_clip_benchmarks(count, monkeypatch):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # Its accuracy makes a float of an array of one element, which NumPy refuses from 2.4 on.
    monkeypatch.setattr(theirs, "float", lambda value: float(np.asarray(value).item()), raising=False)
    images, labels, prompts = scene()
    keep = labels < count
    images, labels, prompts = images[keep], labels[keep], prompts[:, :count]
    names = [str(i) for i in range(count)]
    words = {f"{t} {name}": t * count + int(name) for t in range(4) for name in names}
    expected = theirs.evaluate(
        Lookup(prompts.flatten(0, 1)),
        Batches(zip(images.split(16), labels.split(16), strict=True), names),
        lambda texts: torch.tensor([words[t] for t in texts]),
        names,
        [f"{t} {{c}}" for t in range(4)],
        "cpu",
        amp=False,
    )
    (found,) = classification(ALONE.rows(images), labels, classes(prompts))
    assert found.metrics == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert 0.3 < found.metrics["acc1"] < 0.98


@pytest.mark.parametrize("real", [False, True])
def test_retrieval_is_clip_benchmarks(real, request):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    if real:
        images, texts = (torch.from_numpy(x) for x in request.getfixturevalue("real_data")("clip"))
        captions = [[i] for i in range(len(images))]
    else:
        counts = torch.randint(1, 6, (70,), generator=torch.Generator().manual_seed(1)).tolist()
        rows = iter(range(sum(counts)))
        captions = [[next(rows) for _ in range(n)] for n in counts]
        images = draw(70, 20)
        texts = images[[i for i, some in enumerate(captions) for _ in some]] + 1.5 * draw(sum(counts), 20, seed=7) + 1
    image_of = torch.tensor([i for i, some in enumerate(captions) for _ in some])
    loader = [(images[i : i + 16], captions[i : i + 16]) for i in range(0, len(images), 16)]
    expected = theirs.evaluate(Lookup(texts), loader, torch.tensor, "cpu", amp=False, recall_k_list=[1, 5, 10])
    (found,) = retrieval(ALONE.rows(images), ALONE.rows(texts), image_of, (1, 5, 10))
    assert found.metrics == pytest.approx(expected, abs=1e-6)
    assert found.metrics["text_retrieval_recall@1"] < found.metrics["text_retrieval_recall@10"] <= 1


def test_shifted_and_perturbed_classification_by_hand():
    images, labels, prompts = scene()
    noise = (Gaussian(0.3), Uniform(0.3) | Quantize(16), Quantize(8, "global"))
    settings = Settings("exact", noise, seeds=(5, 6))
    outcomes = classification(ALONE.rows(images), labels, classes(prompts), settings)
    assert len(outcomes) == 8
    queries, gallery = unit(images), classes(prompts)
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    for closed, current in ((False, gallery), (True, shift.transform(gallery))):
        for perturbation in (None, *noise):
            accuracies = []
            for seed in (5, 6):
                noisy = current if perturbation is None else perturb(current, perturbation, seed)
                near = torch.cdist(queries.double(), noisy.double()).argmin(1)
                accuracies.append(float((near == labels).double().mean()))
            found = outcomes.pop(0)
            assert found.metrics["acc1"] == pytest.approx(sum(accuracies) / 2, abs=1e-12)
            assert found.transform["name"] == ("mean_shift" if closed else "none")
            if perturbation is not None and perturbation.random:
                assert [m["acc1"] for m in found.per_seed] == pytest.approx(accuracies, abs=1e-12)
                assert found.perturbation["seeds"] == [5, 6]


def test_closing_the_gap_changes_nothing_clean_and_helps_under_noise():
    images, labels, prompts = scene()
    settings = Settings("exact", [Gaussian(0.5)], seeds=range(20))
    clean, noisy, closed, closed_noisy = (
        o.metrics["acc1"] for o in classification(ALONE.rows(images), labels, classes(prompts), settings)
    )
    assert clean == closed
    assert closed_noisy > noisy + 0.02


def test_retrieval_shift_by_hand():
    images, texts = unit(draw(40, 16) + 1), unit(draw(80, 16, seed=1))
    image_of = torch.arange(40).repeat_interleave(2)
    texts = unit(texts + images[image_of] - 1)
    given = MeanShift(n_components=6).fit(texts, images)
    for shift in (given, 6):
        found = retrieval(ALONE.rows(images), ALONE.rows(texts), image_of, (3,), Settings(shift, [Quantize(32)]))[-1]
        other = given if shift is given else MeanShift(n_components=6).fit(images, texts)
        if shift is given:
            asking, searched = given.transform(texts), perturb(images, Quantize(32), 0)
        else:
            asking, searched = texts, perturb(other.transform(images), Quantize(32), 0)
        near = torch.cdist(asking.double(), searched.double()).topk(3, largest=False).indices
        expected = (near == image_of[:, None]).any(1).double().mean()
        assert found.metrics["image_retrieval_recall@3"] == pytest.approx(float(expected), abs=1e-12)
        near = torch.cdist(images.double(), perturb(given.transform(texts), Quantize(32), 0).double()).topk(
            3, largest=False
        )
        expected = (image_of[near.indices] == torch.arange(40)[:, None]).any(1).double().mean()
        assert found.metrics["text_retrieval_recall@3"] == pytest.approx(float(expected), abs=1e-12)


def test_images_without_captions_are_searched_but_do_not_ask():
    images = torch.eye(4)
    (found,) = retrieval(ALONE.rows(images), ALONE.rows(images[[1, 2]]), torch.tensor([0, 2]), (1, 9))
    # Both texts are equally far from image 0: the first comes first.
    assert found.metrics == {
        "image_retrieval_recall@1": 0.5,
        "image_retrieval_recall@9": 1.0,
        "text_retrieval_recall@1": 1.0,
        "text_retrieval_recall@9": 1.0,
    }


def test_multiple_choice_by_hand():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 6, (60,), generator=generator)
    question_of = torch.arange(60).repeat_interleave(sizes)
    answers = (torch.rand(60, generator=generator) * sizes).long()
    starts = sizes.cumsum(0) - sizes
    images, choices = draw(60, 12, seed=1), draw(int(sizes.sum()), 12, seed=2)
    choices[starts + answers] += 0.7 * images
    found = multiple_choice(
        ALONE.rows(images), ALONE.rows(choices), question_of, answers, Settings("auto", [Gaussian(0.4)], (3,))
    )
    assert len(found) == 4
    queries, gallery = unit(images), perturb(unit(choices), Gaussian(0.4), 3)
    for outcome, searched in ((found[0], unit(choices)), (found[1], gallery)):
        right = [
            int(torch.cdist(queries[q : q + 1], searched[s : s + n]).argmin()) == a
            for q, (s, n, a) in enumerate(zip(starts.tolist(), sizes.tolist(), answers.tolist(), strict=True))
        ]
        assert outcome.metrics["accuracy"] == pytest.approx(np.mean(right), abs=1e-12)
    assert found[0].metrics["chance"] == pytest.approx(float((1 / sizes).mean()))
    same = torch.ones(3, 4)
    (tie,) = multiple_choice(
        ALONE.rows(same[:1]), ALONE.rows(same), torch.zeros(3, dtype=torch.int64), torch.tensor([0])
    )
    assert tie.metrics["accuracy"] == 1


def test_templates_by_hand():
    images, labels, prompts = scene()
    found = templates(ALONE.rows(images), labels, prompts, list("abcd"), Settings("exact"))
    each = [float((torch.cdist(unit(images), unit(p)).argmin(1) == labels).double().mean()) for p in prompts]
    metrics, details = found[0].metrics, found[0].details["templates"]
    assert [d["acc1"] for d in details] == pytest.approx(each, abs=1e-12)
    assert [d["template"] for d in details] == list("abcd")
    assert (metrics["acc1_template_worst"], metrics["acc1_template_best"]) == (min(each), max(each))
    assert metrics["acc1_template_spread"] == pytest.approx(max(each) - min(each))
    assert metrics["acc1_template_std"] == pytest.approx(np.std(each))
    shift = MeanShift(n_components="exact").fit(classes(prompts), unit(images))
    moved = [
        float((torch.cdist(unit(images), shift.transform(unit(p))).argmin(1) == labels).double().mean())
        for p in prompts
    ]
    assert [d["acc1"] for d in found[1].details["templates"]] == pytest.approx(moved, abs=1e-12)


def test_half_precision_is_normalised_in_float32():
    images, labels, prompts = scene()
    whole = classification(ALONE.rows(images), labels, classes(prompts))[0].metrics
    half = classification(ALONE.rows((images * 3).half()), labels, classes(prompts))[0].metrics
    assert half["acc1"] == pytest.approx(whole["acc1"], abs=0.03)


def test_memory_is_linear():
    setup = """
import torch
from gapkern.evaluation import retrieval
from gapkern.ranks import Ranks
n, ranks = 20000, Ranks()
x = torch.nn.functional.normalize(torch.randn(n, 8), dim=1)
"""
    code = "retrieval(ranks.rows(x), ranks.rows(x), torch.arange(n), (1, 10))"
    assert peak_memory(code, setup=setup) < 300  # 20000 x 20000 float32: 1526 MiB
