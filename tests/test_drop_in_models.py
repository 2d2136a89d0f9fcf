"""Tiny models of sentence-transformers and transformers, made on the spot: trained by their losses and by ours."""

import copy
import doctest

import pytest
import torch

from gapkern import losses
from gapkern.testing import assert_near

WORDS = [f"word{i}" for i in range(40)]
EPS = 1e-4  # gradients that are zero but for rounding take no steps
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses as module

    return module


@pytest.fixture(scope="module")
def ours():
    pytest.importorskip("sentence_transformers")
    from gapkern.losses import sentence_transformers as module

    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory, theirs):
    """A SentenceTransformer of one small BERT layer, in float64 and without dropout."""
    import tokenizers
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    bert = Transformer(str(folder))
    return SentenceTransformer(modules=[bert, Pooling(16)], device="cpu").double()


def sentences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, len(WORDS), (count, 5), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in drawn.tolist()]


def columns(model, count, rows=12):
    return [model.preprocess(sentences(rows, seed)) for seed in range(count)]


def gradients(model, loss, batch):
    """Value and gradients; losses may change the features they are given."""
    model.zero_grad()
    value = loss([dict(column) for column in batch], None)
    value.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def same(model, a, b, batch, tolerance=1e-10):
    # All gradients at once: those of the keys' biases are zero but for rounding.
    for x, y in zip(*(gradients(model, loss, batch) for loss in (a, b)), strict=True):
        assert_near(x, y, tolerance)


OPTIONS = [
    {},
    {"directions": ALL, "scale": 10.0},
    {"directions": (ALL[0], ALL[2]), "partition_mode": "per_direction"},
    {"hardness_mode": "all_negatives", "hardness_strength": 4.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_multiple_negatives_ranking(model, theirs, ours, options):
    batch = columns(model, 3)
    expected = theirs.MultipleNegativesRankingLoss(model, **options)
    same(model, ours.MultipleNegativesRankingLoss(model, **options), expected, batch)
    cached = theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5, **options)
    mine = ours.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5, **options)
    assert mine.get_config_dict() == cached.get_config_dict()
    same(model, mine, cached, batch)
    same(model, mine, expected, batch)


def test_other_similarities(model, theirs, ours):
    from sentence_transformers.util import dot_score, euclidean_sim

    for similarity in (dot_score, euclidean_sim):
        options = {"similarity_fct": similarity, "scale": 0.5}
        pair = (m.MultipleNegativesRankingLoss(model, **options) for m in (ours, theirs))
        same(model, *pair, columns(model, 2))


@pytest.mark.parametrize("cached", [False, True])
def test_their_matryoshka_around_ours(model, theirs, ours, cached):
    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    dims, weights = [16, 8, 4], [1, 0.5, 2]
    inner = [getattr(m, name)(model) for m in (ours, theirs)]
    same(model, *(theirs.MatryoshkaLoss(model, i, dims, weights) for i in inner), columns(model, 2))


@pytest.mark.parametrize("negatives", [False, True])
def test_gist_with_a_guide(model, theirs, ours, negatives):
    guide = copy.deepcopy(model)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    for options in ({}, {"margin": 0.05, "margin_strategy": "relative", "contrast_anchors": False}):
        pair = (m.GISTEmbedLoss(model, guide, temperature=0.1, **options) for m in (ours, theirs))
        same(model, *pair, columns(model, 3 if negatives else 2))


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_twenty_steps_of_a_training_are_the_same(model, theirs, ours, name):
    start = copy.deepcopy(model).float()
    curves, ends = [], []
    for module in (theirs, ours):
        trained = copy.deepcopy(start)
        loss = getattr(module, name)(trained, directions=ALL)
        optimiser = torch.optim.AdamW(trained.parameters(), lr=2e-3, eps=EPS)
        curve = []
        for step in range(20):
            batch = [trained.preprocess(sentences(16, 2 * step + side)) for side in range(2)]
            value = loss(batch, None)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            curve.append(value.item())
        curves.append(curve)
        ends.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    assert_near(curves[1], curves[0], 1e-4)
    assert_near(ends[1], ends[0], 1e-4)
    assert curves[0][-1] != curves[0][0]


def test_the_examples(ours):
    assert doctest.testmod(ours).failed == 0


