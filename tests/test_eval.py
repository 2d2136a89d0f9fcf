"""Evaluation: CLIP_benchmark's metrics, shifts and perturbations, many ranks, data sets on disk, bad input."""

import csv
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift, Quantize, Uniform
from gapkern.cli import main
from gapkern.evaluation import (
    Ranks,
    Settings,
    classification,
    classifier,
    datasets,
    inputs,
    multiple_choice,
    prompts,
    records,
    retrieval,
    templates,
)
from gapkern.perturb import perturb
from gapkern.testing import peak_memory

ALONE = Ranks()


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def scene():
    """Images (90, 24) of 12 classes around 4 prompts each, a gap away; labels."""
    prompts = draw(4, 12, 24, seed=1) + 2 * draw(1, 12, 24, seed=2)
    labels = torch.randint(12, (90,), generator=torch.Generator().manual_seed(3))
    images = prompts.mean(0)[labels] + 2.2 * draw(90, 24, seed=4)
    images[:, 0] += 8
    return images, labels, prompts


def run(capsys, *arguments):
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


class Lookup:
    """A model that looks embeddings up: images are theirs already, tokens are rows of `texts`."""

    def __init__(self, texts):
        self.texts = texts

    def encode_image(self, images):
        return images

    def encode_text(self, tokens):
        return self.texts[tokens]


class Batches(list):
    """Batches of a data set of some classes, as CLIP_benchmark reads them."""

    def __init__(self, batches, classes):
        super().__init__(batches)
        self.dataset = type("Dataset", (), {"classes": classes})()


@pytest.mark.parametrize("count", [3, 12])
def test_classification_is_clip_benchmarks(scene, count, monkeypatch):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # Its accuracy makes a float of an array of one element, which NumPy refuses from 2.4 on.
    monkeypatch.setattr(theirs, "float", lambda value: float(np.asarray(value).item()), raising=False)
    images, labels, prompts = scene
    keep = labels < count
    images, labels, prompts = images[keep], labels[keep], prompts[:, :count]
    names = [str(i) for i in range(count)]
    words = {f"{t} {name}": t * count + int(name) for t in range(4) for name in names}
    expected = theirs.evaluate(
        Lookup(prompts.flatten(0, 1)), Batches(zip(images.split(16), labels.split(16), strict=True), names),
        lambda texts: torch.tensor([words[t] for t in texts]), names, [f"{t} {{c}}" for t in range(4)], "cpu",
        amp=False,
    )  # fmt: skip
    (found,) = classification(ALONE.rows(images), labels, classifier(prompts))
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


def test_shifted_and_perturbed_classification_by_hand(scene, tmp_path):
    images, labels, prompts = scene
    noise = (Gaussian(0.3), Uniform(0.3) | Quantize(16), Quantize(8, "global"))
    settings = Settings("exact", noise, seeds=(5, 6))
    outcomes = classification(ALONE.rows(images), labels, classifier(prompts), settings)
    assert len(outcomes) == 8
    queries, gallery = unit(images), classifier(prompts)
    shift = MeanShift(components="exact").fit(gallery, queries)
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


def test_closing_the_gap_changes_nothing_clean_and_helps_under_noise(scene):
    images, labels, prompts = scene
    settings = Settings("exact", [Gaussian(0.5)], seeds=range(20))
    clean, noisy, closed, closed_noisy = (
        o.metrics["acc1"] for o in classification(ALONE.rows(images), labels, classifier(prompts), settings)
    )
    assert clean == closed
    assert closed_noisy > noisy + 0.02


def test_retrieval_shift_by_hand():
    images, texts = unit(draw(40, 16) + 1), unit(draw(80, 16, seed=1))
    image_of = torch.arange(40).repeat_interleave(2)
    texts = unit(texts + images[image_of] - 1)
    given = MeanShift(components=6).fit(texts, images)
    for shift in (given, 6):
        found = retrieval(ALONE.rows(images), ALONE.rows(texts), image_of, (3,), Settings(shift, [Quantize(32)]))[-1]
        other = given if shift is given else MeanShift(components=6).fit(images, texts)
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
    assert found.metrics == {"image_retrieval_recall@1": 0.5, "image_retrieval_recall@9": 1.0,
                             "text_retrieval_recall@1": 1.0, "text_retrieval_recall@9": 1.0}  # fmt: skip


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


