"""`gapkern index repair`: what projecting the queries buys in an index that exists, and the projection that buys it."""

import argparse
from pathlib import Path
from typing import Any

from gapkern import files
from gapkern.cli import common, moves


def parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    made = kind(
        prog="gapkern index repair",
        description="Fits a projection to half of QUERIES, searches for the others in an existing index as they are "
        "and projected, and compares both with an exact search. Where it is worth it, writes the projection, by which "
        "'gapkern project apply' and 'gapkern search --project' move queries; 'search' takes FAISS's file as it is. "
        "The index is only read. Graphs and inverted lists of uncompressed rows cannot gain; that is an answer, with "
        "numbers.",
    )
    made.add_argument(
        "existing",
        help="FAISS's file of an index (flat, IVF, PQ, SQ, RaBitQ, HNSW; L2 or inner product), a folder with one, as "
        "autofaiss and clip-retrieval write them, or one from 'gapkern index'",
    )
    made.add_argument("--queries", required=True, help="embeddings that ask, (Q, D): half to fit to, half to measure")
    made.add_argument(
        "--embeddings",
        help="what was indexed, (G, D), in the order of the ids: a file or a folder "
        "(default: those in embeddings, img_emb or text_emb beside the index, if they are what its codes stand for; or "
        "what the index decodes to)",
    )
    made.add_argument("--out", help="the projection, as a .safetensors file; not written where nothing is gained")
    made.add_argument(
        "--components",
        type=moves.components,
        default="auto",
        help="exact, auto, a number, or a share of the variance (default: %(default)s)",
    )
    made.add_argument(
        "--agreement",
        type=float,
        default=0.99,
        help="share of neighbours that --components auto keeps (default: %(default)s)",
    )
    made.add_argument("--k", type=int, default=10, help="neighbours that are compared (default: %(default)s)")
    made.add_argument("--parameters", metavar="TEXT", help="FAISS search parameters, such as nprobe=16")
    common.add_json(made)
    made.set_defaults(run=run)
    return made


def run(arguments: argparse.Namespace) -> int:
    from gapkern.retrieval import repair

    if arguments.out:
        moves.transforms_file(arguments.out)
    inputs = _inputs(arguments)
    paths = {"queries": arguments.queries}
    if arguments.embeddings:
        paths["embeddings"] = arguments.embeddings
    model, _ = common.model(None, **paths)
    found, projection = repair(
        arguments.existing,
        files.load_embeddings(arguments.queries, name="queries"),
        embeddings=arguments.embeddings,
        n_components=arguments.components,
        agreement=arguments.agreement,
        k=arguments.k,
        parameters=arguments.parameters,
        model=model,
    )
    written = arguments.out if found.worth and arguments.out else None
    if written:
        projection.save(written, made_from=inputs)
    if arguments.json:
        common.print_json({"inputs": inputs, **found.to_dict(), "out": written})
        return 0
    columns = ["queries", "first neighbour kept", f"recall@{found.k}"]
    before, after = (
        ["as they are", found.agreement_before, found.recall_before],
        ["projected", found.agreement_after, found.recall_after],
    )
    if found.certified_before is not None:
        columns, before, after = (
            [*columns, "certified"],
            [*before, found.certified_before],
            [*after, found.certified_after],
        )
    common.table(columns, [before, after])
    print(f"{found.index}, {found.metric}, {found.vectors} x {found.dims}, {found.held_out} held-out queries")
    print(f"k = {found.components} components, with which an exact search keeps {found.kept:.1%} of first neighbours")
    if found.certified_before is not None:
        print("certified: no code with errors of these sizes can change the first neighbour")
    if found.rows == "codes":
        print(
            "the index has codes alone, and is compared with what they decode to: give --embeddings to see what they "
            "lost and what projecting brings back"
        )
    if not found.worth:
        print(f"nothing to gain: recall@{found.k} changes by {found.gain:+.4f} ± {found.error:.4f}")
    elif written:
        print(f"projection: {written}")
    else:
        print("worth it: --out FILE writes the projection")
    return 0


def _inputs(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures are made from: the hash of FAISS's file, or of our index's manifest, and those of embeddings."""
    from gapkern.embeddings import provenance
    from gapkern.retrieval import foreign
    from gapkern.retrieval.store import MANIFEST

    ours = foreign.is_ours(arguments.existing)
    index = Path(arguments.existing) / MANIFEST if ours else foreign.located(arguments.existing)
    inputs = {"existing": {"sha256": files.digest(index)}}
    return inputs | {
        name: provenance.made_from(getattr(arguments, name), name=name)
        for name in ("queries", "embeddings")
        if getattr(arguments, name)
    }
