"""Models of transformers and sentence-transformers with few seeded weights, as folders; nothing is downloaded."""

import string
import tempfile
from pathlib import Path

import torch

SIZE, CONTEXT = 16, 12
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**VISION, "max_position_embeddings": CONTEXT}


def clip_tokenizer(context: int = CONTEXT):
    """CLIP's tokenizer with a token for each character."""
    from transformers import CLIPTokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    names = ["<|startoftext|>", "<|endoftext|>", *characters, *(c + "</w>" for c in characters)]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=context)


def piece_tokenizer(context: int = CONTEXT):
    """SigLIP's tokenizer, of a vocabulary of pieces learned here."""
    import io

    import sentencepiece
    from transformers import SiglipTokenizer

    learned = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([string.ascii_lowercase, string.digits, "a picture of the number"] * 4),
        model_writer=learned,
        vocab_size=60,
        model_type="char",
        hard_vocab_limit=False,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=0,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spiece.model").write_bytes(learned.getvalue())
        return SiglipTokenizer(f"{folder}/spiece.model", model_max_length=context, additional_special_tokens=[])


def gemma_tokenizer(context: int = 64):
    """SigLIP 2's tokenizer with a token for each character."""
    from transformers import Siglip2Tokenizer

    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase, *string.digits]
    return Siglip2Tokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=context)


def word_tokenizer(context: int = 64):
    """BERT's tokenizer with a token for each character."""
    from transformers import BertTokenizer

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = string.ascii_lowercase + string.digits
    names = [*marks, *characters, *("##" + c for c in characters)]
    return BertTokenizer(vocab={name: i for i, name in enumerate(names)}, model_max_length=context)


def _saved(folder: Path, config, processor) -> Path:
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPProcessor

    tokenizer = clip_tokenizer()
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    config = CLIPConfig(
        text_config={**TEXT, **marks}, vision_config={**VISION, "image_size": SIZE, "patch_size": 8}, projection_dim=16
    )
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return _saved(folder, config, CLIPProcessor(images, tokenizer))


def siglip(folder: Path) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipProcessor

    tokenizer = piece_tokenizer()
    marks = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "vocab_size": len(tokenizer)}
    config = SiglipConfig(
        text_config={**TEXT, **marks, "projection_size": 16},
        vision_config={**VISION, "image_size": SIZE, "patch_size": 8},
    )
    images = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    return _saved(folder, config, SiglipProcessor(images, tokenizer))


def siglip2(folder: Path) -> Path:
    """Whose images are patches, a mask and a shape."""
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Processor

    tokenizer = gemma_tokenizer()
    marks = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "vocab_size": len(tokenizer)}
    config = Siglip2Config(
        text_config={**TEXT, **marks, "max_position_embeddings": 64, "projection_size": 16},
        vision_config={**VISION, "num_patches": 16, "patch_size": 16},
    )
    return _saved(folder, config, Siglip2Processor(Siglip2ImageProcessor(), tokenizer))


def align(folder: Path) -> Path:
    from transformers import AlignConfig, AlignProcessor, EfficientNetImageProcessor

    tokenizer = word_tokenizer()
    config = AlignConfig(
        text_config={**TEXT, "max_position_embeddings": 64, "vocab_size": len(tokenizer)},
        vision_config={
            "image_size": 32,
            "width_coefficient": 0.1,
            "depth_coefficient": 0.1,
            "hidden_dim": 16,
            "in_channels": [8, 8],
            "out_channels": [8, 16],
            "kernel_sizes": [3, 3],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 2],
            "depthwise_padding": [],
        },
        projection_dim=8,
    )
    images = EfficientNetImageProcessor(
        size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}, include_top=False
    )
    return _saved(folder, config, AlignProcessor(images, tokenizer))


def sentences(folder: Path) -> Path:
    """A model of texts alone, with a prompt before each, 16 tokens and 8 of its 16 dimensions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    tokenizer = word_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(**TEXT | {"max_position_embeddings": 64}, vocab_size=len(tokenizer))).save_pretrained(
            folder / "bert"
        )
    tokenizer.save_pretrained(folder / "bert")
    body = Transformer(str(folder / "bert"), max_seq_length=16)
    model = SentenceTransformer(
        modules=[body, Pooling(16), Normalize()],
        device="cpu",
        prompts={"query": "q "},
        default_prompt_name="query",
        truncate_dim=8,
    )
    model.save(str(folder / "model"))
    return folder / "model"


def clip_sentences(folder: Path) -> Path:
    """A CLIP as sentence-transformers has it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    SentenceTransformer(modules=[Transformer(str(clip(folder / "clip")))], device="cpu").save(str(folder / "model"))
    return folder / "model"
