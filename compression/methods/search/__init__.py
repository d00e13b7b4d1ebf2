"""Which change where, chosen by what each costs in loss.

- `assembly`: From a choice of variants to the model: the structure, the tensors, and single blocks
  of it.
- `curves`: From scores to options: what is known at some widths of a site, read off at all of them.
- `library`: What may stand at each site of a model, and what it saves there.
- `rounds`: What changes cost beside one another: scored again where a choice stands, and chosen
  again.
- `scoring`: What each variant costs: the model with it against the dense one, from its site to the
  logits.
- `search`: Search: which change where, chosen by what each costs in loss.
"""
