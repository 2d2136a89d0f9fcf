"""Our losses where other libraries' stand: the same values and gradients."""

import itertools

import pytest
import torch

from gapkern import losses
from gapkern.testing import assert_near

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SHORT = {"query_to_doc": "q-d", "query_to_query": "q-q", "doc_to_query": "d-q", "doc_to_doc": "d-d"}


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def features(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def same(ours, theirs, inputs, tolerance=1e-10):
    assert_near(ours.detach(), theirs.detach(), tolerance)
    gradients = [torch.autograd.grad(v, inputs, allow_unused=True, retain_graph=True) for v in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_near(a, b, tolerance)


def ranking_loss(**options):
    module = pytest.importorskip("sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking")
    return module.MultipleNegativesRankingLoss(torch.nn.Identity(), **options)


@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("directions", [ALL[:1], (ALL[0], ALL[2]), (ALL[0], ALL[1]), ALL])
@pytest.mark.parametrize("hardness_of", [None, "in-batch", "hard", "all"])
def test_sentence_transformers_multiple_negatives_ranking(negatives, directions, hardness_of):
    q, d, h = features((9, 6), (9, 6), (9, 2, 6))
    for partition in ("joint", "per_direction"):
        if partition != "joint" and set(directions) & {"query_to_query", "doc_to_doc"}:
            continue
        theirs = ranking_loss(
            scale=20.0,
            directions=directions,
            partition_mode=partition,
            hardness_mode=hardness_of
            and {"in-batch": "in_batch_negatives", "hard": "hard_negatives", "all": "all_negatives"}[hardness_of],
            hardness_strength=4.0 if hardness_of else 0.0,
        ).compute_loss_from_embeddings([q, d, *(h[:, k] for k in range(negatives))], None)
        ours = losses.info_nce_loss(
            unit(q),
            unit(d),
            20.0,
            hard_negatives=unit(h[:, :negatives]) if negatives else None,
            share_hard_negatives=True,
            directions=[SHORT[name] for name in directions],
            partition="joint" if partition == "joint" else "separate",
            hardness=4.0 if hardness_of else 0.0,
            hardness_of=hardness_of or "all",
        )
        same(ours, theirs, (q, d, h) if negatives else (q, d))


class _Embeddings(torch.nn.Module):
    """What sentence-transformers' losses ask of a model: embeddings of the features they are given."""

    def __init__(self, tokenizer, dims):
        super().__init__()
        self.tokenizer, self.dims, self.max_seq_length = tokenizer, dims, 8

    def forward(self, features):
        return {"sentence_embedding": features[self.dims]}

    def get_embedding_dimension(self):
        return None


def tokenizer():
    transformers = pytest.importorskip("transformers")

    class Words(transformers.PreTrainedTokenizerBase):
        def __init__(self):
            pass

        def get_vocab(self):
            return {}

    return Words()


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize(("anchors", "positives"), itertools.product((True, False), repeat=2))
@pytest.mark.parametrize("negatives", [False, True])
def test_sentence_transformers_gist(strategy, anchors, positives, negatives):
    module = pytest.importorskip("sentence_transformers.sentence_transformer.losses.gist_embed")
    tensors = features((9, 6), (9, 6), (9, 6), (9, 4), (9, 4), (9, 4), seed=3)
    student, teacher = tensors[:3], [t.detach() for t in tensors[3:]]
    count = 3 if negatives else 2
    words = tokenizer()
    loss = module.GISTEmbedLoss(
        _Embeddings(words, "student"),
        _Embeddings(words, "teacher"),
        temperature=0.05,
        margin_strategy=strategy,
        margin=0.1,
        contrast_anchors=anchors,
        contrast_positives=positives,
    )
    theirs = loss([{"student": s, "teacher": t} for s, t in zip(student[:count], teacher, strict=False)], None)
    further = {"negatives": unit(student[2]), "guide_negatives": unit(teacher[2])} if negatives else {}
    ours = losses.gist_loss(
        unit(student[0]),
        unit(student[1]),
        1 / 0.05,
        unit(teacher[0]),
        unit(teacher[1]),
        margin=0.1,
        margin_strategy=strategy,
        contrast_queries=anchors,
        contrast_documents=positives,
        **further,
    )
    same(ours, theirs, student[:count])


def test_sentence_transformers_matryoshka():
    module = pytest.importorskip("sentence_transformers.sentence_transformer.losses.matryoshka")
    q, d = features((9, 8), (9, 8))
    dims, weights = (8, 4, 2), (1.0, 0.5, 0.25)
    theirs = sum(
        w * ranking_loss().compute_loss_from_embeddings([module.shrink(q, k), module.shrink(d, k)], None)
        for k, w in zip(dims, weights, strict=True)
    )
    same(losses.Matryoshka(losses.info_nce_loss, dims, weights)(q, d, 20.0), theirs, (q, d))

    class Ours(torch.nn.Module):
        """Our loss with the face of theirs, inside of their MatryoshkaLoss."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, sentence_features, labels):
            embeddings = [self.model(f)["sentence_embedding"] for f in sentence_features]
            return losses.info_nce_loss(*embeddings, 20.0)

    model = _Embeddings(None, "x")
    wrapped = module.MatryoshkaLoss(model, Ours(model), dims, weights)
    same(wrapped([{"x": q}, {"x": d}], None), theirs, (q, d))


@pytest.mark.parametrize("classes", [2, 4, 30])
def test_pytorch_metric_learning_supcon(classes):
    module = pytest.importorskip("pytorch_metric_learning.losses")
    (x,) = features((20, 6))
    labels = torch.randint(0, classes, (20,), generator=torch.Generator().manual_seed(1))
    same(losses.supcon_loss(unit(x), labels, 10.0), module.SupConLoss(temperature=0.1)(x, labels), (x,))


def test_pytorch_metric_learning_ntxent():
    module = pytest.importorskip("pytorch_metric_learning.losses")
    x, y = features((12, 6), (12, 6))
    labels = torch.arange(12).repeat(2)
    theirs = module.NTXentLoss(temperature=0.2)(torch.cat([x, y]), labels)
    same(losses.ntxent_loss(unit(x), unit(y), 5.0), theirs, (x, y))


def test_lightly_ntxent():
    module = pytest.importorskip("lightly.loss.ntx_ent_loss")
    x, y = features((12, 6), (12, 6))
    same(losses.ntxent_loss(unit(x), unit(y), 5.0), module.NTXentLoss(temperature=0.2)(x, y), (x, y))


def test_lightly_decoupled():
    module = pytest.importorskip("lightly.loss.dcl_loss")
    x, y = features((12, 6), (12, 6))
    theirs = module.DCLLoss(temperature=0.2)(x, y)
    ours = losses.ntxent_loss(unit(x), unit(y), 5.0, decoupled=True)
    same(ours, theirs, (x, y))


def qwen3(q, d, h, temperature, margin, use_qq, use_dd, tau, smoothing):
    """The Qwen3-Embedding objective as the documentation of memeff 0.3.1 states it, densely."""
    n = len(q)
    own = (q * d).sum(1)
    blocks = [(q @ d.T, True)] + [(v @ v.T, True) for v, used in ((q, use_qq), (d, use_dd)) if used]
    blocks.append((torch.einsum("nd,nkd->nk", q, h), False))
    total, count, sums = torch.zeros_like(own), 0, own.clone()
    for t, square in blocks:
        kept = t <= own[:, None] + margin
        if square:
            kept = kept & ~torch.eye(n, dtype=torch.bool)
        total = total + (kept * (t / temperature).exp()).sum(1)
        count += t.shape[1] - square
        sums = sums + t.sum(1) - (t.diagonal() if square else 0)
    positive = (own / temperature).exp()
    mean = torch.maximum(
        (total / count - tau * positive) / (1 - tau), torch.tensor(-1 / temperature, dtype=torch.float64).exp()
    )
    loss = -(positive / (positive + (count * mean))).log()
    return (loss + smoothing * (own - sums / (count + 1)) / temperature).mean()


@pytest.mark.parametrize(("use_qq", "use_dd"), itertools.product((False, True), repeat=2))
def test_options_of_memeff_by_formula(use_qq, use_dd):
    q, d, h = (unit(t) for t in features((9, 6), (9, 6), (9, 2, 6)))
    tau = torch.linspace(0, 0.3, 9, dtype=torch.float64)
    ours = losses.info_nce_loss(
        q,
        d,
        1 / 0.05,
        hard_negatives=h,
        margin=0.1,
        directions=["q-d", *["q-q"] * use_qq, *["d-d"] * use_dd],
        debias=tau,
        label_smoothing=0.1,
    )
    same(ours, qwen3(q, d, h, 0.05, 0.1, use_qq, use_dd, tau, 0.1), (q, d, h))


@pytest.mark.parametrize("rows", [12, 7])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("soft_label", [True, False])
def test_siglip_plus_by_formula(rows, symmetric, soft_label):
    """The objectives of siglip-kernel 0.1.2, means over all pairs: M times smaller than ours."""
    x, y = (unit(t) for t in features((rows, 6), (12, 6)))
    generator = torch.Generator().manual_seed(2)
    row_ids, col_ids = (torch.randint(0, 5, (k,), generator=generator) for k in (rows, 12))
    logits, right = 10 * x @ y.T - 5, row_ids[:, None] == col_ids
    of_rows, of_columns = (1 / right.sum(k, keepdim=True).double().clamp_min(1) for k in (1, 0))
    share = (of_rows + of_columns) / 2 if symmetric else of_rows.expand(-1, 12)
    target = right * share if soft_label else right.double()
    weights = torch.ones_like(logits) if soft_label else torch.where(right, share, 1.0)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, weight=weights)
    options = {"positives": "mean", "symmetric": symmetric, "soft_label": soft_label}
    ours = losses.sigmoid_loss(x, y, 10.0, -5.0, ids=(row_ids, col_ids), **options)
    same(ours / 12, theirs, (x, y))
