"""open_clip's own trainer with gapkern's losses; the arguments are the trainer's own.

python examples/open_clip_trainer.py --model ViT-B-32 --train-data pairs.tsv \
    --csv-img-key image --csv-caption-key caption --batch-size 1024 --local-loss --gather-with-grad
"""

import sys

from open_clip_train.main import main

from gapkern import patch_open_clip

if __name__ == "__main__":
    with patch_open_clip():  # create_loss gives gapkern's ClipLoss, SigLipLoss, CoCaLoss or DistillClipLoss
        main(sys.argv[1:])
