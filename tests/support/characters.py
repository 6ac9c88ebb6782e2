"""A tiny processor: one token a character."""

import torch

from data.batch import Encoded, ModelInputs, Processor
from data.errors import BadSample

USER, ASSISTANT, IMAGE, END = 1, 2, 3, 4


class CharacterProcessor(Processor):
    """One token a character, a mark before each message, end tokens after each answer, some tokens an image."""

    def __init__(self, *, ends=(END,), image_tokens=2, has_vision=True, system=0, spell=ord):
        self.ends = list(ends)
        self.tokens_an_image = image_tokens
        self.has_vision = has_vision
        self.system = system
        self.spell = spell
        self.takes_videos = self.one_row = False

    def encode(self, conversation, images):
        if images and not self.has_vision:
            raise BadSample("images for a text model")
        tokens = [(9, False, False)] * self.system
        places = []
        for message in conversation.messages:
            answer = message["role"] == "assistant"
            tokens.append((ASSISTANT if answer else USER, False, False))
            for part in message["content"]:
                if part["type"] == "image":
                    tokens += [(IMAGE, False, False)] * self.tokens_an_image
                else:
                    tokens += [(self.spell(c), answer, False) for c in part["text"]]
            if answer:
                tokens += [(end, True, True) for end in self.ends]
                number = 2 * sum(place[1] == 0 for place in places) + 1
                length = sum(len(part["text"]) for part in message["content"]) + len(self.ends)
                places += [(number, i, i + 1) for i in range(length)]
        ids, supervised, ends = zip(*tokens, strict=True)
        pixels = [torch.tensor([float(sum(image.getpixel((0, 0))))]) for image in images]
        return Encoded(
            torch.tensor(ids),
            torch.tensor(supervised),
            torch.tensor(ends),
            images=len(images),
            tensors={"pixel_values": torch.stack(pixels)} if pixels else {},
            spans=torch.tensor(places).reshape(-1, 3),
        )

    def dummy(self):
        nothing = torch.zeros(2, dtype=torch.bool)
        tensors = {"pixel_values": torch.zeros(1, 1)} if self.has_vision else {}
        return Encoded(torch.tensor([IMAGE, IMAGE]), nothing, nothing, images=int(self.has_vision), tensors=tensors)

    def image_tokens(self, sample):
        return sample.input_ids == IMAGE

    def join(self, samples):
        tensors = {"position_ids": torch.cat([torch.arange(len(s.input_ids)) for s in samples])}
        pixels = [s.tensors["pixel_values"] for s in samples if "pixel_values" in s.tensors]
        if pixels:
            tensors["pixel_values"] = torch.cat(pixels)
        parts = [torch.cat([getattr(s, name) for s in samples]) for name in ("input_ids", "supervised", "ends")]
        return Encoded(*parts, sum(s.images for s in samples), tensors)

    def collate(self, samples):
        longest = max(len(s.input_ids) for s in samples)
        ids = torch.zeros(len(samples), longest, dtype=torch.int64)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample.input_ids)] = sample.input_ids
        inputs = ModelInputs(input_ids=ids)
        pixels = [s.tensors["pixel_values"] for s in samples if "pixel_values" in s.tensors]
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels)
        return inputs
