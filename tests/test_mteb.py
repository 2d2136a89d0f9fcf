"""A shift or a projection behind an mteb encoder, on retrieval and zero-shot tasks of mteb's that need no download."""

import numpy as np
import pytest
import torch

from gapkern import MeanShift, Projection

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.mocks.mock_tasks.retrieval import MockAny2AnyRetrievalI2TTask, MockAny2AnyRetrievalT2ITask  # noqa: E402
from mteb.mocks.mock_tasks.zeroshot_classification import MockZeroShotClassificationTask  # noqa: E402
from mteb.models.model_implementations.random_baseline import random_encoder_baseline  # noqa: E402

from gapkern.integrations.mteb import MovedEncoder  # noqa: E402

COUNT, DIMS = 12, 16
WORDS = [f"picture {i}" for i in range(COUNT)]


def vectors():
    """Texts, and images near them on the far side of a gap."""
    draw = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(COUNT, DIMS, generator=draw), dim=1)
    images = texts + 0.3 * torch.randn(COUNT, DIMS, generator=draw) + 2 * torch.eye(DIMS)[0]
    return texts, torch.nn.functional.normalize(images, dim=1)


class Known:
    """An encoder of mteb whose embeddings are those of `vectors`: an image's red value, or a text's number."""

    mteb_model_meta = random_encoder_baseline.model_copy(update={"name": "gapkern/known"})

    def __init__(self):
        self.encoded = 0

    def encode(self, inputs, **_):
        texts, images = vectors()
        rows = []
        for batch in inputs:
            if "image" in batch:
                rows += [images[np.asarray(image.convert("RGB"))[0, 0, 0]] for image in batch["image"]]
            else:
                rows += [texts[int(text.split()[1])] for text in batch["text"]]
        self.encoded += len(rows)
        return 3 * torch.stack(rows).numpy()

    def similarity(self, a, b):
        return torch.nn.functional.normalize(torch.as_tensor(a)) @ torch.nn.functional.normalize(torch.as_tensor(b)).T

    def similarity_pairwise(self, a, b):
        return self.similarity(a, b).diagonal()


def filled(task):
    from PIL import Image

    pictures = {
        "id": [f"i{i}" for i in range(COUNT)],
        "image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(COUNT)],
    }
    captions = {"id": [f"t{i}" for i in range(COUNT)], "text": WORDS}
    to_text = isinstance(task, MockAny2AnyRetrievalI2TTask)
    queries, corpus = (pictures, captions) if to_text else (captions, pictures)
    task.dataset = {
        "default": {
            "test": RetrievalSplitData(
                queries=datasets.Dataset.from_dict(queries),
                corpus=datasets.Dataset.from_dict(corpus),
                relevant_docs={q: {d: 1} for q, d in zip(queries["id"], corpus["id"], strict=True)},
                top_ranked=None,
            )
        }
    }
    task.data_loaded = True
    return task


def scores(model, task):
    return task.evaluate(model, split="test", encode_kwargs={"batch_size": 5})["default"]


