"""`gapkern eval` and `gapkern build`: any number of ranks, from files and from a model, what is wrong in one line."""

import csv
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern import MeanShift, datasets, models
from gapkern.cli import main
from gapkern.embeddings import write_folder
from gapkern.evaluation import inputs, records
from tests.scenes import HANGS, Batches, draw, scene


def run(capsys, *arguments):
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), **more}


@pytest.fixture
def files_of_all_tasks(tmp_path):
    """Embedding files, and the command line of each task."""
    images, labels, prompts = scene()
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
    common = [
        "--images",
        "images.npy",
        "--shift",
        "auto",
        "--gaussian",
        ".1",
        "--quantize",
        "16",
        "--seeds",
        "0",
        "1",
        "--recall_k",
        "1",
        "5",
        "--device",
        "cpu",
    ]
    return [
        [*common, "--texts", "prompts.npy", "--labels", "labels.npy", "--task", "zeroshot_classification"],
        [*common, "--texts", "prompts.npy", "--labels", "labels.npy", "--task", "template_robustness"],
        [*common, "--texts", "captions.npy", "--labels", "image_of.npy", "--task", "zeroshot_retrieval"],
        [*common, "--texts", "choices.npy", "--annotation_file", "questions.json", "--task", "multiple_choice"],
    ]


