"""mteb and its image benchmark MIEB: a shift or a projection behind any of their models."""

import os
from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.gap import transforms
from gapkern.gap.projection import Projection

__all__ = ["MovedEncoder"]

_MODALITIES = ("image", "text")


class MovedEncoder:
    """An mteb encoder whose embeddings a `MeanShift` or a `Projection` moves before they are scored.

    Rows of the modality that is the gallery go through `transform`, those of the other through `transform_queries`, in
    both directions of retrieval. Scores are by the metric that the transform is for: minus the squared distance for a
    shift, which the inner product does not see; a projection's own metric for a projection. mteb's zero-shot
    classification of images scores by cosine whatever the model says, and takes projections for "ip" and "cosine" only.

    Args:
        model: any encoder of mteb, such as `mteb.get_model(name)` gives.
        transform: fitted on embeddings of that model, or the file of one.
        gallery: "text" or "image": the modality that it was fitted to as the gallery.
        normalize: L2-normalise embeddings before they are moved, as `gapkern embed` does.
        cache: a folder in which mteb keeps the model's own embeddings by their inputs, so that other transforms and
            later runs find them; None for none.

    Raises:
        TypeError: no encoder, or no transform.
        ValueError: the transform is not fitted.
        ImportError: mteb is not installed.

    Example:
        mteb.evaluate(MovedEncoder(mteb.get_model(name), "projection.safetensors", cache="cache"), tasks)
    """

    def __init__(
        self,
        model: Any,
        transform: transforms.Transform | str | os.PathLike[str],
        *,
        gallery: str = "text",
        normalize: bool = True,
        cache: str | os.PathLike[str] | None = None,
    ):
        mteb = _check.extra("mteb", "mteb", "mteb")
        if not callable(getattr(model, "encode", None)) or not hasattr(model, "mteb_model_meta"):
            raise TypeError(f"model: expected an encoder of mteb, got {type(model).__name__}")
        if isinstance(transform, str | os.PathLike):
            transform = transforms.load(transform)
        checked = transforms.check("transform", transform)
        if checked is None:
            raise TypeError("transform: expected a MeanShift or a Projection, got None")
        self.transform = checked
        self.gallery = _check.choice("gallery", gallery, _MODALITIES)
        self.normalize = bool(normalize)
        self.metric = str(checked.metric) if isinstance(checked, Projection) else "l2"
        if cache is not None:
            model = mteb.models.CachedEmbeddingWrapper(model, os.fspath(cache))
        self.model = model

    @property
    def mteb_model_meta(self) -> Any:
        """The model's own, with what moves it among `experiment_kwargs`: results are kept apart from the model's."""
        meta = self.model.mteb_model_meta
        facts = transforms.facts(self.transform)
        what = f"{facts['name']}-{facts.get('shift') or facts.get('projection')}-{facts.get('alpha', self.metric)}"
        told = {**(meta.experiment_kwargs or {}), "gapkern": f"{what}-{self.gallery}"}
        names = {"l2": "euclidean", "ip": "dot", "cosine": "cosine"}
        return meta.model_copy(
            update={"experiment_kwargs": told, "similarity_fn_name": type(meta.similarity_fn_name)(names[self.metric])}
            if meta.similarity_fn_name is not None
            else {"experiment_kwargs": told}
        )

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **options: Any) -> Tensor:
        """(N, D) float32 embeddings of the inputs, moved as their modality is.

        Raises:
            ValueError: inputs of neither text nor image, or of both at once; a task whose scores the transform is not
                for; embeddings of another width.
        """
        cosine = task_metadata.type == "ZeroShotClassification" and "image" in task_metadata.modalities
        if cosine and self.metric == "l2":
            raise ValueError(
                "transform: expected a projection for 'ip' or 'cosine' in mteb's zero-shot classification of images, "
                "which scores by cosine, got one for 'l2'"
            )
        side = self._modality(inputs, task_metadata, prompt_type)
        found = self.model.encode(inputs, task_metadata=task_metadata, prompt_type=prompt_type, **options)
        rows = torch.as_tensor(found).float()
        if self.normalize:
            rows = torch.nn.functional.normalize(rows, dim=1)
        moved: Tensor = (
            self.transform.transform(rows) if side == self.gallery else self.transform.transform_queries(rows)
        )
        return moved

    def _modality(self, inputs: Any, task_metadata: Any, prompt_type: Any) -> str:
        columns = getattr(getattr(inputs, "dataset", None), "column_names", None)
        if columns is None:
            columns = task_metadata.get_modalities(prompt_type)
        found = [kind for kind in _MODALITIES if kind in columns]
        if len(found) != 1:
            raise ValueError(f"inputs: expected texts or images, got columns {', '.join(map(str, columns))}")
        return found[0]

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """(N, M): the larger, the nearer by the transform's metric."""
        x, y = self._rows(embeddings1), self._rows(embeddings2)
        if self.metric == "l2":
            return -torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        return x @ y.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """(N,): of each row and its partner."""
        x, y = self._rows(embeddings1), self._rows(embeddings2)
        return -(x - y).square().sum(1) if self.metric == "l2" else (x * y).sum(1)

    def _rows(self, embeddings: Any) -> Tensor:
        x = torch.as_tensor(embeddings).float()
        x = x[None] if x.dim() == 1 else x
        return torch.nn.functional.normalize(x, dim=1) if self.metric == "cosine" else x
