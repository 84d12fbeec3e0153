"""Which source is read: so that one who waits for text can say whose."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.windows import TokenReader


class Asked:
    """The source that was asked for tokens last; any thread may look."""

    name = ""

    def noting(self, name: str, source: TokenReader) -> TokenReader:
        """The source under its name, which is noted here whenever it is asked."""
        return _Noting(self, name, source)


class _Noting:
    def __init__(self, asked: Asked, name: str, source: TokenReader) -> None:
        self._asked, self._name, self._source = asked, name, source

    def read(self, shard: int, start: int, stop: int) -> NDArray[Any]:
        """See TokenReader."""
        self._asked.name = self._name
        return self._source.read(shard, start, stop)

    def offsets(self, shard: int) -> NDArray[np.int64]:
        """See TokenReader."""
        self._asked.name = self._name
        return self._source.offsets(shard)
