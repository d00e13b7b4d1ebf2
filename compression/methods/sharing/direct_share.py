"""DirectShare: attention heads that use the weights of an earlier head that is like them."""

from typing import ClassVar, Literal

from transformers import PreTrainedModel

from foldstack.compression.methods.method import Evidence, check_evidence
from foldstack.compression.methods.sharing.head_sharing import HeadSharing
from foldstack.compression.structure.surgery import Cut, plan_of


class DirectShare(HeadSharing):
    """Let attention heads use the four projections of the earlier heads that are most like them.

    DirectShare (Cao et al. 2024, arXiv 2402.11819, and its released code). Of all pairs of a head
    and one in an earlier block, those with the largest

        cos(vec[Wq; Wk], vec[Wq'; Wk'])

    share: the later head uses Wq, Wk, Wv and Wo of the earlier one, of which one copy is stored. No
    data is looked at. Computation and KV cache stay; stored parameters fall by 4 h d per head of h
    coordinates.

    Departs from the paper: the number of heads follows from the sparsity of the whole model; with
    grouped queries a key and value head shares together with its query heads; a donor is never
    replaced itself (in the released code it may be, and then its share is undone: at 30% it
    replaces 18.8% of the heads), so a head takes the best donor that is kept; a bias goes with its
    rows. `match` product is an addition.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    name: Literal["direct_share"] = "direct_share"

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        positions = range(len(plan_of(model).blocks))
        return Cut(self.shared(model, self.donors(model)), tuple(positions))