def test_templates_by_hand(scene):
    images, labels, prompts = scene
    found = templates(ALONE.rows(images), labels, prompts, list("abcd"), Settings("exact"))
    each = [float((torch.cdist(unit(images), unit(p)).argmin(1) == labels).double().mean()) for p in prompts]
    metrics, details = found[0].metrics, found[0].details["templates"]
    assert [d["acc1"] for d in details] == pytest.approx(each, abs=1e-12)
    assert [d["template"] for d in details] == list("abcd")
    assert (metrics["acc1_template_worst"], metrics["acc1_template_best"]) == (min(each), max(each))
    assert metrics["acc1_template_spread"] == pytest.approx(max(each) - min(each))
    assert metrics["acc1_template_std"] == pytest.approx(np.std(each))
    shift = MeanShift(components="exact").fit(classifier(prompts), unit(images))
    moved = [
        float((torch.cdist(unit(images), shift.transform(unit(p))).argmin(1) == labels).double().mean())
        for p in prompts
    ]
    assert [d["acc1"] for d in found[1].details["templates"]] == pytest.approx(moved, abs=1e-12)


def test_half_precision_is_normalised_in_float32(scene):
    images, labels, prompts = scene
    whole = classification(ALONE.rows(images), labels, classifier(prompts))[0].metrics
    half = classification(ALONE.rows((images * 3).half()), labels, classifier(prompts))[0].metrics
    assert half["acc1"] == pytest.approx(whole["acc1"], abs=0.03)


def test_memory_is_linear():
    setup = """
import torch
from gapkern.evaluation import Ranks, retrieval
n, ranks = 20000, Ranks()
x = torch.nn.functional.normalize(torch.randn(n, 8), dim=1)
"""
    code = "retrieval(ranks.rows(x), ranks.rows(x), torch.arange(n), (1, 10))"
    assert peak_memory(code, setup=setup) < 300  # 20000 x 20000 float32: 1526 MiB


# Ranks


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), **more}


@pytest.fixture
def files_of_all_tasks(scene, tmp_path):
    """Embedding files, and the command line of each task."""
    images, labels, prompts = scene
    np.save(tmp_path / "images.npy", images.numpy())
    np.save(tmp_path / "prompts.npy", prompts.numpy())
    np.save(tmp_path / "labels.npy", labels.numpy())
    # Twice the same: equally near rows that come to lie on different ranks.
    captions = torch.cat([images + draw(90, 24, seed=8), images + draw(90, 24, seed=8)])
    np.save(tmp_path / "captions.npy", captions.numpy())
    np.save(tmp_path / "image_of.npy", torch.arange(90).repeat(2).numpy())
    choices = images.repeat_interleave(3, 0) + 3 * draw(270, 24, seed=9)
    np.save(tmp_path / "choices.npy", choices.numpy())
    questions = [
        {"image_id": i, "question": "?", "choices": list("abc"), "correct_choice_idx": i % 3} for i in range(90)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    common = ["--images", "images.npy", "--shift", "auto", "--gaussian", ".1", "--quantize", "16", "--seeds", "0", "1",
              "--recall_k", "1", "5", "--device", "cpu"]  # fmt: skip
    return [
        [*common, "--texts", "prompts.npy", "--labels", "labels.npy", "--task", "zeroshot_classification"],
        [*common, "--texts", "prompts.npy", "--labels", "labels.npy", "--task", "template_robustness"],
        [*common, "--texts", "captions.npy", "--labels", "image_of.npy", "--task", "zeroshot_retrieval"],
        [*common, "--texts", "choices.npy", "--annotation_file", "questions.json", "--task", "multiple_choice"],
    ]


MANY = """
import json, sys
from gapkern.cli import main
from gapkern.evaluation import Ranks
with Ranks(60):
    for command in json.load(open("commands.json")):
        status = main(["eval", *command, "--out", sys.argv[1]])
        assert status == 0, status
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface")
def test_any_number_of_ranks_writes_the_same(files_of_all_tasks, tmp_path):
    (tmp_path / "commands.json").write_text(json.dumps(files_of_all_tasks))
    (tmp_path / "many.py").write_text(MANY)
    results = {}
    for world in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port", port(),
                   "many.py", f"out{world}"]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        found = {file.name: json.loads(file.read_text()) for file in (tmp_path / f"out{world}").glob("*.json")}
        assert {record.pop("env")["ranks"] for record in found.values()} == {world}
        results[world] = found
    assert len(results[1]) == 4 * 6
    assert results[2] == results[1]
    assert results[4] == results[1]


LEAVES = """
import os, signal, sys, time
from gapkern.cli import main
from gapkern.evaluation import Ranks
if os.environ["RANK"] == "1":
    ranks = Ranks(60)
    if sys.argv[1] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface")
@pytest.mark.parametrize(("how", "timeout"), [("dies", 1800), ("hangs", 5)])
def test_a_rank_that_leaves_takes_the_others_with_it(how, timeout, files_of_all_tasks, tmp_path):
    (tmp_path / "leaves.py").write_text(LEAVES)
    place = environment(WORLD_SIZE="3")
    command = [sys.executable, "leaves.py", how, "eval", *files_of_all_tasks[0], "--timeout", str(timeout)]
    started = time.monotonic()
    ranks = [
        subprocess.Popen(command, cwd=tmp_path, env=place | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        for rank in (0, 2):
            _, error = ranks[rank].communicate(timeout=60 - (time.monotonic() - started))
            assert ranks[rank].returncode == 1, error
            assert f"gapkern eval: rank {rank}: lost another rank" in error
            assert "Traceback" not in error
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert time.monotonic() - started < 60


# Data sets as they lie on disk


def picture(path, colour):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), colour).save(path)


@pytest.mark.open_clip
@pytest.mark.parametrize(("name", "count", "label"), [("cifar10", 10, b"labels"), ("cifar100", 100, b"fine_labels")])
def test_cifar(name, count, label, tmp_path, monkeypatch):
    """Files of the Python version's format; only their sums differ from the published ones."""
    import hashlib

    sets = pytest.importorskip("torchvision.datasets")
    kind = getattr(sets, name.upper())
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3072), dtype=np.uint8)

    def dump(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    test = dump("test_batch", {"data": pixels, label.decode(): [3, 1, 4, 1, 5, 9, 2]})
    names = [f"kind_{i}" for i in range(count)]
    meta = {"filename": "meta", "key": kind.meta["key"], "md5": dump("meta", {kind.meta["key"]: names})}
    monkeypatch.setattr(kind, "train_list", [])
    monkeypatch.setattr(kind, "test_list", [["test_batch", test]])
    monkeypatch.setattr(kind, "meta", meta)
    data = datasets.load(name, tmp_path)
    assert (data.labels, data.classes[:2]) == ([3, 1, 4, 1, 5, 9, 2], ["kind 0", "kind 1"])
    assert np.array_equal(np.asarray(data.image(2)), pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))
    with pytest.raises(ValueError, match=r"dataset_root: expected CIFAR.*'s Python version in"):
        datasets.load(name, tmp_path / "elsewhere")


