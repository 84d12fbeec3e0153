"""Records from files: jsonl, JSON arrays, parquet, plain text, Hugging Face datasets, token files.

A source is cut into parts before anything is read; each slice of a part can then be read alone, by any
process. Every reader streams: it never holds more than a chunk and a record, or a batch of rows. The order is
fixed: paths sorted, records as they stand. A record without usable text is given as `Rejected`, never raised;
a file that cannot be read on is a UserError that names it and the place.
"""

from llmtrain.data.readers.cutting import check, fingerprint, parts
from llmtrain.data.readers.formats import resolve_format
from llmtrain.data.readers.reading import read

__all__ = ["check", "fingerprint", "parts", "read", "resolve_format"]
