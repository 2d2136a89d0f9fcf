"""`build --format open_clip`: the two tables that open_clip publishes."""

import csv
import json

import pytest

from gapkern.evaluation import open_clip_tables as tables


def result(dataset, metrics, model="ViT-B-32", pretrained="openai", task="zeroshot_classification", **more):
    facts = {"dataset": dataset, "model": model, "pretrained": pretrained, "task": task, "language": "en"}
    return {**facts, "metrics": metrics, **more}


RECALLS = {
    f"{side}_retrieval_recall@{k}": (k + (side == "text")) / 20 for side in ("image", "text") for k in (1, 5, 10)
}


def test_both_tables_are_open_clips(tmp_path, run):
    results = [
        result("wds/vtab/pets", {"acc1": 0.9, "mean_per_class_recall": 0.8}),
        result("imagenet1k", {"acc1": 0.6, "acc5": 0.9, "mean_per_class_recall": 0.5}),
        result("digits", {"acc1": 0.4}),
        result("flickr30k", RECALLS, task="zeroshot_retrieval"),
        result("imagenet1k", {"acc1": 0.7}, model="ViT-L-14"),
    ]
    (tmp_path / "in").mkdir()
    for i, each in enumerate(results):
        (tmp_path / "in" / f"{i}.json").write_text(json.dumps(each))
    status, out, _ = run("build", tmp_path / "in", "--format", "open_clip", "--out", tmp_path / "tables")
    assert status == 0
    assert out.startswith("5 results: ")
    with open(tmp_path / "tables" / "openclip_results.csv", newline="") as file:
        found = list(csv.reader(file))
    head = ["name", "pretrained", "Average perf. on 4 datasets", "ImageNet 1k", "Oxford-IIIT Pet", "Flickr", "digits"]
    assert found[0] == head
    assert found[1][:2] == ["ViT-B-32", "openai"]
    assert float(found[1][2]) == pytest.approx((0.6 + 0.8 + 0.075 + 0.4) / 4)
    assert found[1][3:] == ["0.6000", "0.8000", "0.0750", "0.4000"]
    assert found[2] == ["ViT-L-14", "openai", "", "0.7000", "", "", ""], "no average over fewer data sets"
    with open(tmp_path / "tables" / "openclip_retrieval_results.csv", newline="") as file:
        found = list(csv.reader(file))
    assert found[0][:5] == ["name", "pretrained", "params (M)", "FLOPs (B)", "Average score"]
    assert found[0][5:8] == ["Flickr image retr. R@1", "Flickr image retr. R@5", "Flickr image retr. R@10"]
    assert found[0][8] == "Flickr text retr. R@1"
    assert float(found[1][4]) == pytest.approx(sum(RECALLS.values()) / 6)
    assert found[1][5:] == [f"{RECALLS[name]:.4f}" for name in tables.RECALLS]


def test_a_closed_gap_is_a_row_of_its_own():
    shift = {"name": "mean_shift", "shift": "auto", "alpha": 1.0}
    results = [result("mnist", {"acc1": 0.5}), result("mnist", {"acc1": 0.6}, transform=shift)]
    made = tables.tables(results)
    assert list(made) == [tables.CLASSIFICATION]
    assert [row[0] for row in made[tables.CLASSIFICATION][1:]] == ["ViT-B-32 + mean_shift auto", "ViT-B-32"]


def test_what_no_table_holds_is_refused(tmp_path):
    twice = [result("mnist", {"acc1": 0.5}), result("vtab/mnist", {"acc1": 0.6})]
    with pytest.raises(ValueError, match="files: expected one result of ViT-B-32 openai on vtab/mnist, got two"):
        tables.tables(twice)
    with pytest.raises(ValueError, match="files: expected results of classification or retrieval, got none"):
        tables.write(tmp_path, [result("mnist", {"loss": 1.0})])