MANY = """
import json, sys
from gapkern.cli import main
from gapkern.ranks import Ranks
with Ranks(60):
    with open("commands.json") as file:
        commands = json.load(file)
    for command in commands:
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
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={world}",
            "--master_port",
            port(),
            "many.py",
            f"out{world}",
        ]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=HANGS)
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
from gapkern.ranks import Ranks
if os.environ["RANK"] == "1":
    ranks = Ranks(60)
    if sys.argv[1] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)
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
    ranks = [
        subprocess.Popen(command, cwd=tmp_path, env=place | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        for rank in (0, 2):
            _, error = ranks[rank].communicate(timeout=HANGS)
            assert ranks[rank].returncode == 1, error
            assert f"gapkern eval: rank {rank}: lost another rank" in error
            assert "Traceback" not in error
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory, trained_digits):
    """What `gapkern demo --export` writes, and the model's embeddings."""
    from safetensors.torch import save_file

    from gapkern.experiments import digits

    folder = tmp_path_factory.mktemp("model")
    data, trained = trained_digits
    digits.export(trained, data, folder)
    images = digits.embed_images(trained, data.test_images)
    tensors = {"images": images, "prompts": digits.embed_prompts(trained, digits.TEMPLATES)}
    save_file({**tensors, "labels": data.test_digits}, folder / "embeddings.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.open_clip
def test_digits_from_the_model_and_from_embeddings(digits_model, tmp_path, capsys):
    common = ["--shift", "exact", "--gaussian", "0.128", "--seeds", *range(5), "--device", "cpu", "--dataset", "digits"]
    given = [
        *common,
        "--model",
        f"local-dir:{digits_model}/model",
        "--num_workers",
        "0",
        "--custom_template_file",
        digits_model / "templates.json",
        "--dump_templates",
        "--dump_classnames",
    ]
    status, out, error = run(capsys, "eval", *given, "--out", tmp_path / "model", "--json")
    assert status == 0, error
    plain, noisy, closed, closed_noisy = json.loads(out)["results"]
    assert plain["metrics"]["acc1"] == closed["metrics"]["acc1"] > 0.4
    assert closed_noisy["metrics"]["acc1"] > noisy["metrics"]["acc1"] + 0.05
    assert (plain["task"], plain["language"], plain["dataset"]) == ("zeroshot_classification", "en", "digits")
    assert (plain["classnames"][3], len(plain["templates"])) == ("three", 7)
    assert closed["transform"]["orthogonality"] > 0.5
    assert (plain["pretrained"], plain["precision"]) == ("none", "float32")
    assert plain["model_id"] == models.load(f"local-dir:{digits_model}/model", device="cpu").id

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
def test_a_models_metrics_are_clip_benchmarks(digits_model, tmp_path, capsys, monkeypatch):
    """The model by its configuration and checkpoint, with class-specific prompts; CLIP_benchmark runs it itself."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    monkeypatch.setattr(theirs, "float", lambda value: float(np.asarray(value).item()), raising=False)
    from safetensors.torch import load_file

    config = json.loads((digits_model / "model" / "open_clip_config.json").read_text())
    (tmp_path / "towers.json").write_text(json.dumps(config["model_cfg"]))
    torch.save(load_file(digits_model / "model" / "open_clip_model.safetensors"), tmp_path / "weights.pt")
    model, data = models.load(f"local-dir:{digits_model}/model", device="cpu"), datasets.load("digits")
    prompts = {name: [f"the number {name}", f"digit {name}", name][: 1 + i % 3] for i, name in enumerate(data.classes)}
    (tmp_path / "prompts.json").write_text(json.dumps({"digits": prompts}))
    # As open_clip scales the pictures for towers without a preprocessing of their own.
    named = models.load(str(tmp_path / "towers.json"), tmp_path / "weights.pt", device="cpu")
    images = torch.stack([named.preprocess(data.image(i)) for i in range(len(data))])
    loader = Batches(zip(images.split(50), torch.tensor(data.labels).split(50), strict=True), data.classes)
    expected = theirs.evaluate(model.module, loader, model.tokenizer, data.classes, prompts, "cpu", amp=False)
    status, out, error = run(
        capsys,
        "eval",
        "--dataset",
        "digits",
        "--model",
        tmp_path / "towers.json",
        "--pretrained",
        tmp_path / "weights.pt",
        "--custom_template_file",
        tmp_path / "prompts.json",
        "--device",
        "cpu",
        "--json",
        "--num_workers",
        "0",
    )
    assert status == 0, error
    (found,) = json.loads(out)["results"]
    assert found["metrics"] == pytest.approx(expected, abs=1e-6)
    assert found["model_id"] == named.id != model.id
    assert found["pretrained"] == str(tmp_path / "weights.pt")
    words = (tmp_path / "prompts.json").read_bytes()
    assert found["inputs"]["custom_template_file"] == {"sha256": hashlib.sha256(words).hexdigest()}
    assert found["inputs"]["dataset"] == {"sha256": datasets.fingerprint(data), "rows": len(data)}


@pytest.mark.slow
@pytest.mark.open_clip
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface")
def test_ranks_encode_what_one_encodes(digits_model, tmp_path):
    """Batches of 50 do not end where the ranks' shares do."""
    command = [
        "-m",
        "gapkern",
        "eval",
        "--dataset",
        "digits",
        "--model",
        f"local-dir:{digits_model}/model",
        "--shift",
        "exact",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--batch_size",
        "50",
        "--out",
    ]
    many = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--master_port", port()]
    for start, out in (([sys.executable], "one"), (many, "three")):
        done = subprocess.run(
            [*start, *command, out], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=HANGS
        )
        assert done.returncode == 0, done.stderr
    for file in (tmp_path / "one").iterdir():
        one, three = (json.loads((tmp_path / out / file.name).read_text()) for out in ("one", "three"))
        assert (one.pop("env")["ranks"], three.pop("env")["ranks"]) == (1, 3)
        assert one == three
    assert len(list((tmp_path / "three").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.open_clip
def test_retrieval_and_multiple_choice_from_the_model(digits_model, tmp_path, capsys):
    """Pictures of digits on disk with captions and questions: what the model scores equals its embeddings' scores."""
    from gapkern.experiments import digits

    data = datasets.load("digits")
    for i in range(20):
        data.image(i).save(tmp_path / f"{i:012d}.png")
    names = [datasets.DIGITS[label] for label in data.labels[:20]]
    captions = [f"the number {name}" for name in names]
    (tmp_path / "captions.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"{i:012d}.png"} for i in range(20)],
                "annotations": [{"image_id": i, "caption": text} for i, text in enumerate(captions)],
            }
        )
    )
    questions = [
        {
            "image": f"{i:012d}.png",
            "question": "the number",
            "choices": list(datasets.DIGITS),
            "correct_choice_idx": data.labels[i],
        }
        for i in range(20)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    common = [
        "--model",
        f"local-dir:{digits_model}/model",
        "--dataset_root",
        tmp_path,
        "--num_workers",
        "1",
        "--json",
        "--batch_size",
        "7",
        "--device",
        "cpu",
    ]
    status, out, error = run(
        capsys,
        "eval",
        "--dataset",
        "mscoco_captions",
        *common,
        "--recall_k",
        1,
        5,
        "--annotation_file",
        tmp_path / "captions.json",
    )
    assert status == 0, error
    (retrieved,) = json.loads(out)["results"]
    assert set(retrieved["metrics"]) == {f"{d}_retrieval_recall@{k}" for d in ("image", "text") for k in (1, 5)}
    status, out, error = run(
        capsys, "eval", "--dataset", "aokvqa", *common, "--annotation_file", tmp_path / "questions.json"
    )
    assert status == 0, error
    (chosen,) = json.loads(out)["results"]
    from safetensors.torch import load_file

    stored = load_file(digits_model / "embeddings.safetensors")
    near = torch.cdist(stored["images"][:20], stored["prompts"][digits.TEMPLATES.index("the number {}")]).argmin(1)
    expected = float((near == stored["labels"][:20]).double().mean())
    assert chosen["task"] == "multiple_choice"
    assert chosen["metrics"]["accuracy"] == pytest.approx(expected, abs=0.051)
    assert chosen["metrics"]["chance"] == pytest.approx(0.1)


@pytest.fixture
def folders(files_of_all_tasks, tmp_path, monkeypatch):
    """Images and captions as `gapkern embed` writes them, and a command line that retrieves one by the other."""
    monkeypatch.chdir(tmp_path)
    for kind, name in (("img_emb", "images"), ("text_emb", "captions")):
        write_folder("out", kind, torch.from_numpy(np.load(f"{name}.npy")).split(40), model="tiny/1")
    return ["--task", "zeroshot_retrieval", "--labels", "image_of.npy", "--recall_k", "1", "5", "--json"]


def test_folders_are_evaluated_as_files_are(folders, tmp_path, capsys):
    expected = run(capsys, "eval", "--images", "images.npy", "--texts", "captions.npy", *folders)
    (expected,) = json.loads(expected[1])["results"]
    x = torch.from_numpy(np.load("images.npy"))
    MeanShift(n_components=2, model="tiny/1").fit(x, x + 1).save("s.safetensors")
    status, out, error = run(capsys, "eval", "--images", "out", "--texts", "out", *folders, "--shift", "s.safetensors")
    assert status == 0, error
    found = json.loads(out)["results"][0]
    assert (found["metrics"], found["model"], found["model_id"]) == (expected["metrics"], "embeddings", "tiny/1")
    assert "model_id" not in expected
    shutil.rmtree("out/text_emb")
    classes = torch.from_numpy(np.load("prompts.npy")[0])
    write_folder("out", "text_emb", classes.split(5))
    arguments = ["eval", "--images", "out", "--labels", "labels.npy", "--json"]
    by_folder = json.loads(run(capsys, *arguments, "--texts", "out")[1])["results"][0]
    np.save("classes.npy", classes.numpy())
    by_file = json.loads(run(capsys, *arguments, "--texts", "classes.npy")[1])["results"][0]
    assert by_folder["metrics"] == by_file["metrics"]
    assert by_folder["model_id"] == "tiny/1"


def edited(place, **facts):
    note = json.loads(Path(place, "manifest.json").read_text())
    Path(place, "manifest.json").write_text(json.dumps({**note, **facts}))


def append(file):
    Path(file).write_bytes(Path(file).read_bytes() + b"more")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda: edited("out/img_emb", dtype="float16"),
            "images: out/img_emb differs from its manifest: img_emb_0.npy: expected float16, got float32",
        ),
        (
            lambda: edited("out/text_emb", dims=23),
            "texts: out/text_emb differs from its manifest: text_emb_0.npy: expected D = 23, got 24",
        ),
        (
            lambda: edited("out/img_emb", rows=91),
            "images: out/img_emb differs from its manifest: expected 91 rows, got 90",
        ),
        (
            lambda: np.save("out/img_emb/img_emb_1.npy", np.zeros((39, 24), np.float32)),
            "img_emb_1.npy: expected 40 rows",
        ),
        (lambda: append("out/img_emb/img_emb_1.npy"), "img_emb_1.npy: expected 3968 bytes, got 3972"),
        (
            lambda: os.remove("out/text_emb/text_emb_3.npy"),
            "texts: out/text_emb differs from its manifest: text_emb_3.npy is missing",
        ),
        (
            lambda: edited("out/text_emb", model="huge/2"),
            "texts: expected embeddings of tiny/1 as in images, got those of huge/2",
        ),
        (lambda: shutil.rmtree("out/text_emb"), "texts: expected text_emb in out, got img_emb"),
    ],
)
def test_a_folder_that_differs_from_its_manifest_is_named(folders, harm, message, capsys):
    harm()
    status, out, error = run(capsys, "eval", "--images", "out", "--texts", "out", *folders)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert message in error


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


