"""A byte-level tokenizer of some 330 tokens, trained on the spot."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "What colour is the circle? It is red.",
    "How many shapes are there? There are three blue triangles in the picture.",
    "User: Assistant: yes no <think> hidden thoughts </think> [INST] system",
]


def make_tokenizer(template=None, *, bos="<s>", eos="</s>", extra=(), **options):
    """With a chat template, start and end tokens of one's choice, and further special tokens ``extra``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[t for t in ("<pad>", bos, eos, *extra) if t],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=list(extra),
        **options,
    )
    fast.chat_template = template
    return fast
