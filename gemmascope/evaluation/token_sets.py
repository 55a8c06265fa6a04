"""Which tokens of a text a figure is of, and whose document each is.

    text      neither BOS nor EOS nor PAD: the tokens that Gemma Scope counts (arXiv 2408.05147 §3.4)
    inliers   those of them whose activation at the site is no outlier
    every     special tokens too, but no padding

The same sets say where a reconstruction takes the place of the activation. What the model predicts is scored between
tokens of the text alone, whichever set it is.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..activations.outliers import norms_of
from ..sites import special_token_ids
from ..sites.tokens import isin

SETS = ("text", "inliers", "every")


@dataclass(frozen=True, eq=False)
class MarkedText:
    """Rows of tokens, and of each token the document that it is of.

    tokens, documents: int64 [rows, context], the documents numbered from 0, −1 at padding; is_text: bool of that shape.
    """

    tokens: Tensor
    documents: Tensor
    is_text: Tensor

    @classmethod
    def of(cls, model: nn.Module, tokens: Tensor, documents: Tensor) -> "MarkedText":
        """Of ``documents`` as `TokenRows.documents_of` has them, −1 at every special token: one is of the document that
        follows it in its row, and padding where none does.

        Raises ValueError for documents of another shape.
        """
        if documents.shape != tokens.shape:
            raise ValueError(f"documents: expected shape {list(tokens.shape)}, got {list(documents.shape)}")
        context = tokens.shape[1]
        columns = torch.arange(context, dtype=torch.int64, device=documents.device)
        here = torch.where(documents >= 0, columns, context)
        following = here.flip(1).cummin(1).values.flip(1)
        filled = torch.cat([documents, torch.full_like(documents[:, :1], -1)], 1)
        owners = filled.gather(1, following)
        return cls(tokens, owners, (owners >= 0) & ~isin(tokens, special_token_ids(model)))

    @property
    def is_scored(self) -> Tensor:
        """Where the next token is a prediction that counts: bool [rows, context − 1]."""
        return self.is_text[:, :-1] & self.is_text[:, 1:]

    def owned_by(self, owners: Tensor) -> "MarkedText":
        """The same text, of which sums are made for ``owners`` in the place of documents: numbers from 0 [rows,
        context], of which those of padding do not count. Raises ValueError for another shape and numbers below 0."""
        if owners.shape != self.tokens.shape:
            raise ValueError(f"owners: expected shape {list(self.tokens.shape)}, got {list(owners.shape)}")
        present = self.documents >= 0
        if (owners[present] < 0).any():
            raise ValueError(f"owners: expected numbers from 0, got {int(owners[present].min())}")
        return replace(self, documents=torch.where(present, owners, -1))

    def rows(self, rows: slice) -> "MarkedText":
        return MarkedText(self.tokens[rows], self.documents[rows], self.is_text[rows])

    def masks(self, activations: Tensor, max_norm: float) -> dict[str, Tensor]:
        """The sets, bool [rows, context] on the CPU, where outliers are those of the activations [rows, context, width]
        whose norm is above ``max_norm``."""
        norms = norms_of(activations.flatten(0, 1)).view(activations.shape[:2])
        inlier = ~(norms > max_norm).cpu()
        return {"text": self.is_text, "inliers": self.is_text & inlier, "every": self.documents >= 0}