@pytest.mark.parametrize("kind", [MockAny2AnyRetrievalI2TTask, MockAny2AnyRetrievalT2ITask])
@pytest.mark.parametrize("moves", ["gallery", "queries"])
def test_scores_of_a_shift_are_those_of_the_moved_rows(kind, moves):
    texts, images = vectors()
    shift = MeanShift(n_components="exact", moves=moves).fit(texts, images)
    model = MovedEncoder(Known(), shift)
    found = scores(model, filled(kind()))
    moved, asked = shift.transform(texts), shift.transform_queries(images)
    distance = torch.cdist(asked, moved)
    distance = distance if kind is MockAny2AnyRetrievalI2TTask else distance.T
    right = (distance.argmin(1) == torch.arange(COUNT)).double().mean()
    assert found["recall_at_1"] == pytest.approx(float(right), abs=1e-5)
    plain = torch.cdist(images, texts)
    plain = plain if kind is MockAny2AnyRetrievalI2TTask else plain.T
    before = float((plain.argmin(1) == torch.arange(COUNT)).double().mean())
    assert found["recall_at_1"] != pytest.approx(before) or kind is MockAny2AnyRetrievalI2TTask


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_a_projections_neighbours_are_the_models(metric):
    texts, images = vectors()
    projection = Projection("exact", metric=metric).fit(texts, images)
    found = scores(MovedEncoder(Known(), projection), filled(MockAny2AnyRetrievalI2TTask()))
    open_gap = scores(Known(), filled(MockAny2AnyRetrievalI2TTask()))
    assert found["ndcg_at_10"] == pytest.approx(open_gap["ndcg_at_10"], abs=1e-6)
    assert 0 < found["recall_at_1"] < 1
    rows = MovedEncoder(Known(), projection)
    asked, given = projection.transform_queries(images), projection.transform(texts)
    both = rows.similarity(asked, given)
    assert torch.allclose(both.diagonal(), rows.similarity_pairwise(asked, given), atol=1e-6)
    assert torch.equal(both.argmax(1), rows.similarity(images, texts).argmax(1))


def test_embeddings_are_cached_for_every_transform(tmp_path):
    texts, images = vectors()
    model = Known()
    for transform in (Projection("exact").fit(texts, images), MeanShift(n_components="exact").fit(texts, images)):
        moved = MovedEncoder(model, transform, cache=tmp_path / "cache")
        assert scores(moved, filled(MockAny2AnyRetrievalI2TTask()))["recall_at_1"] > 0
    assert model.encoded == 2 * COUNT


def test_results_are_kept_apart_and_a_file_will_do(tmp_path):
    texts, images = vectors()
    shift, projection = (
        MeanShift(n_components="exact").fit(texts, images),
        Projection("exact", metric="ip").fit(texts, images),
    )
    shift.save(tmp_path / "shift.safetensors")
    metas = [Known.mteb_model_meta]
    metas += [
        MovedEncoder(Known(), t).mteb_model_meta for t in (tmp_path / "shift.safetensors", shift.at(0.5), projection)
    ]
    assert len({meta.model_dump_json(include={"experiment_kwargs"}) for meta in metas}) == 4
    assert {meta.name for meta in metas} == {"gapkern/known"}
    result = mteb.evaluate(MovedEncoder(Known(), projection), filled(MockAny2AnyRetrievalI2TTask()), cache=None)
    assert result.task_results[0].scores["test"][0]["recall_at_1"] > 0


def test_zero_shot_scores_are_cosines_and_refuse_what_is_not_for_them():
    from PIL import Image

    texts, images = vectors()
    task = MockZeroShotClassificationTask()
    task.get_candidate_labels = lambda: WORDS
    data = {"image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(COUNT)], "label": list(range(COUNT))}
    task.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(data)})
    task.data_loaded = True
    projection = Projection("exact", metric="cosine").fit(texts, images)
    assert scores(MovedEncoder(Known(), projection), task)["accuracy"] == scores(Known(), task)["accuracy"]
    with pytest.raises(ValueError, match="which scores by cosine, got one for 'l2'"):
        scores(MovedEncoder(Known(), MeanShift(n_components="exact").fit(texts, images)), task)


def test_what_cannot_be_moved_is_refused():
    texts, images = vectors()
    shift = MeanShift(n_components="exact").fit(texts, images)
    with pytest.raises(TypeError, match="model: expected an encoder of mteb, got int"):
        MovedEncoder(3, shift)
    with pytest.raises(TypeError, match="transform: expected a MeanShift or a Projection, got None"):
        MovedEncoder(Known(), None)
    with pytest.raises(ValueError, match="transform: expected a fitted MeanShift"):
        MovedEncoder(Known(), MeanShift())
    with pytest.raises(ValueError, match="gallery: expected"):
        MovedEncoder(Known(), shift, gallery="audio")
