"""The demo's page: what was done, what came out, how to do it on one's own embeddings."""

from typing import Any

from gapkern.experiments import report as html
from gapkern.experiments.three import NONE, PROJECTION, SHIFT
from gapkern.perturb import title


def at(report: dict[str, Any], alpha: float, **wanted: Any) -> dict[str, Any]:
    """The sweep's row for an alpha and a perturbation."""
    return next(
        row
        for row in report["sweep"]
        if row["alpha"] == alpha and all(row.get(key) == value for key, value in wanted.items())
    )


def moved(report: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The rows of a perturbation as the embeddings are, shifted, and projected."""
    return [row for row in report["projection"] if all(row.get(key) == value for key, value in wanted.items())]


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers that carry the message: robustness with the gap and without, and what it costs."""
    noise = {"perturbation": "gaussian", "variance": 0.001, "scale": "per_coordinate"}
    before, after = at(report, 0.0, **noise), at(report, 1.0, **noise)
    return {
        "before": before,
        "after": after,
        "points": 100 * (after["robustness"] - before["robustness"]),
        "best_alpha": report["best_alpha"][title(before)],
        "clean_change": after["clean_accuracy"] - before["clean_accuracy"],
    }


def render(report: dict[str, Any], figures: dict[str, tuple[bytes, bytes]]) -> str:
    """The page as a string of HTML."""
    head = headline(report)
    before, after = head["before"], head["after"]
    verb = "raises" if head["points"] > 0 else "changes"
    lead = (
        f"Closing the modality gap of a small CLIP model {verb} the share of nearest neighbours that survive noise "
        f"from {before['robustness']:.1%} to {after['robustness']:.1%}, while clean accuracy moves by "
        f"{head['clean_change']:+.4f}."
    )
    settings, seconds = report["settings"], report["seconds"]
    return html.page(
        "The modality gap on handwritten digits",
        lead,
        [
            html.numbers(
                [
                    (f"{report['clean_accuracy']:.3f}", "clean accuracy on 597 test images"),
                    (f"{report['gap_norm']:.3f}", "gap norm ‖μ(images) − μ(prompts)‖"),
                    (f"{report['orthogonality']:.2%}", "of the gap is orthogonal to the prompts and can be closed"),
                    (f"{head['points']:+.1f} points", "robustness at per-coordinate variance 0.001"),
                    (f"α = {head['best_alpha']:g}", "where robustness peaks"),
                ]
            ),
            _how(settings),
            html.section(
                "The gap",
                html.picture(
                    *figures["pca"],
                    "Images (dots) and class prompts (stars), one colour per digit, in the "
                    "plane of their two leading principal components, each modality with the same weight. "
                    "Training leaves the two modalities apart; the shift moves the prompts across without "
                    "changing any distance among them.",
                ),
                html.picture(
                    *figures["training"],
                    "Loss and gap norm during training. The loss converges with the gap "
                    "still open: it stops feeling the gap once each modality is constant along it.",
                ),
                html.details(
                    "All gap metrics",
                    html.table(
                        [{"name": k, "value": v} for k, v in report["metrics"].items()],
                        {"name": "metric", "value": "value"},
                    ),
                ),
            ),
            html.section(
                "Closing it",
                html.paragraph(
                    "`gapkern.MeanShift` moves the prompts by α g′, the part of the gap g orthogonal to "
                    "the prompts' affine hull. Robustness is the probability that an image keeps its "
                    "nearest prompt once every prompt has its own Gaussian noise. It is computed as an "
                    "integral, not sampled."
                ),
                html.picture(
                    *figures["robustness"],
                    "Noise of fixed variance per coordinate. Robustness rises until the "
                    "means meet (α = 1) and falls again behind; accuracy under noise follows; clean accuracy "
                    "stays.",
                ),
                html.picture(
                    *figures["robustness_total"], "The variances of the paper, as total energy of the noise vector."
                ),
                _table(report),
            ),
            html.section(
                "Quantisation",
                html.paragraph(
                    "The prompts quantised to a few levels between the smallest and largest value of all "
                    "coordinates. At 32 and more bins little is lost on these ten prompts."
                ),
                html.picture(*figures["quantize"], "Global range. Robustness and accuracy over α."),
            ),
            html.section(
                "Other words for the same classes",
                html.paragraph(_template_sentence(report["templates"])),
                html.picture(
                    *figures["templates"],
                    "Accuracy with another caption template in the place of "
                    f"“{report['templates'][0]['template']}”. The shift is that of the first template.",
                ),
            ),
            html.section(
                "Beyond the paper: projecting the images",
                html.paragraph(_projection_sentence(report)),
                html.picture(
                    *figures["projection"],
                    "Noise on every prompt, by its variance per coordinate: with the gap as trained, with the gap "
                    "closed by the shift, and with each image projected on the prompts' hull. Without noise all three "
                    "find the same prompts.",
                ),
                _projection_table(report),
            ),
            html.section(
                "On your own embeddings",
                html.paragraph(
                    "`gapkern gap images.npy texts.npy` measures the gap; `gapkern robust images.npy "
                    "texts.npy --gaussian 0.005 0.022 0.04` repeats the sweep above; `gapkern shift fit` "
                    "and `gapkern shift apply` close the gap in files, `gapkern project fit` and `gapkern project "
                    "apply` project the queries."
                ),
            ),
        ],
        footer=(
            f"gapkern {report['env']['versions']['gapkern']}, PyTorch {report['env']['versions']['torch']}, "
            f"{report['env']['processor']}, {report['env']['threads']} threads; trained in "
            f"{seconds['training']:.0f} s, all in {seconds['all']:.0f} s. "
            f"`gapkern demo --seed {settings['seed']} --steps {settings['steps']}` "
            "repeats this page. Method: Chowers, Naparstek, Barzelay and Weiss, “Is the Modality Gap a Bug or a "
            "Feature? A Robustness Perspective”, CVPR 2026."
        ),
    )


def _how(settings: dict[str, Any]) -> str:
    return html.paragraph(
        f"1200 of scikit-learn's 1797 real 8×8 scans trained an open_clip model (128 dimensions, two layers each side) "
        f"with `gapkern.ClipLoss` for {settings['steps']} steps of {settings['batch']} pairs, the logit scale fixed at "
        f"{settings['logit_scale']:g}. The other 597 scans are the queries below; ten class prompts are the gallery."
    )


def _table(report: dict[str, Any]) -> str:
    rows = [
        {**row, "name": title(row)}
        for row in report["sweep"]
        if row["alpha"] in (0.0, 0.5, 1.0, 1.5) and row["perturbation"] == "gaussian"
    ]
    rows.sort(key=lambda row: (row["name"], row["alpha"]))
    columns = {
        "name": "perturbation",
        "alpha": "α",
        "robustness": "robustness",
        "agreement": "agreement",
        "accuracy": "accuracy",
        "clean_accuracy": "clean accuracy",
    }
    return html.details("Numbers", html.table(rows, columns))


def _projection_sentence(report: dict[str, Any]) -> str:
    hard = moved(report, perturbation="gaussian", scale="per_coordinate", variance=0.002)
    none, shift, projection = (f"{row['robustness']:.3f}" for row in hard)
    distance = report["offsets"]
    return (
        f"The shift removes what all images have in common: they lie {distance[NONE]:.2f} from the prompts' hull on "
        f"average, and {distance[SHIFT]:.2f} once the gap is closed. `gapkern.Projection` takes each image to the "
        "nearest point of the hull, so that its own distance goes too. No neighbour changes, and the prompts stay as "
        f"they are. At variance 0.002 per coordinate {none} of the neighbours survive with the gap open, {shift} with "
        f"the gap closed, {projection} projected."
    )


def _projection_table(report: dict[str, Any]) -> str:
    names = list(dict.fromkeys(title(row) for row in report["projection"]))
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name}
        for found in (r for r in report["projection"] if title(r) == name):
            row |= {f"{found['moved']} {key}": found[key] for key in ("robustness", "accuracy")}
        rows.append(row)
    columns = {"name": "perturbation"}
    for key in ("robustness", "accuracy"):
        for move, short in ((NONE, "as it is"), (SHIFT, "shift"), (PROJECTION, "projection")):
            columns[f"{move} {key}"] = f"{key}, {short}"
    return html.table(rows, columns)


def _template_sentence(rows: list[dict[str, Any]]) -> str:
    others = rows[1:]
    first = rows[0]["open"]
    change = {key: sum(row[key] for row in others) / len(others) - rows[0][key] for key in ("open", "closed")}
    better = sum(row["closed_robustness"] > row["open_robustness"] for row in others)
    verdict = "helps" if better > len(others) / 2 else "does not help"
    return (
        f"With the template it was measured with, accuracy is {first:.3f}. Other templates change it by "
        f"{change['open']:+.4f} on average with the gap open and by {change['closed']:+.4f} with the gap closed; "
        f"{better} of {len(others)} templates keep more nearest neighbours with the gap closed, so on this model "
        f"closing it {verdict} against rewording."
    )
