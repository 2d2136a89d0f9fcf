"""The demo keeps what the paper and the README promise."""

import html.parser
import inspect
import json

import pytest
import torch

from gapkern.cli import main
from gapkern.experiments import digits
from tests.scenes import strict

pytestmark = pytest.mark.open_clip


@pytest.fixture(scope="module")
def report(tmp_path_factory, trained_digits):
    out = tmp_path_factory.mktemp("demo") / "report"
    _, trained = trained_digits
    defaults = inspect.signature(digits.train).parameters

    def already(data, *, seed, steps, on_step):
        assert (seed, steps) == (defaults["seed"].default, defaults["steps"].default), "as trained_digits was"
        for entry in trained.history:
            on_step(entry)
        return trained

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train", already)
        assert main(["demo", "--out", str(out)]) == 0
    return out, json.loads((out / "report.json").read_text())


def at(report, alpha, **wanted):
    (row,) = [r for r in report["sweep"] if r["alpha"] == alpha and all(r[k] == v for k, v in wanted.items())]
    return row


@pytest.mark.slow
def test_the_papers_effect(report):
    _, found = report
    noise = {"perturbation": "gaussian", "scale": "per_coordinate", "variance": 0.001}
    assert found["clean_accuracy"] >= 0.93
    assert found["gap_norm"] >= 0.8
    assert found["orthogonality"] >= 0.98
    before, after = at(found, 0.0, **noise), at(found, 1.0, **noise)
    assert after["robustness"] - before["robustness"] >= 0.15
    assert abs(after["clean_accuracy"] - before["clean_accuracy"]) <= 0.002
    curve = [row["robustness"] for row in found["sweep"] if all(row[k] == v for k, v in noise.items())]
    alphas = sorted({row["alpha"] for row in found["sweep"]})
    assert alphas[curve.index(max(curve))] == 1.0


@pytest.mark.slow
def test_the_projection_keeps_more_than_the_shift(report):
    """The third line, each number from the saved embeddings once more."""
    from safetensors.torch import load_file

    from gapkern import Gaussian, MeanShift, Projection
    from gapkern.robustness import robustness

    folder, found = report
    saved = load_file(folder / "embeddings.safetensors")
    moves = {
        "as they are": None,
        "gap closed by the shift": MeanShift.load(folder / "shift.safetensors"),
        "queries projected": Projection.load(folder / "projection.safetensors"),
    }
    rows = [row for row in found["projection"] if row["scale"] == "per_coordinate"]
    assert len(rows) == 18
    for none, shift, projection in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert [none["moved"], shift["moved"], projection["moved"]] == list(moves)
        for value in ("robustness", "accuracy"):
            assert projection[value] > shift[value] > none[value]
        assert none["clean_accuracy"] == projection["clean_accuracy"]
    hard = [row for row in rows if row["variance"] == 0.002]
    for row in hard:
        noise = Gaussian(0.002, "per_coordinate")
        once_more = robustness(
            saved["images"], saved["prompts"][0], noise, labels=saved["labels"], shift=moves[row["moved"]]
        )
        assert row["robustness"] == pytest.approx(once_more.robustness, abs=1e-12)
        assert row["accuracy"] == pytest.approx(once_more.accuracy, abs=1e-12)
    assert [row["accuracy"] for row in hard] == pytest.approx([0.51, 0.78, 0.84], abs=0.03)
    assert found["offsets"]["queries projected"] < 1e-6 < found["offsets"]["gap closed by the shift"]


@pytest.mark.slow
def test_the_json_has_what_is_promised(report):
    _, found = report
    for row in found["sweep"]:
        assert {
            "alpha",
            "perturbation",
            "variance",
            "scale",
            "robustness",
            "agreement",
            "accuracy",
            "clean_accuracy",
        } <= set(row)
    assert {row["bins"] for row in found["sweep"]} == {None, 32, 64, 128, 256}
    assert len(found["training"]) == found["settings"]["steps"] == 300
    assert found["training"][-1]["loss"] < found["training"][0]["loss"] / 2
    assert found["metrics"]["centroid_distance"] == pytest.approx(found["gap_norm"], rel=0.05)
    assert found["env"]["versions"]["gapkern"]


