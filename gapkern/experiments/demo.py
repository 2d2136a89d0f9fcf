"""The paper's effect on real data: train on handwritten digits, measure the gap, close it, see robustness rise."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check, datasets, files
from gapkern._lock import locked
from gapkern.experiments import demo_report, digits, environment, figures, three
from gapkern.experiments import report as pages
from gapkern.gap import MeanShift, Projection, gap_metrics
from gapkern.perturb import Gaussian, Perturbation, Quantize, Replace
from gapkern.robustness import SweepResult, robustness, sweep

ALPHAS = tuple(i / 8 for i in range(13))
PER_COORDINATE = (0.0005, 0.001, 0.002)
THREE = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.004)  # per coordinate, over which three lines are drawn
TOTAL = (0.005, 0.022, 0.040)  # the paper's
BINS = (32, 64, 128, 256)  # the paper's
COARSE = (8, 16)

Progress = Callable[..., None]


def run(
    out: str | Path,
    *,
    seed: int = 0,
    steps: int = 300,
    export: bool = False,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Trains, embeds, measures, sweeps, and writes the report into the folder `out`.

    Args:
        out: folder, made where absent. Written: embeddings.safetensors, shift.safetensors, projection.safetensors, PNG
            figures, report.json and report.html.
        seed: of the data's split, the weights and the batches; all numbers but times repeat for a seed.
        steps: training steps.
        export: also write the model, the test images and their words, for `gapkern embed`: see `digits.export`.
        on_progress: called with a stage, how much of it is done, of how much, and of a training step with its loss as
            a fourth argument, text.

    Returns:
        What report.json holds.

    Raises:
        ValueError: an argument out of range, or a folder that cannot be written.
        ImportError: the extra `demo` is not installed.
    """
    seed = _check.integer("seed", seed, low=0, high=2**63 - 1)
    steps = _check.integer("steps", steps, low=1)
    with locked(out) as folder:
        return _run(folder, seed, steps, export, on_progress)


def _run(folder: Path, seed: int, steps: int, export: bool, on_progress: Progress) -> dict[str, Any]:
    started = time.perf_counter()
    data = datasets.scans(seed)
    trained = digits.train(
        data,
        seed=seed,
        steps=steps,
        on_step=lambda entry: on_progress("train", entry["step"] + 1, steps, f"loss {entry['loss']:.3g}"),
    )
    trained_after = time.perf_counter() - started
    if export:
        digits.export(trained, data, folder, seed)

    templates = digits.TEMPLATES + digits.UNSEEN_TEMPLATES
    images = digits.embed_images(trained, data.test_images)
    prompts = digits.embed_prompts(trained, templates)
    labels = data.test_digits
    _save(folder / "embeddings.safetensors", images=images, prompts=prompts, labels=labels)

    gallery = prompts[0]
    shift = MeanShift(n_components="exact").fit(gallery, images)
    shift.save(folder / "shift.safetensors")
    captions = _paired_captions(prompts, labels, seed)
    metrics = gap_metrics(images, captions, logit_scale=float(trained.model.logit_scale.exp()))

    noise = [Gaussian(v, "per_coordinate") for v in PER_COORDINATE] + [Gaussian(v) for v in TOTAL]
    cells = [Quantize(b, r) for r in ("per_dimension", "global") for b in BINS]
    result = _sweep(images, gallery, labels, shift, [*noise, *cells], on_progress)
    clean = robustness(images, gallery, Gaussian(0.0), labels=labels)
    template_rows = _templates(images, prompts, templates, labels, shift)
    projection = Projection("exact").fit(gallery, images)
    projection.save(folder / "projection.safetensors")
    curve = [Gaussian(v, "per_coordinate") for v in THREE]
    compared = [*curve, *(Gaussian(v) for v in TOTAL), *(Quantize(b, "global") for b in (*COARSE, *BINS))]
    moves = three.measured(images, gallery, labels, compared, shift=shift, projection=projection)

    drawings = _figures(images, gallery, labels, shift, trained.history, result, template_rows)
    drawings["projection"] = partial(figures.over_noise, *_lines(moves), clean=clean.clean_accuracy)
    # The file and the page's wide image are one: a figure takes as long as a training step.
    drawn = {name: (pages.png(draw(), dpi=150), pages.png(draw(tall=True))) for name, draw in drawings.items()}
    for name, (wide, _) in drawn.items():
        files.write(folder / f"{name}.png", partial(_put, wide))
    report = {
        "dataset": "digits",
        "model": "open_clip CLIP (D = 128)",
        "settings": {"seed": seed, "steps": steps, "batch": digits.BATCH, "logit_scale": 100.0},
        "clean_accuracy": clean.clean_accuracy,
        "gap_norm": float(shift.gap_vector_.norm()),
        "orthogonality": shift.orthogonality_,
        "components": shift.n_components_,
        "metrics": metrics,
        "sweep": result.rows,
        "best_alpha": result.best(),
        "templates": template_rows,
        "offsets": _offsets(images, shift, projection),
        "projection": moves,
        "training": trained.history,
        "env": environment.describe(),
        "seconds": {"training": trained_after, "all": time.perf_counter() - started},
    }
    files.write_json(folder / "report.json", report)
    page = demo_report.render(report, drawn)
    files.write(folder / "report.html", lambda path: path.write_text(page, encoding="utf-8"))
    return report


