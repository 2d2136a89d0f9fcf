"""Data sets as they lie on disk, templates and class names: what `gapkern eval` reads, and what is wrong with it."""

import json
import pickle

import numpy as np
import pytest

from gapkern import datasets, prompts


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
    (tmp_path / "captions.json").write_text(
        json.dumps(
            {
                "images": [{"id": key, "file_name": name, "height": 5} for key, name in names.items()],
                "annotations": [{"id": i, "image_id": key, "caption": text} for i, (key, text) in enumerate(captions)],
            }
        )
    )
    data = datasets.load("mscoco_captions", tmp_path, annotation_file=tmp_path / "captions.json")
    assert (len(data), data.captions, data.image_of) == (2, ["b", "a", "c"], [0, 1, 1])
    assert np.asarray(data.image(0))[0, 0].tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match=r"dataset_root: cannot read the image .*nine\.jpg"):
        data.image(1)
    (tmp_path / "captions.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"annotation_file: expected COCO's captions .*KeyError 'annotations'"):
        datasets.load("mscoco_captions", tmp_path, annotation_file=tmp_path / "captions.json")


def test_karpathys_captions(tmp_path):
    """`dataset_coco.json`: a split of it, whose images lie in the download's folders or in one."""
    picture(tmp_path / "val2014" / "b.png", (7, 8, 9))
    picture(tmp_path / "a.png", (1, 2, 3))
    images = [
        {
            "filepath": "val2014",
            "filename": f"{name}.png",
            "split": split,
            "cocoid": 9 - i,
            "sentences": [{"raw": f"{name}{n}", "sentid": 10 * i + n, "imgid": i} for n in range(2)],
        }
        for i, (name, split) in enumerate((("b", "test"), ("c", "restval"), ("a", "test"), ("d", "train")))
    ]
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    data = datasets.load("mscoco_captions", tmp_path, annotation_file=file)
    assert (data.captions, data.image_of) == (["b0", "b1", "a0", "a1"], [0, 0, 1, 1])
    assert data.keys == ["0", "1", "20", "21"]
    assert [np.asarray(data.image(i))[0, 0].tolist() for i in range(2)] == [[7, 8, 9], [1, 2, 3]]
    train = datasets.load("mscoco_captions", tmp_path, "train", annotation_file=file)
    assert train.captions == ["c0", "c1", "d0", "d1"]
    with pytest.raises(ValueError, match="annotation_file: expected the split 'dev', got restval, test, train"):
        datasets.load("mscoco_captions", tmp_path, "dev", annotation_file=file)


def test_aokvqa(tmp_path):
    entries = [
        {
            "split": "val",
            "image_id": 299207,
            "question_id": "x",
            "question": "What colour?",
            "choices": ["red", "blue"],
            "correct_choice_idx": 1,
            "direct_answers": ["blue"],
            "difficult_direct_answer": False,
        },
        {"split": "val", "image_id": 7, "question": "Who?", "choices": ["a", "b", "c"], "correct_choice_idx": 0},
    ]
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
