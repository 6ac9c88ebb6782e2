"""Write the tokenizer of configs/study/tokenizers.yaml: pieces of words, trained on the demo's questions and answers.

    python benchmarks/word_pieces.py runs/demo/data

Writes it to the folder ``pieces`` beside the data. It has the chat template of the demo's teacher, which writes whole
words.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEACHER = "configs/demo/teacher"
#: Lines of train.jsonl that the runs read.
ROWS = 4000
VOCABULARY = 330
SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>"]


def main(data: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(data), trainer)
    pieces = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens={"user_token": "<user>", "assistant_token": "<assistant>"},
        chat_template=AutoTokenizer.from_pretrained(TEACHER, trust_remote_code=False).chat_template,
    )
    pieces.save_pretrained(data / "pieces")


def texts(data: Path) -> list[str]:
    """Return the questions and answers that are trained on."""
    found = []
    for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]:
        question, answer = json.loads(line)["conversations"]
        found += [question["value"].removeprefix("<image>"), answer["value"]]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
