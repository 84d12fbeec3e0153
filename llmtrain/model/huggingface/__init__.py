"""Weights both ways between a decoder and Hugging Face's directories.

families.py says which architectures there are and what each calls our parameters, keys.py what it calls our
sizes, rows.py how it orders the rows of the fused matrices. reading.py and writing.py stream the files.
"""

from llmtrain.model.huggingface.families import Family, family_of, rounding_there
from llmtrain.model.huggingface.reading import Pretrained
from llmtrain.model.huggingface.writing import write_pretrained

__all__ = ["Family", "Pretrained", "family_of", "rounding_there", "write_pretrained"]
