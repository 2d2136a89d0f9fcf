"""Embedding files with the command line of each task, and ranks that evaluate them."""

import json
import os
import socket

import numpy as np
import pytest
import torch


def run(capsys, *arguments):
    """A command line's status, that of argparse too, and what it printed to stdout and stderr."""
    from gapkern.cli import main

    try:
        status = main([str(a) for a in arguments])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def port():
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more):
    """Of one rank: where they meet, and one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), **more}


@pytest.fixture
def files_of_all_tasks(tmp_path):
    """Embedding files, and the command line of each task."""
    from tests.scenes import draw, scene

    images, labels, prompts = scene()
    np.save(tmp_path / "images.npy", images.numpy())
    np.save(tmp_path / "prompts.npy", prompts.numpy())
    np.save(tmp_path / "labels.npy", labels.numpy())
    # Twice the same: equally near rows that come to lie on different ranks.
    captions = torch.cat([images + draw(90, 24, seed=8), images + draw(90, 24, seed=8)])
    np.save(tmp_path / "captions.npy", captions.numpy())
    np.save(tmp_path / "image_of.npy", torch.arange(90).repeat(2).numpy())
    choices = images.repeat_interleave(3, 0) + 3 * draw(270, 24, seed=9)
    np.save(tmp_path / "choices.npy", choices.numpy())
    questions = [
        {"image_id": i, "question": "?", "choices": list("abc"), "correct_choice_idx": i % 3} for i in range(90)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    common = [
        "--images",
        "images.npy",
        "--shift",
        "auto",
        "--gaussian",
        ".1",
        "--quantize",
        "16",
        "--seeds",
        "0",
        "1",
        "--recall_k",
        "1",
        "5",
        "--device",
        "cpu",
    ]
    return [
        [*common, "--texts", "prompts.npy", "--labels", "labels.npy", "--task", "zeroshot_classification"],
        [*common, "--texts", "prompts.npy", "--labels", "labels.npy", "--task", "template_robustness"],
        [*common, "--texts", "captions.npy", "--labels", "image_of.npy", "--task", "zeroshot_retrieval"],
        [*common, "--texts", "choices.npy", "--annotation_file", "questions.json", "--task", "multiple_choice"],
    ]