@pytest.mark.open_clip
def test_folders_of_classes(tmp_path):
    for i, name in enumerate(("n02", "n01_big")):
        for n in range(2):
            picture(tmp_path / "imagenet1k" / "val" / name / f"{n}.png", (i, n, 0))
    data = datasets.load("imagenet1k", tmp_path / "{dataset}")
    assert (data.classes, data.labels) == (["n01 big", "n02"], [0, 0, 1, 1])
    assert np.asarray(data.image(3))[0, 0].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="dataset_root: expected a folder of images for each class"):
        datasets.load("imagefolder", tmp_path / "imagenet1k" / "val" / "n02")


def test_coco_captions(tmp_path):
    names = {9: "nine.jpg", 2: "two.png", 5: "none.png"}
    picture(tmp_path / "two.png", (7, 8, 9))
    captions = [(9, "a"), (2, "b"), (9, "c")]
    (tmp_path / "captions.json").write_text(json.dumps({
        "images": [{"id": key, "file_name": name, "height": 5} for key, name in names.items()],
        "annotations": [{"id": i, "image_id": key, "caption": text} for i, (key, text) in enumerate(captions)],
    }))  # fmt: skip
    data = datasets.load("mscoco_captions", tmp_path, annotation_file=tmp_path / "captions.json")
    assert (len(data), data.captions, data.image_of) == (2, ["b", "a", "c"], [0, 1, 1])
    assert np.asarray(data.image(0))[0, 0].tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match=r"dataset_root: cannot read the image .*nine\.jpg"):
        data.image(1)
    (tmp_path / "captions.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"annotation_file: expected COCO's captions .*KeyError 'annotations'"):
        datasets.load("mscoco_captions", tmp_path, annotation_file=tmp_path / "captions.json")


def test_aokvqa(tmp_path):
    entries = [
        {"split": "val", "image_id": 299207, "question_id": "x", "question": "What colour?", "choices": ["red", "blue"],
         "correct_choice_idx": 1, "direct_answers": ["blue"], "difficult_direct_answer": False},
        {"split": "val", "image_id": 7, "question": "Who?", "choices": ["a", "b", "c"], "correct_choice_idx": 0},
    ]  # fmt: skip
    picture(tmp_path / "val2017" / "000000299207.jpg", (0, 0, 0))
    picture(tmp_path / "000000000007.jpg", (255, 255, 255))
    file = tmp_path / "aokvqa.json"
    file.write_text(json.dumps(entries))
    data = datasets.load("aokvqa", tmp_path, annotation_file=file)
    assert (data.questions, data.answers) == (["What colour?", "Who?"], [1, 0])
    assert [int(np.asarray(data.image(i))[0, 0, 0]) for i in range(2)] == [0, 255]
    entries[1]["correct_choice_idx"] = 3
    file.write_text(json.dumps(entries))
    with pytest.raises(
        ValueError, match=r"annotation_file: expected correct_choice_idx in \[0, 3\), got 3 in question 1"
    ):
        datasets.load("aokvqa", tmp_path, annotation_file=file)


def test_templates_and_class_names_in_clip_benchmarks_formats(tmp_path):
    file = tmp_path / "templates.json"
    file.write_text(json.dumps({"digits": ["a {c}", "{c}!"], "imagenet1k": ["no {c}"], "cars": {"one": ["1"]}}))
    assert prompts.load_templates(file, "vtab/digits") == ["a {c}", "{c}!"]
    assert prompts.load_templates(file, "pets") == ["no {c}"]
    assert prompts.fill(prompts.load_templates(file, "cars"), ["one"]) == [["1"]]
    with pytest.raises(ValueError, match="templates: expected prompts of every class, got none of 'two'"):
        prompts.fill(prompts.load_templates(file, "cars"), ["two"])
    file.write_text('{"digits": ["zero", "one"]}')
    assert prompts.load_classnames(file, "digits") == ["zero", "one"]
    with pytest.raises(ValueError, match=r"classnames: expected 'pets' in .*, got 'digits'"):
        prompts.load_classnames(file, "pets")
    pytest.importorskip("clip_benchmark")
    theirs = prompts.load_templates("en_zeroshot_classification_templates.json", "cifar10")
    assert len(theirs) > 1
    assert all("{c}" in template for template in theirs)


# The command line


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    """The demo's model, briefly trained, in a folder that open_clip loads."""
    pytest.importorskip("open_clip")
    pytest.importorskip("sklearn")
    from safetensors.torch import save_file

    from gapkern.experiments import digits

    folder = tmp_path_factory.mktemp("model")
    trained = digits.train(digits.load(0), steps=90)
    towers = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 8, "patch_size": 2, "layers": 2, "width": 128, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
    }
    config = {"model_cfg": towers, "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "templates.json").write_text(json.dumps([t.replace("{}", "{c}") for t in digits.TEMPLATES]))
    images = digits.embed_images(trained, digits.load(0).test_images)
    tensors = {"images": images, "prompts": digits.embed_prompts(trained, digits.TEMPLATES)}
    save_file({**tensors, "labels": digits.load(0).test_digits}, folder / "embeddings.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.open_clip
def test_digits_from_the_model_and_from_embeddings(digits_model, tmp_path, capsys):
    common = ["--shift", "exact", "--gaussian", "0.128", "--seeds", *range(5), "--device", "cpu", "--dataset", "digits"]
    given = [*common, "--model", f"local-dir:{digits_model}", "--custom_template_file", digits_model / "templates.json",
             "--num_workers", "0", "--dump_templates", "--dump_classnames"]  # fmt: skip
    status, out, error = run(capsys, "eval", *given, "--out", tmp_path / "model", "--json")
    assert status == 0, error
    plain, noisy, closed, closed_noisy = json.loads(out)["results"]
    assert plain["metrics"]["acc1"] == closed["metrics"]["acc1"] > 0.4
    assert closed_noisy["metrics"]["acc1"] > noisy["metrics"]["acc1"] + 0.05
    assert (plain["task"], plain["language"], plain["dataset"]) == ("zeroshot_classification", "en", "digits")
    assert (plain["classnames"][3], len(plain["templates"])) == ("three", 7)
    assert closed["transform"]["orthogonality"] > 0.5

    stored = f"{digits_model}/embeddings.safetensors"
    files = ["--images", f"{stored}[images]", "--texts", f"{stored}[prompts]", "--labels", f"{stored}[labels]"]
    status, out, error = run(capsys, "eval", *files, *common, "--json")
    assert status == 0, error
    # The scans pass through eight bits on their way to the model.
    for ours, theirs in zip(json.loads(out)["results"], (plain, noisy, closed, closed_noisy), strict=True):
        assert ours["metrics"]["acc1"] == pytest.approx(theirs["metrics"]["acc1"], abs=0.01)

    more = ["--task", "template_robustness", "--out", tmp_path / "model"]
    status, out, error = run(capsys, "eval", *given, *more)
    assert status == 0, error
    assert "acc1_template_worst" in out
    assert "worst template, none, none: '" in out
    status, out, _ = run(capsys, "build", tmp_path / "model", "--out", tmp_path / "results.csv")
    assert (status, out) == (0, f"8 results: {tmp_path}/results.csv\n")
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["transform"] for row in rows} == {"none", "mean_shift exact"}
    assert sum(float(row["acc1"]) == plain["metrics"]["acc1"] for row in rows) >= 2
    assert {row["seeds"] for row in rows} == {"", "0 1 2 3 4"}


@pytest.mark.slow
@pytest.mark.open_clip
def test_retrieval_and_multiple_choice_from_the_model(digits_model, tmp_path, capsys):
    """Pictures of digits on disk with captions and questions: what the model scores equals its embeddings' scores."""
    from gapkern.experiments import digits

    data = datasets.load("digits")
    for i in range(20):
        data.image(i).save(tmp_path / f"{i:012d}.png")
    names = [digits.NAMES[label] for label in data.labels[:20]]
    captions = [f"the number {name}" for name in names]
    (tmp_path / "captions.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i:012d}.png"} for i in range(20)],
        "annotations": [{"image_id": i, "caption": text} for i, text in enumerate(captions)],
    }))  # fmt: skip
    questions = [
        {"image": f"{i:012d}.png", "question": "the number", "choices": list(digits.NAMES),
         "correct_choice_idx": data.labels[i]} for i in range(20)
    ]  # fmt: skip
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    common = ["--model", f"local-dir:{digits_model}", "--dataset_root", tmp_path, "--num_workers", "1", "--json",
              "--batch_size", "7", "--device", "cpu"]  # fmt: skip
    status, out, error = run(capsys, "eval", "--dataset", "mscoco_captions", *common, "--recall_k", 1, 5,
                             "--annotation_file", tmp_path / "captions.json")  # fmt: skip
    assert status == 0, error
    (retrieved,) = json.loads(out)["results"]
    assert set(retrieved["metrics"]) == {f"{d}_retrieval_recall@{k}" for d in ("image", "text") for k in (1, 5)}
    status, out, error = run(capsys, "eval", "--dataset", "aokvqa", *common,
                             "--annotation_file", tmp_path / "questions.json")  # fmt: skip
    assert status == 0, error
    (chosen,) = json.loads(out)["results"]
    from safetensors.torch import load_file

    stored = load_file(digits_model / "embeddings.safetensors")
    near = torch.cdist(stored["images"][:20], stored["prompts"][digits.TEMPLATES.index("the number {}")]).argmin(1)
    expected = float((near == stored["labels"][:20]).double().mean())
    assert chosen["task"] == "multiple_choice"
    assert chosen["metrics"]["accuracy"] == pytest.approx(expected, abs=0.051)
    assert chosen["metrics"]["chance"] == pytest.approx(0.1)