STORED = ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "labels.npy"]
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
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "images.npy"],
        "labels: expected integers, got",
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
        [
            "--images",
            "images.npy",
            "--texts",
            "captions.npy",
            "--annotation_file",
            "questions.json",
            "--task",
            "multiple_choice",
        ],
        "texts: expected 270 rows, one per choice, got 180",
    ),
    "a template without {c}": (
        ["--dataset", "digits", "--model", "x", "--custom_template_file", "bad.json"],
        "templates: expected a string with {c} for the class, got 'a {}'",
    ),
    "templates of another number": (
        [*STORED, "--task", "template_robustness", "--custom_template_file", "two.json"],
        "names: expected 4, one per template, got 2",
    ),
    "another width": (
        ["--images", "images.npy", "--texts", "narrow.npy", "--labels", "labels.npy"],
        "classes: expected shape (C, 24), D as the images', got (12, 7)",
    ),
    "a shift that is none": (
        [*STORED, "--shift", "much"],
        "shift: expected a file, 'auto', 'exact' or components, got 'much'",
    ),
    "a shift of another model": (
        [*STORED, "--shift", "s.safetensors", "--model", "mine"],
        "shift: expected one fitted on mine, got one of theirs",
    ),
    "one name for several results": (
        [*STORED, "--shift", "auto", "--output", "x.json"],
        "output: expected {variant} in the template of several results",
    ),
    "a bad variance": (
        [*STORED, "--gaussian", "-1"],
        "variance: expected a finite number >= 0, got -1",
    ),
    "a task of another data set": (
        ["--dataset", "digits", "--model", "local-dir:nowhere", "--task", "zeroshot_retrieval"],
        "model: expected a folder with open_clip_config.json, got nowhere",
    ),
    "a model without weights": (
        ["--dataset", "digits", "--model", "ViT-B-32"],
        "pretrained: expected a tag or a checkpoint, got None for ViT-B-32",
    ),
    "weights for a model that has its own": (
        ["--dataset", "digits", "--model", "hf-hub:a/b", "--pretrained", "openai"],
        "pretrained: expected none, as the weights come with the model, got 'openai'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, files_of_all_tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = np.load("labels.npy")
    np.save("high.npy", np.where(np.arange(90) < 3, labels, 12))
    np.save("narrow.npy", np.load("prompts.npy")[0, :, :7])
    (tmp_path / "bad.json").write_text('["a {c}", "a {}"]')
    (tmp_path / "two.json").write_text('["a {c}", "the {c}"]')
    x = torch.randn(30, 24)
    shift = MeanShift(n_components=2, model="theirs").fit(x, x + 1)
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