class _Page(html.parser.HTMLParser):
    void = ("meta", "link", "img", "source", "br")

    def __init__(self):
        super().__init__()
        self.open, self.images, self.outside = [], 0, []

    def handle_starttag(self, tag, attributes):
        if tag not in self.void:
            self.open.append(tag)
        self.images += tag == "img"
        for name, value in attributes:
            if name in ("src", "href", "srcset") and not value.startswith("data:"):
                self.outside.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_is_whole_and_refers_to_nothing_outside(report):
    folder, found = report
    page = _Page()
    text = (folder / "report.html").read_text()
    page.feed(text)
    assert page.open == []
    assert page.outside == []
    assert page.images == 7
    for value in (f"{found['clean_accuracy']:.3f}", f"{found['gap_norm']:.3f}", f"{found['orthogonality']:.2%}"):
        assert value in text
    assert {p.name for p in folder.iterdir()} == {
        "report.html",
        "report.json",
        "embeddings.safetensors",
        "shift.safetensors",
        "projection.safetensors",
        "projection.png",
        "pca.png",
        "training.png",
        "robustness.png",
        "robustness_total.png",
        "quantize.png",
        "templates.png",
    }


@pytest.mark.slow
def test_the_three_methods_agree_on_the_digits(report):
    from safetensors.torch import load_file

    from gapkern import Gaussian, MeanShift
    from gapkern.robustness import robustness

    folder, found = report
    saved = load_file(folder / "embeddings.safetensors")
    shift = MeanShift.load(folder / "shift.safetensors")
    noise = Gaussian(0.001, "per_coordinate")
    for alpha in (0.0, 1.0):
        results = {
            method: robustness(
                saved["images"],
                saved["prompts"][0],
                noise,
                labels=saved["labels"],
                shift=shift.at(alpha),
                method=method,
                trials=200,
                seed=5,
            )
            for method in ("exact", "projected", "sample")
        }
        exact = results["exact"]
        assert exact.robustness == pytest.approx(
            at(found, alpha, perturbation="gaussian", variance=0.001)["robustness"], abs=1e-12
        )
        for method in ("projected", "sample"):
            for name in ("robustness", "agreement", "accuracy"):
                difference = getattr(results[method], name) - getattr(exact, name)
                assert abs(difference) < 4 * results[method].stderr + 1e-4, (alpha, method, name)


@pytest.mark.slow
def test_a_seed_repeats_every_number(tmp_path, capsys, undrawn):
    def numbers(name, seed):
        assert main(["demo", "--out", str(tmp_path / name), "--steps", "3", "--seed", seed, "--json"]) == 0
        found = strict(capsys.readouterr().out)
        found.pop("seconds")
        for row in found["sweep"]:
            row.pop("seconds")
        return found

    first = numbers("a", "5")
    assert first == numbers("b", "5")
    assert first["training"] != numbers("c", "6")["training"]


@pytest.mark.open_clip
def test_the_demo_trains_the_towers_that_open_clip_has():
    """What is left out changes neither an embedding nor a gradient; AdamW's steps are those of all parameters."""
    import open_clip

    from gapkern.experiments import towers

    torch.manual_seed(0)
    model = open_clip.model.CLIP(**digits.CONFIG).double()
    model.attn_mask = model.attn_mask.double()
    tokens = digits.captions(open_clip.SimpleTokenizer(context_length=digits.CONTEXT)).flatten(0, 1)[::9]
    images = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    weights = [torch.randn(len(x), 128, dtype=torch.float64) for x in (images, tokens)]
    assert towers.fits(model)

    def gradients(features, parameters):
        value = sum((w * x).sum() for w, x in zip(weights, features, strict=True))
        return torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)

    small = towers.Captions(model, tokens)
    assert len(small.table) < 40
    whole = [model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)]
    with towers.first_token_alone(model):
        less = [model.encode_image(images, normalize=True), small.encode()]
    for mine, theirs in zip(less, whole, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)
    others = small.parameters()[1:]
    for mine, theirs in zip(gradients(less, others), gradients(whole, others), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    (table,) = gradients(whole, [model.token_embedding.weight])
    used = tokens[:, : int(tokens.argmax(1).max()) + 1].unique()
    (mine,) = gradients([less[0], small.encode()], [small.table])
    assert torch.allclose(mine, table[used], rtol=1e-9, atol=1e-12)
    assert torch.equal(model.encode_image(images), model.encode_image(images)), "the block is whole again"
    assert "forward" not in vars(model.visual.transformer.resblocks[-1])


@pytest.mark.open_clip
def test_rows_of_the_table_without_a_caption_shrink_as_adamws(monkeypatch):
    from gapkern import datasets
    from gapkern.experiments import towers

    data = datasets.scans(0)
    small = digits.train(data, steps=2)
    monkeypatch.setattr(towers, "fits", lambda model: False)
    whole = digits.train(data, steps=2)
    assert [entry["loss"] for entry in small.history] == pytest.approx([e["loss"] for e in whole.history], rel=1e-5)
    used = digits.captions(small.tokenizer).unique()
    rows = torch.ones(49408, dtype=torch.bool)
    rows[used] = False
    mine, theirs = (each.model.token_embedding.weight.detach()[rows] for each in (small, whole))
    assert torch.allclose(mine, theirs, rtol=1e-6, atol=0)
