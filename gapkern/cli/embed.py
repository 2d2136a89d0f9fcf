"""`gapkern embed`: images and texts to a folder of embeddings, and `--verify` of one."""

import argparse
import os
import sys
from typing import Any

from gapkern import _progress
from gapkern.cli import common

SHOWN = 10  # skipped images that are printed


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "embed",
        help="embed images and texts with a model; verify a folder of embeddings",
        description="Embeds images and texts into a folder as clip-retrieval writes it: img_emb, text_emb, metadata "
        "and a manifest with hashes. After an interruption the same command goes on with what is missing. Start it as "
        "`torchrun --nproc_per_node=K -m gapkern embed ...` to use K devices or processes.",
    )
    parser.add_argument(
        "--model",
        help="open_clip's name, local-dir:PATH, hf-hub:ORG/NAME, or a configuration's JSON; "
        "hf:NAME_OR_FOLDER of transformers, st:NAME_OR_FOLDER of sentence-transformers",
    )
    parser.add_argument("--pretrained", help="open_clip's tag, or a local checkpoint")
    parser.add_argument("--images", nargs="+", help="a folder of images or of webdataset tars, or tars")
    parser.add_argument("--texts", help="a file of texts, one per line")
    parser.add_argument(
        "--captions",
        help="captions: COCO's or Karpathy's JSON (of --split), {file: captions}, or "
        ".csv, .tsv; they find their images by name, and image_of.npy says each one's row",
    )
    parser.add_argument(
        "--dataset",
        help="instead of --images: a data set by name, as for 'gapkern eval', such as "
        "cifar10, imagefolder or mscoco_captions (with --annotation_file)",
    )
    parser.add_argument("--root", default=".", help="where the data set lies (default: %(default)s)")
    parser.add_argument("--split", default="test", help="of the data set (default: %(default)s)")
    parser.add_argument("--annotation_file", help="captions of the data set (COCO's JSON)")
    parser.add_argument(
        "--classnames",
        help="class names, JSON or one per line, in any order where the images lie in "
        "folders of these names; a JSON object {folder: name}; of a file of many data sets' "
        "FILE[NAME]: classes.npy is written, their vectors",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at an image that cannot be read; skip leaves it out (default: %(default)s)",
    )
    parser.add_argument("--templates", help="JSON or one per line, with {c} for the class (default: a photo of a {c}.)")
    parser.add_argument("--out", help="the folder of embeddings")
    parser.add_argument("--verify", metavar="DIR", help="embed nothing: read all of DIR, compare it with its manifest")
    parser.add_argument("--batch_size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--shard_rows", type=int, default=16384, help="rows of a file (default: %(default)s)")
    common.add_workers(parser)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: %(default)s")
    parser.add_argument("--raw", action="store_true", help="store embeddings as they come, not L2-normalised")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of products (default: float32 on the CPU, bfloat16 on CUDA)",
    )
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--no_metadata", action="store_true", help="no Parquet files")
    parser.add_argument("--no_resume", action="store_true", help="replace what is there instead of going on")
    parser.add_argument(
        "--timeout",
        type=float,
        default=86400,
        metavar="SECONDS",
        help="that a rank waits for the others (default: %(default)s)",
    )
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from gapkern import embeddings

    if arguments.verify is not None:
        found = embeddings.verify(arguments.verify)
        if arguments.json:
            common.print_json(found)
        else:
            columns = ["rows", "dims", "dtype", "shards", "model", "manifest", "metadata"]
            common.table(["verified", *columns], [[kind, *map(str, facts.values())] for kind, facts in found.items()])
        return 0
    for name in ("model", "out"):
        if getattr(arguments, name) is None:
            raise ValueError(f"{name}: expected --{name}, got none")
    rank = int(os.environ.get("RANK", "0"))
    try:
        with _progress.shown(
            {"img_emb": "embedding images", "text_emb": "embedding texts"}, {"img_emb": "images", "text_emb": "texts"}
        ) as step:
            found = embeddings.embed(
                arguments.model,
                arguments.pretrained,
                **_sources(arguments),
                out=arguments.out,
                batch_size=arguments.batch_size,
                resume=not arguments.no_resume,
                shard_rows=arguments.shard_rows,
                dtype=arguments.dtype,
                normalize=not arguments.raw,
                metadata=not arguments.no_metadata,
                workers=common.workers(arguments),
                on_error=arguments.on_error,
                device=arguments.device,
                precision=arguments.precision,
                timeout=arguments.timeout,
                on_progress=step if rank == 0 else lambda *_: None,
            )
    except embeddings.RankLost as error:
        print(f"gapkern embed: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # The process group waits for the lost rank when it is taken down.
    if rank == 0:
        _show(arguments, found)
    return 0


def _sources(arguments: argparse.Namespace) -> dict[str, Any]:
    from gapkern import datasets, prompts
    from gapkern.embeddings import sources

    if arguments.dataset and arguments.images:
        raise ValueError("images: expected --images or --dataset, got both")
    if arguments.texts and arguments.captions:
        raise ValueError("texts: expected --texts or --captions, got both")
    given: dict[str, Any] = {"images": arguments.images, "texts": arguments.texts}
    if arguments.images and len(arguments.images) == 1:
        given["images"] = arguments.images[0]
    if arguments.captions:
        given["texts"] = sources.captions(arguments.captions, arguments.split)
    if arguments.dataset:
        given["images"], captions = datasets.embeddable(
            arguments.dataset, arguments.root, arguments.split, arguments.annotation_file
        )
        given["texts"] = captions if given["texts"] is None else given["texts"]
    if arguments.templates and not arguments.classnames:
        raise ValueError("templates: expected --classnames beside them, got none")
    if arguments.classnames:
        if given["images"] is not None:
            given["images"] = sources.images(given["images"])
        fits = getattr(given["images"], "fits", lambda names: False)
        given["classnames"] = prompts.load_classnames(arguments.classnames, arguments.dataset or "", fits)
    if arguments.templates:
        given["templates"] = prompts.load_templates(arguments.templates, arguments.dataset or "")
    return given


def _show(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    if arguments.json:
        common.print_json({"out": arguments.out, **found})
        return
    for kind, computed in found["computed"].items():
        facts = found[kind]
        kept = f" ({facts['rows'] - computed} rows were there already)" if computed < facts["rows"] else ""
        print(f"{kind}: {facts['rows']} x {facts['dims']} {facts['dtype']} in {len(facts['shards'])} shards{kept}")
        if facts.get("truncated"):
            print(
                f"{kind}: {facts['truncated']} of {facts['rows']} texts are longer than the {facts['context']} tokens "
                f"that the model reads; their ends were left out"
            )
    for key, reason in list(found.get("skipped", {}).items())[:SHOWN]:
        print(f"skipped: {key}: {reason}")
    if (more := len(found.get("skipped", {})) - SHOWN) > 0:
        print(f"skipped: {more} more, see img_emb/manifest.json")
    if "classes" in found:
        print(f"classes.npy: {found['classes'][0]} x {found['classes'][1]}")
    print(f"{found['model']}: {arguments.out}")
