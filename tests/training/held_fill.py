"""A rank that fills a cache and, with its first entry on the disk, says so and goes on when a line comes in."""

from vlm_distill import train
from vlm_distill.caching.record_files import RecordWriter
from vlm_distill.runtime.launch import leave


def append(self, data, *, real=RecordWriter.append, **fields):
    real(self, data, **fields)
    if self._offset == len(data):
        self.flush()
        print("filling", flush=True)
        input()


if __name__ == "__main__":
    RecordWriter.append = append
    leave(train.main(trainer="vlm_distill.caching.fill", work="fill"))