def test_without_them_the_error_names_the_extra(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.delitem(sys.modules, "gapkern.losses.sentence_transformers", raising=False)
    with pytest.raises(
        ImportError, match=r"sentence-transformers is needed here; run `pip install 'gapkern\[peers\]'`"
    ):
        importlib.import_module("gapkern.losses.sentence_transformers")


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module", params=["CLIP", "Siglip"])
def pairs_model(request):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    options = {"projection_dim": 8} if request.param == "CLIP" else {}
    config = getattr(transformers, f"{request.param}Config")(text_config=text, vision_config=vision, **options)
    return getattr(transformers, f"{request.param}Model")(config).double()


def image_text_batch(seed=0, rows=10):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 30, (rows, 8), generator=generator)
    ids[:, -1] = 2
    images = torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "pixel_values": images, "attention_mask": torch.ones_like(ids)}


def test_transformers_models_have_their_loss_without_the_logits(pairs_model):
    batch = image_text_batch()
    expected = pairs_model(**batch, return_loss=True)
    weights = list(pairs_model.parameters())
    truth = torch.autograd.grad(expected.loss, weights)
    with losses.patch_transformers(pairs_model) as patch:
        output = pairs_model(**batch, return_loss=True)
        for model in (copy.deepcopy(pairs_model), torch.nn.ModuleList([pairs_model])[0]):
            assert_near(model(**batch, return_loss=True).loss.detach(), expected.loss.detach(), 1e-12)
        plain = pairs_model(**batch)
    assert type(output) is type(expected)
    assert output.logits_per_image is None
    assert output.logits_per_text is None
    assert_near(output.loss.detach(), expected.loss.detach(), 1e-12)
    for name in ("image_embeds", "text_embeds"):
        assert_near(output[name].detach(), expected[name].detach(), 1e-12)
    assert output.vision_model_output is not None
    found = torch.autograd.grad(output.loss, weights)
    assert_near(*(torch.cat([g.flatten() for g in of]) for of in (found, truth)), 1e-10)
    assert_near(plain.logits_per_text.detach(), expected.logits_per_text.detach(), 1e-12)
    patch.undo()
    assert "forward" not in vars(pairs_model)
    assert pairs_model(**batch, return_loss=True).logits_per_text is not None


def test_a_batch_may_hold_ids_and_losses_be_others(pairs_model):
    batch = image_text_batch()
    ids = torch.arange(10) // 2
    with losses.patch_transformers(pairs_model, positives="mean" if hasattr(pairs_model, "logit_bias") else "in"):
        output = pairs_model(**batch, ids=ids, return_loss=True)
        (value, *_) = pairs_model(**batch, ids=ids, return_loss=True, return_dict=False)
    arguments = output.image_embeds, output.text_embeds, pairs_model.logit_scale.exp()
    if hasattr(pairs_model, "logit_bias"):
        expected = losses.sigmoid_loss(*arguments, pairs_model.logit_bias, ids=ids, positives="mean")
    else:
        expected = losses.contrastive_loss(*arguments, ids=ids, positives="in")
    assert_near(output.loss.detach(), expected.detach(), 1e-12)
    assert_near(value.detach(), expected.detach(), 1e-12)
    with losses.patch_transformers(pairs_model, loss=lambda x, y, s, b=None: losses.info_nce_loss(x, y, s)):
        found = pairs_model(**batch, return_loss=True)
    assert_near(found.loss.detach(), losses.info_nce_loss(*arguments).detach(), 1e-12)


def test_a_transformers_training_takes_the_same_steps(pairs_model):
    ends = []
    for ours in (False, True):
        model = copy.deepcopy(pairs_model).float()
        if ours:
            losses.patch_transformers(model)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EPS)
        for step in range(5):
            batch = image_text_batch(step)
            batch["pixel_values"] = batch["pixel_values"].float()
            optimiser.zero_grad()
            model(**batch, return_loss=True).loss.backward()
            optimiser.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_near(ends[1], ends[0], 1e-4)


def test_what_is_no_such_model_is_refused():
    with pytest.raises(TypeError, match="model: expected transformers' CLIP, SigLIP or alike, got Linear"):
        losses.patch_transformers(torch.nn.Linear(2, 2))

    class Almost(torch.nn.Linear):
        get_image_features = get_text_features = logit_scale = None

    with pytest.raises(TypeError, match="model: expected a forward that returns a loss and embeddings, got Almost's"):
        losses.patch_transformers(Almost(2, 2))
