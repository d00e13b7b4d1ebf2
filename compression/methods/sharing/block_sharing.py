"""FoldGPT-style grouped sharing: neighbouring blocks use one set of linear weights."""

from typing import Literal

from transformers import PreTrainedModel

from foldstack.compression.methods.method import Evidence, check_evidence
from foldstack.compression.methods.sharing.group_sharing import GroupSharing
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import Cut


class BlockSharing(GroupSharing):
    """Let groups of neighbouring blocks use one set of linear weights; every block keeps its norms.

    The grouped parameter sharing of FoldGPT (Liu et al. 2024, arXiv 2407.00928, section on grouped
    parameter sharing) without its removal of blocks, reconstructed: the paper's formulas are not
    public, so this is FoldGPT-style and its numbers are not FoldGPT's. Depth, computation and KV
    cache stay; stored parameters fall by (g - 1) times a block's linears per group of g. How groups
    and their weights are chosen: see `GroupSharing`.

    Departs from the paper: no learned gates rank the blocks (method foldgpt has them) and no
    training follows here (recovery is its own stage); block influence stands for the gates'
    weights.
    """

    name: Literal["block_sharing"] = "block_sharing"

    def outline(self, model: PreTrainedModel) -> Plan:
        return self.sharing_outline(model)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        return self.share_groups(model, evidence, evidence.ranking.scores["block_influence"])
