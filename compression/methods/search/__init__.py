"""Which change where, chosen by what each costs in loss.

- `assembly`: From a choice of variants to the model: the structure, the tensors, and single blocks
  of it.
- `curves`: From scores to options of the program: what is known at some widths of a site is read
  off at all of them, and what excludes what is told.
- `head_tensors`: Attention with fewer key and value heads: its structure and its tensors.
- `kinds`: What may stand at a site, a class for each kind: where, in which structure, of which
  tensors.
- `library`: Which variants there are for a model, what it becomes with some of them, and what they
  save.
- `materials`: What the tensors of variants are made from, and what several of them have in common.
- `rounds`: What changes cost beside one another: scored again where a choice stands, and chosen
  again.
- `run_maps`: What the MLP before a run of blocks becomes when it is to do the run's work as well.
- `scoring`: What each variant costs: the model with it against the dense one, from its site to the
  logits.
- `search`: Search: which change where, chosen by what each costs in loss.
- `seconds`: Whole models timed in turns with the dense one, to know what variants save of the time.
- `sites`: The sites of a model: what a choice decides about, and what the model allows there.
"""