def _put(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _save(path: Path, **tensors: Tensor) -> None:
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    files.write(path, lambda temporary: save_file(contiguous, temporary))


def _paired_captions(prompts: Tensor, labels: Tensor, seed: int) -> Tensor:
    """(N, D): for each image the embedding of a caption of its digit, in a training template drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(digits.TEMPLATES), labels.shape, generator=generator)
    return prompts[drawn, labels]


def _sweep(
    images: Tensor,
    gallery: Tensor,
    labels: Tensor,
    shift: MeanShift,
    perturbations: list[Perturbation],
    on_progress: Progress,
) -> SweepResult:
    rows = []
    for done, alpha in enumerate(ALPHAS):
        rows += sweep(images, gallery, [alpha], perturbations, labels, shift=shift).rows
        on_progress("sweep", done + 1, len(ALPHAS))
    return SweepResult(rows, shift)


def _templates(
    images: Tensor, prompts: Tensor, templates: tuple[str, ...], labels: Tensor, shift: MeanShift
) -> list[dict[str, Any]]:
    """Figure 1, right: accuracy when other words stand for the same classes; the shift stays that of the first."""
    rows = []
    for i, template in enumerate(templates):
        row: dict[str, Any] = {"template": template, "seen": i < len(digits.TEMPLATES)}
        for key, alpha in (("open", 0.0), ("closed", 1.0)):
            result = robustness(images, prompts[0], Replace(prompts[i]), labels=labels, shift=shift.at(alpha))
            row[key] = result.accuracy
            row[f"{key}_robustness"] = result.robustness
        rows.append(row)
    return rows


def _offsets(images: Tensor, shift: MeanShift, projection: Projection) -> dict[str, float]:
    """Mean distance of the images to the prompts' hull: as they are, moved by the shift, and projected."""

    def outside(x: Tensor) -> float:
        return float((x.double() - projection.transform_queries(x.double())).norm(dim=1).mean())

    return {
        three.NONE: outside(images),
        three.SHIFT: outside(images - shift.shift_vector_.to(images.dtype)),
        three.PROJECTION: outside(projection.transform_queries(images)),
    }


def _lines(moves: list[dict[str, Any]]) -> tuple[Any, Any]:
    drawn = [row for row in moves if row["scale"] == "per_coordinate"]
    return three.lines(drawn, "robustness"), three.lines(drawn, "accuracy")


def _subset(result: SweepResult, **wanted: Any) -> SweepResult:
    rows = [row for row in result.rows if all(row[key] == value for key, value in wanted.items())]
    return SweepResult(rows, result.shift)


def _figures(
    images: Tensor,
    gallery: Tensor,
    labels: Tensor,
    shift: MeanShift,
    history: list[dict[str, float]],
    result: SweepResult,
    template_rows: list[dict[str, Any]],
) -> dict[str, Callable[..., Any]]:
    """By name, functions that draw with tall=False or, for narrow screens, tall=True."""
    points = images.numpy(), gallery.numpy(), shift.shift_vector_.numpy(), labels.numpy(), "0123456789"
    noise = {scale: _subset(result, perturbation="gaussian", scale=scale) for scale in ("per_coordinate", "total")}
    return {
        "pca": partial(figures.modalities, *points),
        "training": partial(figures.training, history),
        "robustness": partial(figures.robustness_and_accuracy, noise["per_coordinate"]),
        "robustness_total": partial(figures.robustness_and_accuracy, noise["total"]),
        "quantize": partial(figures.robustness_and_accuracy, _subset(result, perturbation="quantize", range="global")),
        "templates": partial(figures.templates, template_rows),
    }