def test_existing_results_are_skipped_or_filled_in(files_of_all_tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["eval", *files_of_all_tasks[2], "--out", "results"]
    assert run(capsys, *command)[0] == 0
    files = sorted((tmp_path / "results").iterdir())
    assert len(files) == 6
    assert "embeddings_none_embeddings_en_zeroshot_retrieval.json" in {file.name for file in files}
    before = {file: (file.stat().st_mtime_ns, file.read_text()) for file in files}
    files[2].unlink()
    assert run(capsys, *command, "--skip_existing")[0] == 0
    assert files[2].exists()
    assert all(file.stat().st_mtime_ns == before[file][0] for file in files if file != files[2])
    monkeypatch.setattr(inputs, "measure", None)  # nothing is measured any more
    status, out, _ = run(capsys, *command, "--skip_existing", "--json")
    assert (status, len(json.loads(out)["results"])) == (0, 6)


def test_build_says_what_it_leaves_out(tmp_path, capsys):
    theirs = {"dataset": "d", "model": "m", "pretrained": "p", "task": "t", "metrics": {"acc1": 0.5}, "language": "en"}
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    (tmp_path / "other.json").write_text("{}")
    status, out, error = run(capsys, "build", tmp_path, "--out", tmp_path / "r.csv", "--json")
    assert (status, json.loads(out)["rows"][0]["acc1"]) == (0, 0.5)
    assert "1 JSON files are no results and were left out" in error
    status, _, error = run(capsys, "build", tmp_path / "other.json")
    assert (status, error.count("\n")) == (2, 1)
    assert "expected a result with dataset, model" in error
    (tmp_path / "theirs.json").unlink()
    assert run(capsys, "build", tmp_path)[0] == 2


BAD = {
    "unknown data set": (["--dataset", "cifar11", "--model", "x"], "dataset: expected one of 'aokvqa', 'cifar10'"),
    "nothing to evaluate": ([], "expected --images and --texts, or --dataset and --model"),
    "one side": (["--images", "images.npy"], "images and texts: expected both, got one"),
    "no labels": (["--images", "images.npy", "--texts", "prompts.npy"], "labels: expected a file of integers"),
    "labels out of range": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "high.npy"],
        "labels: expected values in [0, 12), classes, got 12 in row 3",
    ),
    "labels of floats": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "images.npy"], "labels: expected integers, got"
    ),
    "too few labels": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "image_of.npy"],
        "labels: expected shape (90,), one per image, got (180,)",
    ),
    "captions that do not fit": (
        ["--images", "images.npy", "--texts", "captions.npy", "--labels", "3", "--task", "zeroshot_retrieval"],
        "labels: expected 3 texts for each of 90 images, got 180 texts",
    ),
    "too few choices": (
        ["--images", "images.npy", "--texts", "captions.npy", "--annotation_file", "questions.json", "--task",
         "multiple_choice"],
        "texts: expected 270 rows, one per choice, got 180",
    ),
    "a template without {c}": (
        ["--dataset", "digits", "--model", "x", "--custom_template_file", "bad.json"],
        "templates: expected a string with {c} for the class, got 'a {}'",
    ),
    "templates of another number": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "labels.npy", "--task", "template_robustness",
         "--custom_template_file", "two.json"],
        "names: expected 4, one per template, got 2",
    ),
    "another width": (
        ["--images", "images.npy", "--texts", "narrow.npy", "--labels", "labels.npy"],
        "classes: expected shape (C, 24), D as the images', got (12, 7)",
    ),
    "a shift that is none": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "labels.npy", "--shift", "much"],
        "shift: expected a file, 'auto', 'exact' or components, got 'much'",
    ),
    "a shift of another model": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "labels.npy", "--shift", "s.safetensors",
         "--model", "mine"],
        "shift: expected one fitted on mine, got one of theirs",
    ),
    "one name for several results": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "labels.npy", "--shift", "auto", "--output",
         "x.json"],
        "output: expected {variant} in the template of several results",
    ),
    "a bad variance": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "labels.npy", "--gaussian", "-1"],
        "variance: expected a finite number >= 0, got -1",
    ),
    "a task of another data set": (
        ["--dataset", "digits", "--model", "local-dir:nowhere", "--task", "zeroshot_retrieval"], "model: cannot load"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, files_of_all_tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = np.load("labels.npy")
    np.save("high.npy", np.where(np.arange(90) < 3, labels, 12))
    np.save("narrow.npy", np.load("prompts.npy")[0, :, :7])
    (tmp_path / "bad.json").write_text('["a {c}", "a {}"]')
    (tmp_path / "two.json").write_text('["a {c}", "the {c}"]')
    x = torch.randn(30, 24)
    shift = MeanShift(components=2, model="theirs").fit(x, x + 1)
    shift.save("s.safetensors")
    arguments, message = BAD[case]
    status, out, error = run(capsys, "eval", *arguments, "--device", "cpu")
    assert (status, out) == (2, ""), error
    assert error.startswith("gapkern eval: ")
    assert message in error
    assert error.count("\n") == 1


def test_file_names():
    facts = {"dataset": "a/b", "model": "m", "pretrained": "p", "language": "en", "task": "t"}
    assert records.path("{dataset}_{model}{variant}.json", facts, "_x", True).name == "a_b_m_x.json"
    with pytest.raises(ValueError, match=r"output: expected places among \{dataset\}"):
        records.path("{nothing}.json", facts, "", False)
