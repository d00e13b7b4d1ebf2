"""Something small stands in for a run of blocks.

LLM-Streamline (arXiv 2403.19135) trains a layer, an FFN or a SwiGLU to do what the run did,
ReplaceMe (2505.02819) folds one linear map into the MLP before it.

- `block_start`: Closed-form starts of a block that is to do the work of a run, from the run's X and
  Y.
- `llm_streamline`: LLM-Streamline: one run of blocks makes room for one small trained block.
- `replaceme`: ReplaceMe: runs of blocks become one linear map each, folded into the MLP before
  them.
"""
