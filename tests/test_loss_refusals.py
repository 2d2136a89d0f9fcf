"""What the family of contrastive losses refuses, in words that name the argument."""

import math

import pytest
import torch

from gapkern import losses

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: losses.info_nce_loss(X, X[:5], 1.0), ValueError, "documents: expected 6 rows as in queries"),
        (lambda: losses.info_nce_loss(X, X, 1.0, directions=("q-x",)), ValueError, "directions: expected one of 'q-d'"),
        (
            lambda: losses.info_nce_loss(X, X, 1.0, directions=("q-q",)),
            ValueError,
            "directions: expected 'q-d' or 'd-q'",
        ),
        (
            lambda: losses.info_nce_loss(X, X, 1.0, directions=("q-d", "d-d"), partition="separate"),
            ValueError,
            "directions: expected 'd-q' beside 'd-d'",
        ),
        (lambda: losses.info_nce_loss(X, X, 1.0, partition="both"), ValueError, "partition: expected one of 'joint'"),
        (lambda: losses.info_nce_loss(X, X, 1.0, reduction="max"), ValueError, "reduction: expected one of 'mean'"),
        (lambda: losses.info_nce_loss(X, X, 1.0, hardness_of="x"), ValueError, "hardness_of: expected one of"),
        (lambda: losses.info_nce_loss(X, X, 1.0, hardness=-1), ValueError, "hardness: expected a finite number >= 0"),
        (lambda: losses.info_nce_loss(X, X, 1.0, debias=1.0), ValueError, r"debias: expected a number in \[0, 1\)"),
        (lambda: losses.info_nce_loss(X, X, 1.0, debias=torch.ones(2)), ValueError, "debias: expected one element or"),
        (
            lambda: losses.info_nce_loss(X, X, 1.0, label_smoothing=1),
            ValueError,
            "label_smoothing: expected a number in",
        ),
        (lambda: losses.info_nce_loss(X, X, 1.0, margin="a"), TypeError, "margin: expected a number, got str"),
        (lambda: losses.info_nce_loss(X, X, 1.0, ids=IDS[:5]), ValueError, r"ids: expected shape \(6,\), got \(5,\)"),
        (lambda: losses.info_nce_loss(X, X, 1.0, ids=IDS.double()), TypeError, "ids: expected integers, got float64"),
        (lambda: losses.info_nce_loss(X, X, 1.0, ids=(IDS, IDS[:2])), ValueError, r"ids\[1\]: expected shape \(6,\)"),
        (lambda: losses.info_nce_loss(X, X, 1.0, weights=torch.ones(5)), ValueError, r"weights: expected shape \(6,\)"),
        (
            lambda: losses.info_nce_loss(X, X, 1.0, hard_negatives=X),
            ValueError,
            r"hard_negatives: expected shape \(6, K, 4\), got \(6, 4\)",
        ),
        (
            lambda: losses.info_nce_loss(X, X, 1.0, extra_negatives=X[:, :2]),
            ValueError,
            "extra_negatives: expected D = 4 as in queries",
        ),
        (
            lambda: losses.info_nce_loss(X, X, 1.0, extra_negatives=X.double()),
            TypeError,
            "extra_negatives: expected torch.float32 as in queries, got torch.float64",
        ),
        (lambda: losses.contrastive_loss(X, X, 1.0, positives="no"), ValueError, "positives: expected one of 'out'"),
        (
            lambda: losses.contrastive_loss(X, X, 1.0, ids=IDS, positives="in", label_smoothing=0.1),
            ValueError,
            "label_smoothing: expected 0 with positives='in'",
        ),
        (lambda: losses.contrastive_loss(X, X, 1.0, exchange="x"), ValueError, "exchange: expected one of 'auto'"),
        (
            lambda: losses.sigmoid_loss(X, X, 1.0, 0.0, positives="mean"),
            ValueError,
            "positives: expected 'sum' without ids",
        ),
        (
            lambda: losses.sigmoid_loss(X, X, 1.0, 0.0, ids=IDS, soft_label=True),
            ValueError,
            "soft_label: expected False with positives='sum', got True",
        ),
        (
            lambda: losses.sigmoid_loss(X, X, 1.0, 0.0, symmetric=False),
            ValueError,
            "symmetric: expected True with positives='sum', got False",
        ),
        (
            lambda: losses.sigmoid_loss(X, X, 1.0, 0.0, ids=IDS, positives="mean", soft_label=0.1),
            TypeError,
            "soft_label: expected True or False, got 0.1",
        ),
        (lambda: losses.sigmoid_loss(X, X[:4], 1.0, 0.0, ids=IDS), ValueError, "ids: expected two vectors"),
        (lambda: losses.supcon_loss(X, IDS.float(), 1.0), TypeError, "labels: expected integers, got float32"),
        (lambda: losses.mil_nce_loss(X, X, 1.0), ValueError, r"texts: expected shape \(6, K, 4\), got \(6, 4\)"),
        (lambda: losses.gist_loss(X, X, 1.0, X[:5], X), ValueError, "guide_queries: expected 6 rows as in queries"),
        (lambda: losses.gist_loss(X, X, 1.0, X, X, negatives=X), ValueError, "guide_negatives: expected together with"),
        (
            lambda: losses.gist_loss(X, X, 1.0, X, X, margin_strategy="x"),
            ValueError,
            "margin_strategy: expected one of",
        ),
        (lambda: losses.uniformity_loss(X[:1]), ValueError, "features: expected at least two rows, got 1"),
        (lambda: losses.uniformity_loss(X, torch.ones(2)), ValueError, r"t: expected one element, got shape \(2,\)"),
        (lambda: losses.uniformity_loss(IDS[:, None]), TypeError, "features: expected float32, float16"),
        (
            lambda: losses.contrastive_loss(X, X, 1.0, ids=IDS, similarity="x"),
            ValueError,
            "similarity: expected one of",
        ),
        (
            lambda: losses.contrastive_loss(X, X, 1.0, ids=IDS, memory="all"),
            ValueError,
            "memory: expected one of 'auto'",
        ),
        (
            lambda: losses.contrastive_loss(X, X, 1.0, ids=IDS, memory=-1),
            ValueError,
            "memory: expected an integer >= 0",
        ),
        (
            lambda: losses.contrastive_loss(X, X, 1.0, torch.ones(3), ids=IDS),
            ValueError,
            r"logit_bias: expected one element, got shape \(3,\)",
        ),
        (lambda: losses.contrastive_loss(X, X, 1.0, weights=X), ValueError, r"weights: expected shape \(6,\), got"),
        (lambda: losses.contrastive_loss(X, X, 1.0, weights=[1.0] * 6), TypeError, "weights: expected a"),
        (
            lambda: losses.sigmoid_loss(X, X, 1.0, 0.0, ids=IDS, positives="out"),
            ValueError,
            "positives: expected one of",
        ),
        (lambda: losses.sigmoid_loss(X, X[:, :2], 1.0, 0.0, ids=IDS), ValueError, "texts: expected D = 4 as in images"),
        (
            lambda: losses.sigmoid_loss(X, X.double(), 1.0, 0.0, ids=IDS),
            TypeError,
            "texts: expected torch.float32 as in",
        ),
        (lambda: losses.supcon_loss(X, IDS, 1.0, positives="x"), ValueError, "positives: expected one of 'out', 'in'"),
        (lambda: losses.supcon_loss(X, IDS, 1.0, reduction="x"), ValueError, "reduction: expected one of 'mean'"),
        (lambda: losses.supcon_loss(X, IDS[:2], 1.0), ValueError, r"labels: expected shape \(6,\), got \(2,\)"),
        (
            lambda: losses.supcon_loss(X, IDS, True + torch.ones(1, dtype=torch.complex64)),
            TypeError,
            "logit_scale: expected",
        ),
        (
            lambda: losses.mil_nce_loss(X, X[:, None], 1.0, reduction="x"),
            ValueError,
            "reduction: expected one of 'mean'",
        ),
        (
            lambda: losses.mil_nce_loss(X, X[:, None][:, :0], 1.0),
            ValueError,
            r"texts: expected shape \(6, K, 4\), got \(6, 0",
        ),
        (
            lambda: losses.mil_nce_loss(X, X[:, None].double(), 1.0),
            TypeError,
            "texts: expected torch.float32 as in videos",
        ),
        (lambda: losses.gist_loss(X, X, 1.0, X, X, reduction="x"), ValueError, "reduction: expected one of 'mean'"),
        (
            lambda: losses.gist_loss(X, X, 1.0, X, X[:, :2]),
            ValueError,
            "guide_documents: expected D = 4 as in guide_queries",
        ),
        (lambda: losses.gist_loss(X, X, 1.0, X, X, margin=math.inf), ValueError, "margin: expected a finite number"),
        (
            lambda: losses.gist_loss(X, X, 1.0, X, X, negatives=X, guide_negatives=X[:2]),
            ValueError,
            "guide_negatives: expected 6 rows as in negatives",
        ),
        (
            lambda: losses.gist_loss(X, X, 1.0, X, X, negatives=X, guide_negatives=X[:, :2]),
            ValueError,
            "guide_negatives: expected D = 4 as in guide_queries",
        ),
        (lambda: losses.ntxent_loss(X, X[:3], 1.0), ValueError, "documents: expected 6 rows as in queries"),
        (
            lambda: losses.Matryoshka(losses.info_nce_loss, (0,)),
            ValueError,
            "dims: expected an integer >= 1, got 0",
        ),
        (
            lambda: losses.Matryoshka(losses.info_nce_loss, (2,), count=0),
            ValueError,
            "count: expected an integer >= 1, got 0",
        ),
        (
            lambda: losses.info_nce_loss(X, X, 1.0, group="x"),
            RuntimeError,
            "group: torch.distributed is not initialised",
        ),
        (lambda: losses.Matryoshka(losses.info_nce_loss, ()), ValueError, "dims: expected at least one width"),
        (
            lambda: losses.Matryoshka(losses.info_nce_loss, (5,))(X, X, 1.0),
            ValueError,
            "dims: expected at most the embed",
        ),
        (
            lambda: losses.Matryoshka(losses.info_nce_loss, (2,), (1, 2)),
            ValueError,
            "weights: expected 1, one for each",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
